"""What one chunk of a sequence does to a state that passes it, without its outputs: cheaper than the whole mixing.

    leaves = decay * enters + added
    decay  = exp(sum_t dt_t A)                                        0 if the chunk begins another document
    added  = sum_t exp(sum_{s>t} dt_s A) dt_t x_t B_t^T               over the tokens of its last document

(arXiv 2405.21060, section 8.2: a sequence over several devices.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops.inputs import step_sizes, wide, without_autocast

AT_ONCE = 2 ** 26
"""Numbers of x that are weighted at once: what lies in memory beside the inputs is a few times 256 MiB at most."""


def chunk_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`added` and `decay` of a chunk of SSD; arguments as for `hinny.ops.ssd`.

    x (b t h p); dt (b t h); A (h,) negative; B (b t g n); dt_bias (h,); segments (b t).
    Returns added (b h p n), the final state of `ssd` without an initial one, and decay (b h), both in float32 (float64
    if x is). One product (rp t)(t n) for the r heads of a group; on a GPU its operands have the inputs' type. Gradients
    to all; nothing of x's size is kept for the backward but x.
    """
    with without_autocast(x):
        weight, decay = _Again.apply(_weights, wide(x.dtype), dt_softplus, dt, A, dt_bias, segments)
        return _WeightedSum.apply(x, weight, B), decay


def scan_decay(
    dt: Tensor, A: Tensor, *, dt_bias: Tensor | None = None, dt_softplus: bool = False, segments: Tensor | None = None,
) -> Tensor:
    """`decay` of a chunk of the selective scan: dt (b t d), A (d n), dt_bias (d,), segments (b t) → (b d n), in
    float32 (float64 if dt is). Gradients to all.
    """
    with without_autocast(dt):
        return _Again.apply(_scan_decay, wide(dt.dtype), dt_softplus, dt, A, dt_bias, segments)


def _weights(
    dtype: torch.dtype, softplus: bool, dt: Tensor, A: Tensor, dt_bias: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """How much of each x B^T is in the state at the chunk's end (b t h), and of what entered the chunk (b h)."""
    steps, passes = _steps(dtype, softplus, dt, dt_bias, segments)
    # summed from the end: a difference of two sums loses the small steps of the last tokens, which weigh most
    after = F.pad(steps[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))
    rate = A.to(dtype)
    decay = (steps.sum(1) * rate).exp()
    return (after * rate).exp() * steps, decay if passes is None else decay.masked_fill(~passes[:, None], 0)


def _scan_decay(
    dtype: torch.dtype, softplus: bool, dt: Tensor, A: Tensor, dt_bias: Tensor | None, segments: Tensor | None
) -> Tensor:
    steps, passes = _steps(dtype, softplus, dt, dt_bias, segments)
    decay = (steps.sum(1)[..., None] * A.to(dtype)).exp()
    return decay if passes is None else decay.masked_fill(~passes[:, None, None], 0)


def _steps(
    dtype: torch.dtype, softplus: bool, dt: Tensor, dt_bias: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The steps, zero but in the last document, and whether this is the only one (b,); None without segments."""
    steps = step_sizes(dt, dt_bias, softplus, dtype)
    if segments is None:
        return steps, None
    # an id may come back: the last document begins behind the last change
    changes = F.pad(segments[:, 1:] != segments[:, :-1], (0, 1)).flip(1).cumsum(1).flip(1)
    return steps.masked_fill((changes > 0)[..., None], 0), changes[:, 0] == 0


class _Again(torch.autograd.Function):
    """function(dtype, softplus, *tensors), computed again in the backward: of its steps nothing is kept."""

    @staticmethod
    def forward(ctx: Any, function: Callable, dtype: torch.dtype, softplus: bool, *given: Tensor | None) -> Any:
        ctx.function, ctx.options = function, (dtype, softplus)
        ctx.save_for_backward(*given)
        return function(dtype, softplus, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        leaves = [v if v is None else v.detach().requires_grad_(wanted)
                  for v, wanted in zip(given, ctx.needs_input_grad[3:], strict=True)]
        with torch.enable_grad(), without_autocast(grads[0]):
            outputs = ctx.function(*ctx.options, *leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads))
        return None, None, None, *(next(found) if wanted else None for wanted in ctx.needs_input_grad[3:])


class _WeightedSum(torch.autograd.Function):
    """x (b t h p), weight (b t h), B (b t g n) → sum over t of weight x B^T (b h p n) in weight's type, some tokens
    at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, B)
        (b, _, h, p), (g, n) = x.shape, B.shape[2:]
        total = weight.new_zeros(b * g, h // g * p, n)
        for part in _parts(x):
            total += _product(_weighted(x[:, part], weight[:, part], B).mT, _by_group(B[:, part], x.dtype),
                              weight.dtype)
        return total.view(b, h, p, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, B = ctx.saved_tensors
        (b, _, h, p), (g, n) = x.shape, B.shape[2:]
        with without_autocast(x):
            dx, dweight, dB = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, weight, B))
            left = dtotal.reshape(b * g, h // g * p, n).to(torch.promote_types(x.dtype, B.dtype))
            for part in _parts(x):
                tokens = x[:, part]
                reached = _product(_by_group(B[:, part], x.dtype), left.mT, weight.dtype)  # (bg l rp)
                reached = reached.view(b, g, -1, h // g, p).transpose(1, 2).reshape(tokens.shape)
                dweight[:, part] = (reached * tokens).sum(-1)
                dx[:, part] = reached.mul_(weight[:, part, :, None])
                dkeys = _product(_weighted(tokens, weight[:, part], B), left, weight.dtype)
                dB[:, part] = dkeys.view(b, g, -1, n).transpose(1, 2)
            return dx, dweight, dB


def _parts(x: Tensor) -> list[slice]:
    """The tokens of x, so many at a time that AT_ONCE is kept."""
    b, t, h, p = x.shape
    step = max(1, AT_ONCE // (b * h * p))
    return [slice(start, start + step) for start in range(0, t, step)]


def _weighted(x: Tensor, weight: Tensor, B: Tensor) -> Tensor:
    """x times weight, rounded once, as (bg l rp) of the products' type."""
    (b, t, h, p), g = x.shape, B.shape[2]
    out = torch.empty(b, g, t, h // g, p, dtype=torch.promote_types(x.dtype, B.dtype), device=x.device)
    torch.mul(x.reshape(b, t, g, -1, p).transpose(1, 2), weight.reshape(b, t, g, -1, 1).transpose(1, 2), out=out)
    return out.view(b * g, t, -1)


def _by_group(B: Tensor, x_dtype: torch.dtype) -> Tensor:
    """(b l g n) → (bg l n) of the products' type."""
    return B.transpose(1, 2).flatten(0, 1).to(torch.promote_types(x_dtype, B.dtype))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A batched product summed and given in `dtype`; a GPU reads its operands as they are."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    return torch.bmm(left, right, out_dtype=dtype) if left.is_cuda else torch.bmm(left.to(dtype), right.to(dtype))
