"""State space duality, the sequence mixing of Mamba-2 (arXiv 2405.21060, sections 3, 6 and listing 1; docs/ssd.md).

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          (p n) per head; A is a negative scalar per head
    y_t     = state_t C_t + D x_t,   then y_t * silu(z_t) if z is given

`ssd_recurrence` is this definition, `ssd_step` one line of it, `ssd` the chunked forms: `ssd_scaled.py` for decays that
are mild within a chunk, `ssd_chunked.py` for any.
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
    count_documents,
    document_starts,
    pad_documents,
    step_sizes,
    wide,
    without_autocast,
)
from hinny.ops.ssd_chunked import ChunkedSSD
from hinny.ops.ssd_scaled import ScaledSSD, reaches, shorter, sums


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None, chunk_len: int = 64,
) -> tuple[Tensor, Tensor]:
    """Mixes a sequence through a decaying state, in chunks: linear in its length.

    x (b t h p); dt (b t h); A (h,) negative; B, C (b t g n), head i uses group i // (h/g); D, dt_bias (h,);
    z (b t h p); initial_state (b h p n), of the document of position 0; segments (b t) int: the state is zero
    before every token whose id differs from the one before. dt_softplus: the step is softplus(dt + dt_bias).
    Any length; chunk_len changes speed and memory only, and kernels take their own from the launch table.
    Returns y (b t h p) in x's dtype and the final state (b h p n), that of the last document, in float32
    (float64 if x is). Everything inside is float32 at least, autocast or not, but for the operands of kernels'
    products, which have the inputs' type. Gradients to all, through both states.
    Raises ValueError for shapes that do not fit.
    """
    which = backend.chosen(x)
    if which == "reference":
        return ssd_recurrence(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                              initial_state=initial_state, segments=segments, chunk_len=chunk_len)
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_state, segments, chunk_len)
    t, dtype = x.shape[1], wide(x.dtype)
    if which == "triton" and t > 1:
        from hinny.ops.kernels import ssd as kernels

        if reason := kernels.too_large(x, B, C):
            backend.decline("ssd", reason)
        else:
            with without_autocast(x):
                return kernels.ssd(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                   initial_state=initial_state, segments=segments)
    if t == 1:
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D, z=None if z is None else z[:, 0],
                            dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=initial_state)
        return y.unsqueeze(1), state
    length = min(chunk_len, t)
    padding = -t % length
    with without_autocast(x):
        steps = step_sizes(dt, dt_bias, dt_softplus, dtype)
        values, A, B, C, D, initial_state = cast(dtype, x, A, B, C, D, initial_state)
        documents = None if segments is None else count_documents(segments)
        if padding:
            # steps of zero: the padding neither decays the state nor adds to it
            values, B, C = (F.pad(v, (0, 0, 0, 0, 0, padding)) for v in (values, B, C))
            steps = F.pad(steps, (0, 0, 0, padding))
            if documents is not None:
                documents = pad_documents(documents, padding)
        y, state = _chunked(values.contiguous(), steps.contiguous(), A, B, C, D, initial_state, documents, length)
        y = y[:, :t] if padding else y
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype), state


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    documents: Tensor | None, length: int,
) -> tuple[Tensor, Tensor]:
    """The fast form if the decays allow it, with chunks as long as they allow, else the general one."""
    b, t, h, _ = x.shape
    shortened = length
    while shortened:
        chunks = (b, t // shortened, shortened)
        with torch.no_grad():
            split = None if documents is None else documents.view(chunks)
            reach = reaches(split, x, shortened)
            total = sums((dt * A).view(*chunks, h), reach)
        if total is not None:
            return ScaledSSD.apply(x, dt, A, B, C, D, state, split, reach, total)
        shortened = shorter(shortened)
    return ChunkedSSD.apply(x, dt, A, B, C, D, state, documents, length)


def ssd_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None, chunk_len: int = 64,
) -> tuple[Tensor, Tensor]:
    """The definition of `ssd`, token by token; the same arguments and results. chunk_len is checked and has no part."""
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_state, segments, chunk_len)
    b, t, h, p = x.shape
    dtype = wide(x.dtype)
    if initial_state is None:
        initial_state = x.new_zeros(b, h, p, B.shape[-1], dtype=dtype)
    state = initial_state.to(dtype)
    starts = None if segments is None else document_starts(segments)
    outputs = []
    for i in range(t):
        if starts is not None:
            state = state.masked_fill(starts[:, i, None, None, None], 0)
        y, state = ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], D=D, z=None if z is None else z[:, i],
                            dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`: x, z (b h p); dt (b h); B, C (b g n); state (b h p n) -> y (b h p), next state.

    Segments have no part here: the caller passes no initial state to begin a document.
    """
    check_rank("ssd_step", "x", x, "b h p")
    check_rank("ssd_step", "B", B, "b g n")
    (b, h, p), (g, n), dtype = x.shape, B.shape[1:], wide(x.dtype)
    _check_groups("ssd_step", h, g)
    check_shapes("ssd_step", dt=(dt, (b, h)), A=(A, (h,)), B=(B, (b, g, n)), C=(C, (b, g, n)), D=(D, (h,)),
                 z=(z, (b, h, p)), dt_bias=(dt_bias, (h,)), initial_state=(initial_state, (b, h, p, n)))
    with without_autocast(x):
        steps = step_sizes(dt, dt_bias, dt_softplus, dtype)
        values, A, B, C, D, state = cast(dtype, x, A, B, C, D, initial_state)
        B, C = (v[:, :, None].expand(b, g, h // g, n).reshape(b, h, 1, n) for v in (B, C))
        added = (values * steps[..., None])[..., None] * B  # (b h p n)
        state = added if state is None else state * (steps * A).exp()[..., None, None] + added
        y = (state * C).sum(-1)
        if D is not None:
            y = y + values * D[:, None]
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype), state


def check_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, segments: Tensor | None, chunk_len: int,
) -> None:
    """Raises ValueError for arguments of `ssd` that do not fit."""
    check_rank("ssd", "x", x, "b t h p")
    check_rank("ssd", "B", B, "b t g n")
    check_length("ssd", "chunk_len", chunk_len)
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    _check_groups("ssd", h, g)
    check_shapes("ssd", dt=(dt, (b, t, h)), A=(A, (h,)), B=(B, (b, t, g, n)), C=(C, (b, t, g, n)), D=(D, (h,)),
                 z=(z, (b, t, h, p)), dt_bias=(dt_bias, (h,)), initial_state=(initial_state, (b, h, p, n)),
                 segments=(segments, (b, t)))


def _check_groups(op: str, heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"{op}: x has {heads} heads and B {groups} groups; the groups must divide the heads.")
