"""Decoding: the states of a batch of sequences advanced by one or a few tokens, in place, in pools of slots.

What `ssd` and `causal_conv` compute (their definitions hold here), for the shapes of generation: few tokens, states
that stay where they are, a batch that is a set of slots. The states' traffic is all that counts: a float32 state of 128
heads of 64 x 128 is 4 MB that a token reads and writes.

No gradients: these ops are for inference alone and raise where gradients would be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hinny.ops import backend
from hinny.ops.conv import Activation, causal_conv, causal_conv_reference
from hinny.ops.inputs import check_rank, check_shapes, step_sizes, wide
from hinny.ops.replay import Replay, appended, as_stored, check_replay, folded, gathered, with_room
from hinny.ops.rounding import as_seed
from hinny.ops.slots import check_slots, picked, put_back
from hinny.ops.ssd import ssd, ssd_recurrence

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ssd_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, slots: Tensor | None = None,
    seed: int | Tensor | None = None, replay: Replay | None = None,
) -> Tensor:
    """Changes `state` (and `replay`) in place: advances SSD states by t tokens; returns their outputs.

    state (s h p n): a pool of float32, bfloat16 or float16 states (float64 if x is); x, z (b t h p); dt (b t h); A, D,
    dt_bias (h,); B, C (b t g n), as for `ssd`. slots (b,) int64: the row of the pool of each sequence, all different;
    None: row i for sequence i; a negative slot is padding, its output zero, its inputs unused. They are not checked
    against the pool's size on a GPU.
    The state is read, advanced in float32 and rounded once, at the end: to nearest, or with a `seed` (an int, or one
    int64 on the state's device, which costs no launch) stochastically, a 16-bit state alone. One seed gives the same
    bits again: give each layer and step its own.
    replay: from `make_replay`, for large batches: tokens are buffered, and the state is written only by the call that
    finds no room for its tokens (see `hinny/ops/replay.py`); the same outputs to rounding. t is at most its length.
    Returns y (b t h p) in x's dtype. Raises ValueError for arguments that do not fit.
    """
    _check_update("ssd_update", state, x, dt, A, B, C, D, z, dt_bias, slots, replay)
    seed = as_seed("ssd_update", seed, state)
    if (chosen := backend.chosen(x)) == "triton":
        from hinny.ops.kernels import decode

        return decode.ssd_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                 slots=slots, seed=seed, replay=replay)
    run = ssd_recurrence if chosen == "reference" else ssd
    rows, live = picked(state, slots, len(x))
    stored = state.index_select(0, rows)
    if replay is None:
        y, after = run(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=stored)
        put_back(state, rows, live, as_stored(after, state.dtype, seed, rows))
    else:
        stored, held = with_room(stored, A, gathered(replay, rows), x.shape[1], seed, rows)
        y, _ = run(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                   initial_state=folded(stored, A, held))
        held = appended(held, x, step_sizes(dt, dt_bias, dt_softplus, wide(x.dtype)), B)
        for pool, values in zip((state, *replay), (stored, *held), strict=True):
            put_back(pool, rows, live, values)
    return torch.where(live[:, None, None, None], y, 0)


def conv_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Changes `state` in place: the causal convolution of the next t tokens after the inputs that it holds.

    state (s ch w-1): a pool of the last inputs, newest last, float32, bfloat16 or float16 (float64 if x is);
    x (b t ch); weight (ch w), bias (ch,) and activation as for `causal_conv`; slots (b,) as for `ssd_update`.
    Returns y (b t ch) in x's dtype. Raises ValueError for arguments that do not fit.
    """
    check_rank("conv_update", "x", x, "b t ch")
    _check_conv("conv_update", state, [x], [weight], [bias], activation, slots)
    if (chosen := backend.chosen(x)) == "triton":
        from hinny.ops.kernels import decode_conv

        return decode_conv.conv_update(state, x, weight, bias, activation=activation, slots=slots)
    run = causal_conv_reference if chosen == "reference" else causal_conv
    rows, live = picked(state, slots, len(x))
    y, after = run(x, weight, bias, activation=activation, initial_state=state.index_select(0, rows))
    put_back(state, rows, live, after.to(state.dtype))
    return torch.where(live[:, None, None], y, 0)


def mamba2_update(
    state: Tensor, conv_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    weights: tuple[Tensor, Tensor, Tensor], biases: tuple[Tensor, Tensor, Tensor] | None = None, *,
    activation: Activation = "silu", D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = False, slots: Tensor | None = None, seed: int | Tensor | None = None,
    replay: Replay | None = None,
) -> Tensor:
    """Changes `state`, `conv_state` (and `replay`) in place: a Mamba-2 mixer's convolutions and SSD for t tokens.

    conv_state (s ch w-1): the inputs of x, B and C in this order; x (b t h*p), B, C (b t g*n): before the convolution,
    one dtype; weights, biases: those of x, B, C, (channels w) and (channels,). The rest as for `ssd_update` and
    `conv_update`: y is `ssd_update` of what `conv_update` gives. The parts may be slices of one projection's output.
    Returns y (b t h p) in x's dtype. Raises ValueError for arguments that do not fit.
    """
    for name, part in (("x", x), ("B", B), ("C", C)):
        check_rank("mamba2_update", name, part, "b t channels")
    raw, sizes = (x, B, C), [x.shape[2], B.shape[2], C.shape[2]]
    check_rank("mamba2_update", "state", state, "s h p n")
    p, n = state.shape[2:]
    if sizes[1] != sizes[2] or sizes[0] % p or sizes[1] % n or len({part.dtype for part in raw}) > 1:
        raise ValueError(f"mamba2_update: x, B, C have {sizes} channels of {[part.dtype for part in raw]}; x must have "
                         f"a multiple of p ({p}), B and C alike one of n ({n}), and all one dtype.")
    _check_conv("mamba2_update", conv_state, raw, weights, biases or (None,) * 3, activation, slots)
    heads = x.unflatten(2, (-1, p)), B.unflatten(2, (-1, n)), C.unflatten(2, (-1, n))
    _check_update("mamba2_update", state, heads[0], dt, A, *heads[1:], D, z, dt_bias, slots, replay)
    seed = as_seed("mamba2_update", seed, state)
    rest: dict[str, Any] = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "slots": slots,
                            "seed": seed, "replay": replay}
    if backend.chosen(x) == "triton":
        from hinny.ops.kernels import decode_conv

        return decode_conv.mamba2_update(state, conv_state, x, dt, A, B, C, weights, biases or (None,) * 3,
                                         activation=activation, **rest)
    convolved = conv_update(conv_state, torch.cat(raw, -1), torch.cat(weights),
                            None if biases is None else torch.cat(biases), activation=activation, slots=slots)
    x, B, C = (part.unflatten(2, (-1, width))
               for part, width in zip(convolved.split(sizes, -1), (p, n, n), strict=True))
    return ssd_update(state, x, dt, A, B, C, **rest)


def _check_update(
    op: str, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, slots: Tensor | None, replay: Replay | None,
) -> None:
    check_rank(op, "x", x, "b t h p")
    check_rank(op, "B", B, "b t g n")
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    if h % g:
        raise ValueError(f"{op}: x has {h} heads and B {g} groups; the groups must divide the heads.")
    check_shapes(op, dt=(dt, (b, t, h)), A=(A, (h,)), B=(B, (b, t, g, n)), C=(C, (b, t, g, n)), D=(D, (h,)),
                 z=(z, (b, t, h, p)), dt_bias=(dt_bias, (h,)), state=(state, (len(state), h, p, n)))
    _check_pool(op, state, x, slots)
    if replay is not None:
        check_replay(op, state, replay, g, x.dtype, B.dtype, t)
    _refuse_gradients(op, state, x, dt, A, B, C, D, z, dt_bias)


def _check_conv(
    op: str, state: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    activation: Activation, slots: Tensor | None,
) -> None:
    check_rank(op, "weight", weights[0], "ch w")
    (b, t), width = parts[0].shape[:2], weights[0].shape[1]
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        ch = part.shape[2]
        check_shapes(op, x=(part, (b, t, ch)), weight=(weight, (ch, width)), bias=(bias, (ch,)))
    check_shapes(op, state=(state, (len(state), sum(part.shape[2] for part in parts), width - 1)))
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}; it must be 'silu' or None.")
    _check_pool(op, state, parts[0], slots)
    _refuse_gradients(op, state, *parts, *weights, *biases)


def _check_pool(op: str, state: Tensor, x: Tensor, slots: Tensor | None) -> None:
    """Raises ValueError for states that cannot be changed in place, and slots that cannot be theirs."""
    if state.dtype not in STATE_DTYPES and not state.dtype == x.dtype == torch.float64:
        raise ValueError(f"{op}: the state is {state.dtype} beside x of {x.dtype}; it must be one of {STATE_DTYPES}, "
                         "or float64 beside float64.")
    if not state[:1].is_contiguous():
        raise ValueError(f"{op}: the state of a slot must be contiguous; its strides are {state.stride()}.")
    check_slots(op, slots, len(x), state)


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        raise RuntimeError(f"{op} works in place and has no gradients; call it under torch.no_grad().")
