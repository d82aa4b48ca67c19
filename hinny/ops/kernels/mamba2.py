"""SSD of convolved inputs on a Hopper GPU: the convolution of x happens where SSD loads x, behind `hinny.ops.mamba2`.

    forward     `hopper_convolved`; for training it also writes the convolved x, which the backward reads
    backward    SSD's, then the convolution's, whose dy is SSD's dx
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hinny.ops.kernels import conv, hopper, hopper_convolved, ssd
from hinny.ops.kernels.launches import launch
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.ssd_call import Call

WINDOWS = (2, 3, 4)
"""Taps of the convolutions that the kernel has."""


def takes(x: Tensor, B: Tensor, C: Tensor, weight: Tensor) -> bool:
    """Whether one kernel convolves x (b t h p) and walks it; the ops one after the other do all of it."""
    if not hopper.takes(x, B) or {x.dtype, B.dtype, C.dtype} != {torch.bfloat16} or weight.shape[1] not in WINDOWS:
        return False
    b, t, h, _ = x.shape
    if t == 1 or b > ssd.LARGEST_BATCH:
        return False
    # parts of a sequence that are walked at once need the convolved x twice
    programs, tokens = _parts(x.device)
    return programs < 2 * b * h or t <= tokens


def _parts(device: torch.device) -> tuple[int, int]:
    """Programs among which walks are shared out in parts if they are fewer than half as many, and the most tokens of a
    sequence too short for two parts; the same for all heads and states."""
    use = launch("hopper_convolved", device, p=hopper.COLUMNS, n=128, bits=16)
    return use["PROGRAMS"], (2 * use["SHORTEST"] - 1) * use["Q"]


# what torch.compiler.assume_constant_result sets, as in `hinny.ops.backend`
_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def convolved_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None,
    *, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (b t h p) before its convolution (weight (h*p w), bias, the inputs before (b h*p w-1)), B and C after theirs →
    y, the final state (b h p n) and the convolution's (b h*p w-1). The arguments have been checked."""
    given = (x, dt, A, B, C, weight, bias, before, D, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)
    return _operator(*given, dt_softplus, keep)[:3]


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None,
    D: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, the last inputs, and the convolved x (empty unless kept)."""
    y, final, after, kept = results = _fake(x, dt, A, B, C, weight, bias, before, D, dt_bias, initial, softplus, keep)
    raw = x.flatten(2)
    raw = raw if raw.stride(2) == 1 else raw.contiguous()
    B, C, dt = B.contiguous(), C.contiguous(), ssd.rows_of_steps(dt)
    A, D, dt_bias, initial, weight, bias, before = (
        None if v is None else v.contiguous() for v in (A, D, dt_bias, initial, weight, bias, before))
    call = Call("hopper_convolved", x, B)
    share = call.share(call.p // hopper.COLUMNS)
    flags = x.new_empty(call.b, call.h, dtype=torch.int64) if share else None
    decays = call.prepare(dt, dt_bias, A, softplus, None, flags)
    hopper_convolved.forward(call, raw, weight, bias, before, B, C, decays, D, initial, y, final,
                             kept if keep else None, None if flags is None else flags.view(torch.int32), share)
    _last_inputs(raw, before, after)
    return results


def _last_inputs(raw: Tensor, before: Tensor | None, after: Tensor) -> None:
    """Fills after (b ch w-1) with the newest inputs, of raw (b t ch) and of those before it (zero if None)."""
    t, kept = raw.shape[1], after.shape[2]
    new = min(t, kept)
    after[..., kept - new:] = raw[:, t - new:].transpose(1, 2)
    if new < kept:
        after[..., :kept - new] = 0 if before is None else before[..., new:]


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None,
    D: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, t, h, p = x.shape
    y = x.new_empty(b, t, h, p)
    final = x.new_empty(b, h, p, B.shape[3], dtype=torch.float32)
    return (y, final, x.new_empty(b, h * p, weight.shape[1] - 1, dtype=torch.float32),
            x.new_empty(b, t, h, p) if keep else x.new_empty(0))


def _backward(
    dy: Tensor, dfinal: Tensor | None, dafter: Tensor | None, x: Tensor, convolved: Tensor, dt: Tensor, A: Tensor,
    B: Tensor, C: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, D: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, softplus: bool, before_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs of the forward in their order; empty where one was not given, or not wanted."""
    dconvolved, ddt, dA, dB, dC, dD, dbias_dt, dinitial = ssd.backward(
        dy, dfinal, convolved, dt, A, B, C, D, dt_bias, initial, None, softplus)
    dx, dweight, dbias, dbefore = conv.backward(
        x.flatten(2), weight, bias, before, None, dconvolved.flatten(2), dafter, True, before_wanted)
    return dx.view(x.shape), ddt, dA, dB, dC, dweight, dbias, dbefore, dD, dbias_dt, dinitial


def _fake_backward(
    dy: Tensor, dfinal: Tensor | None, dafter: Tensor | None, x: Tensor, convolved: Tensor, dt: Tensor, A: Tensor,
    B: Tensor, C: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, D: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, softplus: bool, before_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(v: Tensor | None) -> Tensor:
        return dy.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)

    return (like(x), like(dt), like(A), like(B), like(C), like(weight), like(bias),
            like(before if before_wanted else None), like(D), like(dt_bias), like(initial))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _keep = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.mark_non_differentiable(output[3])


def _gradients(
    run: Any, ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dafter: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, weight, bias, before, D, dt_bias, initial, convolved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[7]
    dy = torch.zeros_like(convolved) if dy is None else dy
    found = run(dy, dfinal, dafter, x, convolved, dt, A, B, C, weight, bias, before, D, dt_bias, initial, ctx.softplus,
                wanted)
    given = (x, dt, A, B, C, weight, bias, before if wanted else None, D, dt_bias, initial)
    return (*(None if v is None else gradient for v, gradient in zip(given, found, strict=True)), None, None)


_operator = differentiable("mamba2", _forward, _backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                           gradients=_gradients)
