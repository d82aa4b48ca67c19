"""What one layer carries: keys and values, or the state of a state space and its convolution's last inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

GROWTH = (64, 4096)
"""A full buffer of keys gets room for as many again, but at least and at most for so many tokens."""


@dataclass
class SSMState:
    """State of a Mamba layer: size does not grow with the sequence."""

    conv: Tensor
    """(b ch w-1): the last inputs of the causal convolution, zeros before the start."""
    ssm: Tensor
    """(b h p n) for Mamba-2, (b d n) for Mamba-1; float32, or float64 in a float64 model."""

    def advance(self, mix: Callable[..., tuple[Tensor, Tensor, Tensor]], step: Callable[..., Tensor] | None,
                *tokens: Tensor) -> Tensor:
        """What a layer makes of its next tokens, each tensor (b t ...) → y (b t ...); the state is that behind them.

        mix(*tokens, ssm, conv) → y and both anew; step(*tokens, ssm, conv, slots), where a layer has it, changes the
        rows `slots` of both in place (`hinny.ops.mamba2_update`): for states that live in a pool.
        """
        y, self.ssm, self.conv = mix(*tokens, self.ssm, self.conv)
        return y

    def fits(self, name: str, tensor: Tensor, length: int) -> bool:
        """Whether `tensor` could be the one called `name`, of the same model and batch after `length` tokens."""
        return tensor.shape == self.tensors()[name].shape

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by argument name."""
        return {"conv": self.conv, "ssm": self.ssm}

    def select(self, rows: Tensor, positions: Tensor) -> SSMState:
        """A copy of `rows`."""
        return SSMState(**{name: t.index_select(0, rows.to(t.device)) for name, t in self.tensors().items()})

    @staticmethod
    def join(parts: Sequence[SSMState], positions: Tensor) -> SSMState:
        """The rows of all parts."""
        return SSMState(conv=torch.cat([part.conv for part in parts]), ssm=torch.cat([part.ssm for part in parts]))

    def reserve(self, tokens: int) -> None:
        """Nothing: more tokens need no room here."""

    def bytes(self, tokens: int | None) -> int:
        """Memory held, whatever the tokens."""
        return sum(t.nbytes for t in self.tensors().values())


class KVState:
    """Keys and values of an attention layer: grows by one row a token.

    They have the type of the newest ones: where that changes, as by autocast, all are converted once.
    """

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """k, v (b s g p): what has been seen; s may be 0. lengths (b,) int64: of each row the first so many of the s
        are its own, the rest any finite numbers; None: all s are, in every row.
        """
        self._k, self._v, self.length, self.lengths = k, v, k.shape[1], lengths
        self._capacity = 0

    @property
    def k(self) -> Tensor:
        """(b s g p), s = length."""
        return self._k[:, :self.length]

    @property
    def v(self) -> Tensor:
        """(b s g p), s = length."""
        return self._v[:, :self.length]

    @property
    def start(self) -> int | Tensor:
        """Where the next token stands: one place for all rows, or (b,) on the device; states that are no rows of equal
        pieces say it of every token, (b t)."""
        return self.length if self.lengths is None else self.lengths

    def attend(self, mix: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`mix`, which is `hinny.ops.attention` or stands for it, of queries (b t h p) and all keys, these (b t g p)
        included: they are held from here on."""
        self.append(k, v)
        return mix(q, self.k, self.v, segments=None, lengths=self.lengths)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put t more keys and values (b t g p) behind the ones that each row holds."""
        (b, t), at = k.shape[:2], None
        if self.lengths is not None:
            behind = self.lengths[:, None] + torch.arange(t, device=k.device)
            at = torch.arange(b, device=k.device)[:, None], behind
            self.lengths = self.lengths + t
        self._k, self._v = (_append(buffer, new, self.length, at, self._capacity)
                            for buffer, new in ((self._k, k), (self._v, v)))
        self.length += t

    def reserve(self, tokens: int) -> None:
        """Let the next `append` make room for so many tokens at once, if there is none."""
        self._capacity = self.length + tokens

    def fits(self, name: str, tensor: Tensor, length: int) -> bool:
        """Whether `tensor` could be the one called `name`, of the same model and batch after `length` tokens."""
        b, _, g, p = self._k.shape
        return tensor.shape == (b, length, g, p)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by argument name."""
        return {"k": self.k, "v": self.v}

    def select(self, rows: Tensor, positions: Tensor) -> KVState:
        """A copy of `rows`, which stand at `positions`."""
        rows = rows.to(self._k.device)
        k, v = (t[:, :longest(positions)].index_select(0, rows) for t in (self._k, self._v))
        return KVState(k, v, _unequal(positions, rows.device))

    @staticmethod
    def join(parts: Sequence[KVState], positions: Tensor) -> KVState:
        """The rows of all parts, which stand at `positions`."""
        k, v = (_stacked([part.tensors()[name] for part in parts]) for name in "kv")
        return KVState(k, v, _unequal(positions, k.device))

    def bytes(self, tokens: int | None) -> int:
        """Memory that so many tokens need, in all rows together; None: that is held, with spare room."""
        if tokens is None:
            return self._k.nbytes + self._v.nbytes
        return 2 * tokens * self._k.shape[2] * self._k.shape[3] * self._k.element_size()


def _append(buffer: Tensor, new: Tensor, used: int, at: tuple[Tensor, Tensor] | None, capacity: int) -> Tensor:
    """A buffer with the `used` keys held, then `new`, or `new` where `at` (rows, places) says; without gradients it is
    the same one while there is room.
    """
    total = used + new.shape[1]
    if torch.is_grad_enabled() and (buffer.requires_grad or new.requires_grad):
        held = buffer[:, :used].to(new.dtype)
        if at is None:
            return torch.cat([held, new], 1)
        return F.pad(held, (0, 0, 0, 0, 0, new.shape[1])).index_put(at, new)
    if (room := buffer.shape[1]) < total or buffer.dtype != new.dtype:
        if room < total:
            room = capacity if capacity >= total else total + min(max(total, GROWTH[0]), GROWTH[1])
        # zeros: a key that is masked counts nothing only if it is finite
        larger = new.new_zeros(len(buffer), room, *buffer.shape[2:])
        larger[:, :used] = buffer[:, :used]
        buffer = larger
    if at is None:
        buffer[:, used:total] = new
    else:
        buffer[at] = new
    return buffer


def _stacked(parts: list[Tensor]) -> Tensor:
    """parts (b_i s_i g p), one behind the other, those of few keys with zeros behind them."""
    rows, most = sum(map(len, parts)), max(part.shape[1] for part in parts)
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    stacked = parts[0].new_zeros(rows, most, *parts[0].shape[2:], dtype=dtype)
    for part in reversed(parts):
        rows -= len(part)
        stacked[rows:rows + len(part), :part.shape[1]] = part
    return stacked


def _unequal(positions: Tensor, device: torch.device) -> Tensor | None:
    """`positions` on `device` if they differ from each other."""
    return None if equal(positions) else positions.to(device)


def longest(positions: Tensor) -> int:
    return int(positions.max()) if len(positions) else 0


def equal(positions: Tensor) -> bool:
    return not len(positions) or bool((positions == positions[0]).all())


LayerState = KVState | SSMState | None
