"""The convolution of decoding, in place on its states, and a Mamba-2 mixer's step of two launches.

    conv_update_kernel   a program has some channels of one sequence, of x, B or C. A tile (channels w) holds a token's
                         window: the taps' inputs, from the state before the first token and from x after it. The last
                         token's window, moved by one, is the next state.
    mamba2_update        this launch, then that of `decode.ssd_update`, which depends on it in x, B and C alone: where
                         the GPU can (Hopper and later), its programs start while the convolution runs, and wait for
                         it only after they have asked for their states.

One launch would not be faster: all heads of a group read the same channels of the convolution's state, which is written
only when all have read it, so a single launch would have to wait across programs, or keep a second copy.
Letters: b batch, t time, ch channels, w window.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.decode import REPLAY_ARGUMENTS, by_token, in_place, launch_fold, launch_update
from hinny.ops.kernels.gates import sigmoid
from hinny.ops.kernels.launches import launch, overlaps, rules


@triton.jit
def convolve(
    state, x, weight, bias, y, live, b, t, stride, ch: tl.constexpr, total: tl.constexpr, first, W: tl.constexpr,
    WIDE: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
):
    """Channels from `first` of one part: x (b t ch) by the stride of a token; state at the part's first channel of the
    slot, y (b t total) at the part's first channel."""
    c = first + tl.arange(0, CHANNELS)
    k = tl.arange(0, WIDE)
    inside = c < ch
    mask = live & inside[:, None] & (k < W)[None, :]
    taps = tl.load(weight + c[:, None] * W + k[None, :], mask=mask, other=0).to(tl.float32)
    offset = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=inside, other=0).to(tl.float32)
    state += c[:, None] * (W - 1)
    window = tl.zeros((CHANNELS, WIDE), tl.float32)
    for i in range(t):
        # column W-1 is token i; those before token 0 are the state's last columns
        at = (i - (W - 1) + k)[None, :]
        held = tl.load(state + (at + W - 1), mask=mask & (at < 0), other=0).to(tl.float32)
        token = b.to(tl.int64) * t
        new = tl.load(x + (token + at) * stride + c[:, None], mask=mask & (at >= 0), other=0).to(tl.float32)
        window = held + new
        out = tl.sum(window * taps, 1) + offset
        if SILU:
            out *= sigmoid(out)
        tl.store(y + (token + i) * total + c, tl.where(live, out, 0).to(y.dtype.element_ty), mask=inside)
    # a thread writes the column left of the one it read
    tl.debug_barrier()
    tl.store(state + (k - 1)[None, :], window.to(state.dtype.element_ty), mask=mask & (k > 0)[None, :])


@triton.jit
def conv_update_kernel(
    state, x, B, C, weight_x, weight_b, weight_c, bias_x, bias_b, bias_c, slots, y,
    t, state_stride, x_stride, bc_stride,
    X: tl.constexpr, BC: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, EARLY: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """state (s X+2*BC w-1); x (b t X), B, C (b t BC) by the stride of a token, or x alone with BC = 0 → y (b t X+2*BC).

    EARLY: this launch may begin before the one in front of it ends, and the next one before this one does; each waits
    by itself for what the other wrote.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x_blocks: tl.constexpr = (X + CHANNELS - 1) // CHANNELS
    bc_blocks: tl.constexpr = (BC + CHANNELS - 1) // CHANNELS
    blocks: tl.constexpr = x_blocks + 2 * bc_blocks
    total: tl.constexpr = X + 2 * BC
    b = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b)
    live = slot >= 0
    state += slot * state_stride
    if block < x_blocks:
        convolve(state, x, weight_x, bias_x, y, live, b, t, x_stride, X, total, block * CHANNELS, W, WIDE, SILU,
                 CHANNELS)
    if BC > 0:
        if (block >= x_blocks) & (block < x_blocks + bc_blocks):
            convolve(state + X * (W - 1), B, weight_b, bias_b, y + X, live, b, t, bc_stride, BC, total,
                     (block - x_blocks) * CHANNELS, W, WIDE, SILU, CHANNELS)
        if block >= x_blocks + bc_blocks:
            convolve(state + (X + BC) * (W - 1), C, weight_c, bias_c, y + X + BC, live, b, t, bc_stride, BC, total,
                     (block - x_blocks - bc_blocks) * CHANNELS, W, WIDE, SILU, CHANNELS)


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None,
                slots: Tensor | None) -> Tensor:
    """`hinny.ops.conv_update` on checked arguments; changes `state` in place."""
    return _conv_update(state, x, weight, bias, activation == "silu", slots)


def mamba2_update(
    state: Tensor, conv_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weights: tuple,
    biases: tuple, *, activation: str | None, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, slots: Tensor | None, seed: Tensor | None, replay: tuple | None,
) -> Tensor:
    """`hinny.ops.mamba2_update` on checked arguments; changes `state`, `conv_state` and `replay` in place."""
    return _mamba2_update(state, conv_state, x, dt, A, B, C, *weights, *biases, activation == "silu", D, z, dt_bias,
                          dt_softplus, slots, seed, *(replay or (None,) * 4))


def launch_conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                       slots: Tensor | None) -> Tensor:
    return _launch_conv(state, (x, None, None), (weight, None, None), (bias, None, None), silu, slots, early=False)


def launch_mamba2_update(
    state: Tensor, conv_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight_x: Tensor,
    weight_b: Tensor, weight_c: Tensor, bias_x: Tensor | None, bias_b: Tensor | None, bias_c: Tensor | None, silu: bool,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None,
    seed: Tensor | None, held_x: Tensor | None, held_dt: Tensor | None, held_b: Tensor | None, cursor: Tensor | None,
) -> Tensor:
    early = overlaps(state.device)
    # copies of strided ones are made before the convolution, behind which the update does not wait for them
    A, D, dt_bias = (None if v is None else v.contiguous() for v in (A, D, dt_bias))
    if held_x is not None and held_dt is not None and held_b is not None and cursor is not None:
        # before the convolution, behind which the state's readers need not wait
        launch_fold(state, A, slots, seed, held_x, held_dt, held_b, cursor, *x.shape[:2])
    convolved = _launch_conv(conv_state, (x, B, C), (weight_x, weight_b, weight_c), (bias_x, bias_b, bias_c), silu,
                             slots, early)
    p, n = state.shape[2:]
    x, B, C = (part.unflatten(2, (-1, width)) for part, width in
               zip(convolved.split([v.shape[2] for v in (x, B, C)], 2), (p, n, n), strict=True))
    return launch_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots, seed, held_x, held_dt, held_b,
                         cursor, early)


def _launch_conv(state: Tensor, parts: tuple, weights: tuple, biases: tuple, silu: bool, slots: Tensor | None,
                 early: bool) -> Tensor:
    """One launch for x alone or for x, B and C."""
    x, B, C = parts
    b, t, ch = x.shape
    ch_b, w = 0 if B is None else B.shape[2], state.shape[2] + 1
    y = x.new_empty(b, t, ch + 2 * ch_b)
    x, x_stride = by_token(x)
    bc_stride = 0
    if B is not None:
        (B, bc_stride), (C, c_stride) = by_token(B), by_token(C)
        if bc_stride != c_stride:
            (B, bc_stride), (C, _) = by_token(B.contiguous()), by_token(C.contiguous())
    weights, biases = (tuple(v if v is None else v.contiguous() for v in group) for group in (weights, biases))
    use = launch("conv_update_kernel", state.device, work=b * (ch + 2 * ch_b))
    blocks = triton.cdiv(ch, use["CHANNELS"]) + 2 * triton.cdiv(ch_b, use["CHANNELS"])
    conv_update_kernel[b * blocks,](
        state, x, B, C, *weights, *biases, slots, y, t, state.stride(0), x_stride, bc_stride, ch, ch_b, w,
        triton.next_power_of_2(w), silu, early, **use, **({"launch_pdl": True} if early else {}))
    return y


def _fake_mamba2(state: Tensor, conv_state: Tensor, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *state.shape[1:3])


_conv_update = in_place("conv_update", launch_conv_update, lambda state, x, *rest, **options: x.new_empty(x.shape),
                        ("state",))
_mamba2_update = in_place("mamba2_update", launch_mamba2_update, _fake_mamba2,
                          ("state", "conv_state", *REPLAY_ARGUMENTS))


def compilations(table: str) -> list[Compilation]:
    """The kernel with every configuration of a shipped table: x, B and C for one token, x alone for several."""
    return [_compilation(f"conv_update_kernel-{number}-{'one' if alone else 'three'}", rule["use"], alone, table)
            for number, rule in enumerate(rules(table)["conv_update_kernel"]) for alone in (False, True)]


def _compilation(name: str, use: dict[str, int], alone: bool, table: str) -> Compilation:
    constants: dict[str, Any] = {"X": 8192, "BC": 0 if alone else 1024, "W": 4, "WIDE": 4, "SILU": True,
                                 "CHANNELS": use["CHANNELS"], "EARLY": not alone and table == "sm90"}
    if alone:
        constants |= dict.fromkeys(("B", "C", "weight_b", "weight_c", "bias_b", "bias_c"))
    else:
        constants["t"] = 1
    kinds = {"state": "*fp32", "slots": "*i64", "t": "i32"} | dict.fromkeys(("x", "B", "C", "y"), "*bf16")
    kinds |= {f"{kind}_{part}": "*fp32" for kind in ("weight", "bias") for part in "xbc"}
    signature = {v: kinds.get(v, "i32") for v in conv_update_kernel.arg_names if v not in constants}
    aligned = tuple(v for v in signature if v != "t")
    return Compilation(name, conv_update_kernel, signature, constants, use["num_warps"], use["num_stages"], aligned)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {"conv_update_kernel": [{"CHANNELS": channels, "num_warps": warps, "num_stages": 1}
                                   for channels, warps in ((128, 1), (128, 4), (256, 2), (256, 4), (512, 4))]}
