"""The chunked form of SSD, forward and backward written out (arXiv 2405.21060 section 6; docs/ssd.md goes through it).

Written out because autograd would keep and multiply several (l l)-sized tensors per head and chunk: here the
gradient of the decays takes one such product (docs/ssd.md, "Gradients").
Letters: b batch, c chunks, l and m in a chunk, g groups, r heads of a group (h = g r), p head_dim, n state.
Layouts: "by token" (b c l g r p) is x's own memory; "by group" (b c g l r p) serves products that all heads of a
group share, one (l n)(n rp) product instead of r; "by head" (b c g r l p) serves the products within a chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops.inputs import without_autocast

# exp2 is 3.5 times as fast as exp on a CPU (0.38 against 1.32 ms for a million floats, one thread of an AVX-512 EPYC)
LOG2_E = 1 / math.log(2)


class Decays(NamedTuple):
    """What a state keeps between points of a chunk; 0 where a document begins between them."""

    reach: Tensor  # (l m) or (b c l m): 1 where token l sees token m of its chunk, else 0
    within: Tensor  # (b c g r l m): from token m to token l, zero where it does not see it
    entry: Tensor  # (b c l g r): from the chunk's start up to and with token l
    exit: Tensor  # (b c l g r): from after token l to the chunk's end
    whole: Tensor  # (b c g r): over the chunk


def decays(log_decay: Tensor, documents: Tensor | None) -> Decays:
    """log_decay (b c l g r) = dt A; documents (b c l), equal within a document, 0 for that of the initial state."""
    b, c, length, g, r = log_decay.shape
    reach = log_decay.new_ones(length, length).tril_()
    if documents is not None:
        reach = reach * (documents.unsqueeze(-1) == documents.unsqueeze(-2))
    # sums by a product with reach, not by cumsum: not even rounding comes over from another document
    total = torch.matmul(reach, log_decay.reshape(b, c, length, g * r) * LOG2_E).view(b, c, length, g, r)
    last = total[:, :, -1:]
    by_head = total.permute(0, 1, 3, 4, 2).contiguous()
    # differences of sums, never quotients of exponentials, which overflow; zeroed before the power too, which could
    # be infinite where reach is zero (two products take 0.3 ms for a million, masked_fill_ 1.5)
    seen = reach if documents is None else reach[:, :, None, None]
    within = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).mul_(seen).exp2_().mul_(seen)
    entry, exit_, whole = total.exp2(), last - total, last.squeeze(2).exp2()
    if documents is None:
        return Decays(reach, within, entry, exit_.exp2_(), whole)
    ends = documents[:, :, -1:]
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    leaves = (documents == ends)[..., None, None]
    entry *= (documents == before)[..., None, None]
    whole *= (before == ends)[..., None]
    exit_.mul_(leaves).exp2_().mul_(leaves)
    return Decays(reach, within, entry, exit_, whole)


class ChunkedSSD(torch.autograd.Function):
    """x (b t h p), dt (b t h), A (h), B, C (b t g n), D (h) | None, state (b h p n) | None, documents (b t) | None,
    chunk length dividing t -> y (b t h p), final state (b h p n); one dtype throughout, x and dt contiguous."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
        documents: Tensor | None, length: int,
    ) -> tuple[Tensor, Tensor]:
        b, t, h, p = x.shape
        c, g, n = t // length, *B.shape[2:]
        r = h // g
        decay = decays((dt * A).view(b, c, length, g, r), None if documents is None else documents.view(b, c, length))
        Bg, Cg = (v.reshape(b, c, length, g, n).transpose(2, 3).reshape(-1, length, n) for v in (B, C))
        by_token, steps = x.view(b, c, length, g, r, p), dt.view(b, c, length, g, r, 1)

        # 1 within chunks: y_l = sum over m <= l of (C_l . B_m) decay(l, m) dt_m x_m
        scores = torch.bmm(Cg, Bg.mT).view(b, c, g, 1, length, length)
        by_head = _product(by_token, steps, (0, 1, 3, 4, 2, 5))
        y_within = torch.bmm((decay.within * scores).view(-1, length, length), by_head.view(-1, length, p))
        # 2 what each chunk adds to the state at its end
        leaving = _product(by_token, steps * decay.exit.unsqueeze(-1), (0, 1, 3, 2, 4, 5))
        added = torch.bmm(Bg.mT, leaving.view(-1, length, r * p)).view(b, c, g, n, r, p)
        # 3 the state that enters each chunk
        entering, final = pass_states(added, decay.whole, state)
        # 4 what the entering state gives to each token
        y_entered = torch.bmm(Cg, entering.view(-1, n, r * p)).view(b, c, g, length, r, p)
        y = torch.empty_like(by_token)
        torch.addcmul(y_within.view_as(by_head).permute(0, 1, 4, 2, 3, 5), y_entered.transpose(2, 3),
                      decay.entry.unsqueeze(-1), out=y)
        if D is not None:
            y.addcmul_(by_token, D.view(g, r, 1))
        y = y.view(b, t, h, p)
        ctx.save_for_backward(x, dt, A, D, Bg, Cg, scores, by_head, leaving, entering, y_entered, *decay)
        ctx.has_state = state is not None
        return y, final.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, D, Bg, Cg, scores, by_head, leaving, entering, y_entered, *rest = ctx.saved_tensors
        decay = Decays(*rest)
        b, c, g, r, length, p = by_head.shape
        n, t, h = Bg.shape[-1], c * length, g * r
        by_token = x.view(b, c, length, g, r, p)
        with without_autocast(x):
            dy = dy.contiguous()
            dy_token = dy.view_as(by_token)
            dscores, dx_within, dlog = _backward_within(dy_token, by_head, scores, decay)

            dy_entered = _product(dy_token, decay.entry.unsqueeze(-1), (0, 1, 3, 2, 4, 5))
            flat = dy_entered.view(-1, length, r * p)
            dC = torch.bmm(flat, entering.view(-1, n, r * p).mT).baddbmm_(dscores, Bg)
            dentering = torch.bmm(Cg.mT, flat).view_as(entering)
            dleft, dstate, dwhole = backward_states(dentering, decay.whole, dfinal, entering)
            dleft = dleft.view(-1, n, r * p)
            dB = torch.bmm(leaving.view(-1, length, r * p), dleft.mT).baddbmm_(dscores.mT, Cg)
            dx_leaving = torch.bmm(Bg, dleft).view_as(leaving)

            # gradient of dt A: it decays what enters for its own and later tokens, what leaves from earlier ones, and
            # what passes through the whole chunk; what stays within is in dlog already
            scratch = dy_entered  # its content is used up
            enters = torch.mul(dy_entered, y_entered, out=scratch).sum(-1).transpose(2, 3).reshape(b, c, length, h)
            leaves = torch.mul(dx_leaving, leaving, out=scratch).sum(-1).transpose(2, 3).reshape(b, c, length, h)
            dlog += torch.matmul(decay.reach.mT, enters) + torch.matmul(decay.reach.tril(-1), leaves)
            dlog = (dlog + dwhole.unsqueeze(2)).view(b, t, h)

            dinput = torch.empty_like(by_token)  # gradient of dt x
            torch.addcmul(dx_within.permute(0, 1, 4, 2, 3, 5), dx_leaving.transpose(2, 3), decay.exit.unsqueeze(-1),
                          out=dinput)
            scratch = scratch.view(b, t, h, p)
            ddt = torch.mul(dinput.view_as(x), x, out=scratch).sum(-1)
            dx, dD = dinput.mul_(dt.view(b, c, length, g, r, 1)), None
            if D is not None:
                dD = torch.mul(dy, x, out=scratch).sum(-1).sum((0, 1))
                dx.addcmul_(dy_token, D.view(g, r, 1))
            dB, dC = (v.view(b, c, g, length, n).transpose(2, 3).reshape(b, t, g, n) for v in (dB, dC))
            return (dx.view_as(x), ddt.addcmul_(dlog, A), (dlog * dt).sum((0, 1)), dB, dC, dD,
                    dstate if ctx.has_state else None, None, None)


def _product(by_token: Tensor, factor: Tensor, layout: tuple[int, ...]) -> Tensor:
    """by_token (b c l g r p) * factor, written once, straight into another layout."""
    values = by_token.permute(layout)
    out = torch.empty(values.shape, dtype=by_token.dtype, device=by_token.device)
    return torch.mul(values, factor.permute(layout), out=out)


def pass_states(added: Tensor, whole: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """From what chunks add (b c g n r p) and keep (b c g r): the states entering each, and the final (b g n r p)."""
    b, c, g, n, r, p = added.shape
    current = torch.zeros_like(added[:, 0])
    if state is not None:
        current = state.reshape(b, g, r, p, n).permute(0, 1, 4, 2, 3)
    entering = torch.empty_like(added)
    for i in range(c):
        entering[:, i] = current
        current = torch.addcmul(added[:, i], whole[:, i, :, None, :, None], current)
    return entering, current


def backward_states(
    dentering: Tensor, whole: Tensor, dfinal: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states that leave the chunks (b c g n r p), of the initial state (b h p n), and of the
    logarithm of what each chunk keeps (b c h)."""
    b, c, g, n, r, p = dentering.shape
    current = dfinal.reshape(b, g, r, p, n).permute(0, 1, 4, 2, 3).contiguous()
    dleft, dwhole = torch.empty_like(dentering), dentering.new_empty(b, c, g, r)
    for i in reversed(range(c)):
        dleft[:, i] = current
        dwhole[:, i] = (current * entering[:, i]).sum((2, 4)) * whole[:, i]
        current = torch.addcmul(dentering[:, i], whole[:, i, :, None, :, None], current)
    return dleft, current.permute(0, 1, 3, 4, 2).reshape(b, g * r, p, n), dwhole.view(b, c, g * r)


def _backward_within(
    dy: Tensor, by_head: Tensor, scores: Tensor, decay: Decays
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the products within chunks, the gradients of the scores (bcg l m), of dt x by head, and of dt A (b c l h);
    dy by token."""
    b, c, g, r, length, p = by_head.shape
    dy_head = torch.empty_like(by_head).copy_(dy.permute(0, 1, 3, 4, 2, 5)).view(-1, length, p)
    weights = (decay.within * scores).view(-1, length, length)
    dx = torch.bmm(weights.mT, dy_head).view_as(by_head)
    products = torch.bmm(dy_head, by_head.view(-1, length, p).mT, out=weights).view_as(decay.within).mul_(decay.within)
    dscores = products.sum(3).view(-1, length, length)
    # d / d log decay from m to l; the diagonal does not decay, and without it nothing large is there to cancel
    products.mul_(scores).diagonal(dim1=-2, dim2=-1).zero_()
    dtotal = (products.sum(-1) - products.sum(-2)).view(b, c, g * r, length)
    return dscores, dx, torch.matmul(dtotal, decay.reach).transpose(2, 3).contiguous()
