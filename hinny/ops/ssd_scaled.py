"""The chunked form of SSD for mild decays: the decay between two tokens as a product of one factor for each.

    exp(S_l - S_m) = u_l v_m,   u_l = exp(S_l),  v_m = exp(-S_m)          S: sums of dt A from the document's start

Then no tensor has two token axes and a head axis: x is scaled by v, one (l l)(l rp) product serves all heads of a
group, and y is scaled by u. It is right as long as no factor leaves the range of float32, so `sums` says whether a
chunk's decays allow it, and `ssd` takes shorter chunks or the general form of `ssd_chunked.py` if not. Letters and
layouts as there; powers of two, because exp2 is faster than exp. Results and gradients agree with the general form to
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hinny.ops.inputs import without_autocast
from hinny.ops.ssd_chunked import LOG2_E, backward_states, pass_states

LIMIT = 160.0
"""Largest decay over a document's part of a chunk, in powers of two. Both factors then lie within 2^-80 … 2^80."""

ROOM = 20.0
"""Largest growth, in powers of two; a negative A only decays."""

HALF = 2.0 ** (LIMIT / 2)

SHORTEST = 16
"""Shortest chunk: below it, passing states between chunks costs more than the general form does."""


def reaches(documents: Tensor | None, like: Tensor, length: int) -> Tensor:
    """(l l) or (b c l l): 1 where token l sees token m of its chunk, else 0; documents (b c l) | None."""
    reach = like.new_ones(length, length).tril_()
    return reach if documents is None else reach * (documents.unsqueeze(-1) == documents.unsqueeze(-2))


def sums(log_decay: Tensor, reach: Tensor) -> Tensor | None:
    """Sums of log_decay (b c l h) since the start of the document or chunk, as powers of two; None if one is too large.

    By a product with `reach`, not by cumsum: not even rounding comes over from another document.
    """
    total = torch.matmul(reach, log_decay * LOG2_E)
    # a not-a-number compares as false and goes on, to be seen in the caller's loss
    return None if bool(total.min() < -LIMIT) or bool(total.max() > ROOM) else total


def shorter(length: int) -> int:
    """The next shorter chunk to try where decays are too strong for `length`; 0 for the general form instead."""
    return length // 2 if length % 2 == 0 and length // 2 >= SHORTEST else 0


class ScaledSSD(torch.autograd.Function):
    """x (b t h p), dt (b t h), A (h), B, C (b t g n), D (h) | None, state (b h p n) | None, documents (b c l) | None,
    reach and total of `reaches` and `sums` -> y (b t h p), final state (b h p n); one dtype, x and dt contiguous."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
        documents: Tensor | None, reach: Tensor, total: Tensor,
    ) -> tuple[Tensor, Tensor]:
        b, t, h, p = x.shape
        c, length = total.shape[1:3]
        g, n = B.shape[2:]
        shape = (b, c, length, g, h // g)
        Bg, Cg = (_by_group(v.reshape(b, c, length, g, n)) for v in (B, C))
        entry, leave, whole = _edges(documents, total[:, :, -1], g)
        # squares of half the power: scaling by a power of two is exact, adding to the exponent would round it
        root = total / 2
        u, v = root.exp2().mul_(HALF ** 0.5).square_(), root.neg_().exp2_().div_(HALF ** 0.5).square_()

        scaled = _by_group((x.view(*shape, p) * (dt.view(*shape) * v.view(*shape)).unsqueeze(-1)).flatten(4))
        scores = _masked(torch.bmm(Cg, Bg.mT), reach, g)
        # what each chunk adds to the state at its end, and the state that enters each chunk
        end = u[:, :, -1].view(b, c, g, 1, h // g, 1)
        added = torch.bmm((Bg if leave is None else Bg * leave).mT, scaled).view(b, c, g, n, h // g, p).mul_(end)
        entering, final = pass_states(added, whole.view(b, c, g, h // g), state)
        half = (entering / HALF).view(-1, n, h // g * p)
        Y = torch.bmm(scores, scaled).baddbmm_(Cg if entry is None else Cg * entry, half)
        y = (_by_token(Y, shape, p) * u.view(*shape, 1)).view(b, t, h, p)
        if D is not None:
            y.addcmul_(x, D.unsqueeze(-1))
        ctx.save_for_backward(x, dt, A, D, Bg, Cg, scores, scaled, added, entering, whole, Y, u, v, reach, entry, leave)
        ctx.has_state = state is not None
        return y, final.permute(0, 1, 3, 4, 2).reshape(b, h, p, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, D, Bg, Cg, scores, scaled, added, entering, whole, Y, u, v, reach, entry, leave = ctx.saved_tensors
        b, c, g, n, r, p = entering.shape
        h, length = g * r, u.shape[2]
        shape = (b, c, length, g, r)
        with without_autocast(x):
            dy = dy.contiguous()
            dY = _by_group((dy.view(*shape, p) * u.view(*shape, 1)).flatten(4))
            dscores = _masked(torch.bmm(dY, scaled.mT), reach, g)
            # the states, from the last chunk to the first
            Ce, Bl = (part if mask is None else part * mask for part, mask in ((Cg, entry), (Bg, leave)))
            dentering = torch.bmm(Ce.mT, dY).div_(HALF).view_as(entering)
            dleft, dstate, dwhole = backward_states(dentering, whole.view(b, c, g, r), dfinal, entering)
            dadded = (dleft * u[:, :, -1].view(b, c, g, 1, r, 1)).view(-1, n, r * p)
            dscaled = torch.bmm(scores.mT, dY).baddbmm_(Bl, dadded)
            dC, dB = torch.bmm(dY, (entering / HALF).view(-1, n, r * p).mT), torch.bmm(scaled, dadded.mT)
            # written, not multiplied: across a document's edge the factors can be infinite together
            dC, dB = (d if mask is None else d.masked_fill_(mask == 0, 0) for d, mask in ((dC, entry), (dB, leave)))
            dC, dB = dC.baddbmm_(dscores, Bg), dB.baddbmm_(dscores.mT, Cg)

            # gradient of each token's sum of decays: y and what leaves the chunk grow with it, the scaled x shrinks
            dtotal = _by_token(dY.mul_(Y), shape, p).sum(-1).view_as(u)
            dscaled = _by_token(dscaled, shape, p).view_as(x)
            along = (dscaled * x).sum(-1).view_as(u)
            steps = dt.view_as(u)
            dtotal -= along * v * steps
            dtotal[:, :, -1] += dwhole + (dleft * added).sum((3, 5)).view(b, c, h)
            dlog = torch.matmul(reach.mT, dtotal)
            ddt = torch.addcmul(along * v, dlog, A).view_as(dt)
            dx, dD = dscaled.mul_((v * steps).view(*dt.shape, 1)), None
            if D is not None:
                dD = (dy * x).sum(-1).sum((0, 1))
                dx.addcmul_(dy, D.unsqueeze(-1))
            dB, dC = (d.view(b, c, g, length, n).transpose(2, 3).reshape(b, c * length, g, n) for d in (dB, dC))
            return (dx, ddt, (dlog * steps).sum((0, 1, 2)), dB, dC, dD, dstate if ctx.has_state else None,
                    None, None, None)


def _by_group(by_token: Tensor) -> Tensor:
    """(b c l g k) -> (bcg l k); without a copy for one group."""
    return by_token.transpose(2, 3).reshape(-1, by_token.shape[2], by_token.shape[4])


def _by_token(by_group: Tensor, shape: tuple[int, ...], p: int) -> Tensor:
    """(bcg l rp) -> (b c l g r p), shape being (b, c, l, g, r); without a copy for one group."""
    b, c, length, g, r = shape
    return by_group.view(b, c, g, length, r, p).transpose(2, 3).contiguous()


def _edges(documents: Tensor | None, last: Tensor, groups: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Masks (bcg l 1) of the tokens that see the entering state and of those that reach the leaving one, and what a
    state keeps over a whole chunk (b c h); last (b c h)."""
    whole = last.exp2()
    if documents is None:
        return None, None, whole
    ends = documents[:, :, -1:]
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    entry, leave = ((documents == edge).to(last.dtype).flatten(0, 1).repeat_interleave(groups, 0).unsqueeze(-1)
                    for edge in (before, ends))
    return entry, leave, whole * (before == ends)


def _masked(scores: Tensor, reach: Tensor, groups: int) -> Tensor:
    """scores (bcg l l), in place, zero where a token is not seen: written, as a product with infinity would be nan."""
    if reach.dim() == 2:
        return scores.tril_()
    hidden = (reach == 0).flatten(0, 1).repeat_interleave(groups, 0)
    return scores.masked_fill_(hidden, 0)
