"""What the launches of one SSD call share: its sizes, their launch configurations, the decays."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hinny.ops.inputs import pad_documents
from hinny.ops.kernels import ssd_forward
from hinny.ops.kernels.launches import launch
from hinny.ops.kernels.waves import processors

HEADS_A_PROGRAM = 16
"""Heads that one program of `ssd_prepare` and `ssd_finish` takes: it reads dt (b t h) 32 bytes wide in bf16."""

SLOTS_A_PROCESSOR = 2
"""Programs of `hopper_forward` that a multiprocessor runs at once: each takes half of its registers."""

WORTH_SHARING = 1.15
"""How much longer whole walks must take, round by round, than equal shares of them all."""

NEAR = 25 * 2 ** 20
"""Bytes of B and C that stay in a Hopper GPU's L2 cache, half of its 50 MB. With shares the heads of a group no longer
read the same chunk at the same time; x and y pass through the cache in between."""


class Call:
    """The sizes of a call whose chunks are as long as the launch of `kernel` says."""

    def __init__(self, kernel: str, x: Tensor, B: Tensor) -> None:
        self.b, self.t, self.h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.device, self.bits = x.device, x.element_size() * 8
        self.Q = self.launch(kernel)["Q"]
        self.chunks = triton.cdiv(self.t, self.Q)
        self.precision = "ieee" if torch.version.hip else "tf32x3"  # of products of float32; others are exact
        self.tiles = dict(H=self.h, G=self.g, P=self.p, N=self.n, BN=tile(self.n), Q=self.Q, EVEN=self.t % self.Q == 0,
                          PRECISION=self.precision)

    def launch(self, kernel: str) -> dict[str, int]:
        """The launch configuration of `kernel` for these sizes."""
        return launch(kernel, self.device, p=self.p, n=self.n, bits=self.bits)

    def walk(self, kernel: str, walks: int) -> tuple[dict[str, int], int, int]:
        """A walk's launch; the parts that it is made in, so that there are about PROGRAMS programs, none shorter than
        SHORTEST chunks; chunks a part. `walks` is the number of walks if each is made in one part."""
        use = self.launch(kernel)
        parts = max(1, min(use.pop("PROGRAMS") // walks, self.chunks // use.pop("SHORTEST")))
        use.pop("Q", None)
        part_chunks = triton.cdiv(self.chunks, parts)
        return use, triton.cdiv(self.chunks, part_chunks), part_chunks

    def share(self, blocks: int) -> int:
        """Chunks for each program that a GPU runs at once, if they had better take equal shares of all walks; else 0.

        A head is walked in `blocks`.
        """
        if 2 * self.b * self.t * self.g * self.n * (self.bits // 8) > NEAR:
            return 0
        return equal_share(self.b * self.h * blocks, self.chunks, SLOTS_A_PROCESSOR * processors(self.device))

    def prepare(
        self, dt: Tensor, dt_bias: Tensor | None, A: Tensor, softplus: bool, documents: Tensor | None,
        flags: Tensor | None = None,
    ) -> Tensor:
        """Steps, and sums of log2 decays within chunks, with gaps between documents: (2 b h c*q) float32.

        Fills flags (b h) int64 with zeros: two of 32 bits for the walks of a head, which has no more than 128 columns.
        """
        decays = torch.empty(2, self.b, self.h, self.chunks * self.Q, dtype=torch.float32, device=self.device)
        grid = (self.b * self.chunks, triton.cdiv(self.h, HEADS_A_PROGRAM))
        ssd_forward.ssd_prepare[grid](dt, dt_bias, A, documents, decays[0], decays[1], flags, self.t, self.chunks,
                                      dt.stride(1), H=self.h, Q=self.Q, BH=HEADS_A_PROGRAM, SOFTPLUS=softplus,
                                      num_warps=4)
        return decays

    def split(self, want: int) -> int:
        """Programs that share the heads of a group, so that there are about `want` of them: a divisor of them."""
        heads, programs = self.h // self.g, self.b * self.chunks * self.g
        return next(split for split in range(1, heads + 1)
                    if heads % split == 0 and (programs * split >= want or split == heads))

    def padded(self, documents: Tensor | None) -> Tensor | None:
        """Documents (b t) → (b c*q): the padding belongs to the last one."""
        padding = self.chunks * self.Q - self.t
        return documents if documents is None or not padding else pad_documents(documents, padding)


def equal_share(walks: int, chunks: int, slots: int) -> int:
    """Chunks for each of `slots` programs of a line of `walks` with `chunks` each; 0 if whole walks take hardly longer.

    Never fewer than a walk has. Beginning or ending a walk costs a program about as much as a chunk.
    """
    length = triton.cdiv(walks * chunks, slots)
    return length if walks > slots and triton.cdiv(walks, slots) * chunks > WORTH_SHARING * (length + 1) else 0


def tile(size: int) -> int:
    """The width of a tile that holds `size` columns: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))
