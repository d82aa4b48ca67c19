"""Selective scan, the sequence mixing of Mamba (arXiv 2312.00752, sections 2 and 3.2, algorithm 2).

    state_t = exp(dt_t A) * state_{t-1} + dt_t x_t B_t^T        (d n); A is negative, one decay per channel and state
    y_t     = state_t C_t + D x_t,   then y_t * silu(z_t) if z is given

`selective_scan_recurrence` is this definition, `selective_scan_step` one line of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hinny.ops import backend
from hinny.ops.inputs import (
    cast,
    check_length,
    check_rank,
    check_shapes,
    document_starts,
    step_sizes,
    wide,
    without_autocast,
)
from hinny.ops.scan_chunked import ChunkedScan


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None, chunk_len: int = 16,
) -> tuple[Tensor, Tensor]:
    """Mixes a sequence channel by channel through decaying states; keeps states at chunk edges alone for the backward.

    x, dt, z (b t d); A (d n) negative; B, C (b t n); D, dt_bias (d,); initial_state (b d n), of the document of
    position 0; segments (b t) int: the state is zero before every token whose id differs from the one before.
    dt_softplus: the step is softplus(dt + dt_bias). Any length; chunk_len changes speed and memory only, of the
    torch form alone.
    Returns y (b t d) in x's dtype and the final state (b d n), that of the last document, in float32 (float64 if x
    is). Everything inside is float32 at least, autocast or not. Gradients to all, through both states.
    Raises ValueError for shapes that do not fit.
    """
    chosen = backend.chosen(x)
    if chosen == "reference":
        return selective_scan_recurrence(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                         initial_state=initial_state, segments=segments, chunk_len=chunk_len)
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, segments, chunk_len)
    if chosen == "triton":
        from hinny.ops.kernels import scan as kernels  # here alone: Triton is imported where it runs

        return kernels.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                      initial_state=initial_state, segments=segments)
    if x.shape[1] == 1:
        y, state = _one_token(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None if z is None else z[:, 0], dt_bias,
                              dt_softplus, initial_state)
        return y.unsqueeze(1), state
    dtype = wide(x.dtype)
    with without_autocast(x):
        steps = step_sizes(dt, dt_bias, dt_softplus, dtype)
        values, A, B, C, D, state = cast(dtype, x, A, B, C, D, initial_state)
        keep = None if segments is None else (~document_starts(segments)).to(dtype)
        y, state = ChunkedScan.apply(values, steps, A, B, C, state, keep, min(chunk_len, x.shape[1]))
        if D is not None:
            y = torch.addcmul(y, values, D)
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype), state


def selective_scan_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None, chunk_len: int = 16,
) -> tuple[Tensor, Tensor]:
    """The definition of `selective_scan`, token by token; the same arguments and results; chunk_len has no part."""
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, segments, chunk_len)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=wide(x.dtype))
    state = initial_state.to(wide(x.dtype))
    starts = None if segments is None else document_starts(segments)
    outputs = []
    for i in range(x.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, i, None, None], 0)
        y, state = _one_token(x[:, i], dt[:, i], A, B[:, i], C[:, i], D, None if z is None else z[:, i], dt_bias,
                              dt_softplus, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: x, dt, z (b d); B, C (b n); state (b d n) -> y (b d), next state.

    Segments have no part here: the caller passes no initial state to begin a document.
    """
    check_rank("selective_scan_step", "x", x, "b d")
    check_rank("selective_scan_step", "B", B, "b n")
    (b, d), n = x.shape, B.shape[1]
    check_shapes("selective_scan_step", dt=(dt, (b, d)), A=(A, (d, n)), B=(B, (b, n)), C=(C, (b, n)), D=(D, (d,)),
                 z=(z, (b, d)), dt_bias=(dt_bias, (d,)), initial_state=(initial_state, (b, d, n)))
    if backend.chosen(x) == "triton":
        from hinny.ops.kernels import scan as kernels  # here alone: Triton is imported where it runs

        return kernels.selective_scan_step(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                           initial_state=initial_state)
    return _one_token(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state)


def _one_token(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_step` as it is defined, in plain torch."""
    dtype = wide(x.dtype)
    with without_autocast(x):
        steps = step_sizes(dt, dt_bias, dt_softplus, dtype)
        values, A, B, C, D, state = cast(dtype, x, A, B, C, D, state)
        added = (values * steps)[..., None] * B[:, None]  # (b d n)
        state = added if state is None else state * (steps[..., None] * A).exp() + added
        y = (state * C[:, None]).sum(-1)
        if D is not None:
            y = y + values * D
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype), state


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, segments: Tensor | None, chunk_len: int,
) -> None:
    check_rank("selective_scan", "x", x, "b t d")
    check_rank("selective_scan", "B", B, "b t n")
    check_length("selective_scan", "chunk_len", chunk_len)
    (b, t, d), n = x.shape, B.shape[2]
    check_shapes("selective_scan", dt=(dt, (b, t, d)), A=(A, (d, n)), B=(B, (b, t, n)), C=(C, (b, t, n)), D=(D, (d,)),
                 z=(z, (b, t, d)), dt_bias=(dt_bias, (d,)), initial_state=(initial_state, (b, d, n)),
                 segments=(segments, (b, t)))
