"""An embedding and a loss whose vocabulary is cut over ranks give what those of one process give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from hinny import ops
from hinny.config import ParallelConfig
from hinny.errors import BackendError
from hinny.parallel import vocabulary
from hinny.parallel.mesh import Mesh, share
from hinny.parallel.vocabulary import VocabularyEmbedding, VocabularyLoss

RANKS, V, D, T, ROWS = 2, 14, 6, 10, 4


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Part:
    """This rank's part of a loss, beside what one process makes of the whole."""

    def __init__(self) -> None:
        self.mesh = Mesh(ParallelConfig(tensor=RANKS))
        self.rank = self.mesh.index("tensor")
        self.loss = VocabularyLoss(self.mesh.group("tensor"))
        self.targets = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
        self.mask = torch.rand(2, T, generator=torch.Generator().manual_seed(3)) < 0.7

    def gap(self, mask: Tensor | None, z_loss: float | None, reduction: str = "sum", scale: float = 1.0,
            as_dtensor: bool = False) -> float:
        """The largest difference in losses and gradients."""
        x, weight = _normal(2, T, D, seed=0), scale * _normal(V, D, seed=1)
        targets = self.targets
        if mask is not None:
            # what does not count may be anything
            x[~mask], targets = torch.nan, targets.masked_fill(~mask, -100)
        here, whole_x = share(x, self.rank, RANKS, 1).clone().requires_grad_(), x.clone().requires_grad_()
        rows, whole_rows = share(weight, self.rank, RANKS, 0).clone(), weight.clone().requires_grad_()
        if as_dtensor:
            rows = DTensor.from_local(rows, self.mesh.along("tensor"), [Shard(0)], run_check=False)
        rows.requires_grad_()
        options: dict[str, Any] = {"reduction": reduction} | ({} if z_loss is None else {"z_loss": z_loss})
        mine = (self.loss.entropy if z_loss is None else self.loss.entropy_z)(here, rows, targets, mask, **options)
        ones = (ops.linear_cross_entropy if z_loss is None else ops.linear_cross_entropy_z)(
            whole_x, whole_rows, targets, mask, **options)
        total, z = (mine, None) if z_loss is None else mine
        expected, expected_z = (ones, None) if z_loss is None else ones
        (3 * total).backward()
        (3 * expected).backward()
        dweight = rows.grad.to_local() if as_dtensor else rows.grad
        gaps = [total - expected, here.grad - share(whole_x.grad, self.rank, RANKS, 1),
                dweight - share(whole_rows.grad, self.rank, RANKS, 0)]
        if z is not None:
            assert not z.requires_grad
            assert z > 0
            gaps.append(z - expected_z)
        return max((gap.abs().max() / scale).item() for gap in gaps)


class _Largest(TorchDispatchMode):
    """Remembers the most numbers that a new tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def _losses() -> dict[str, Any]:
    vocabulary.BLOCK, vocabulary.MIN_ROWS = 1, ROWS  # several blocks, the last one short
    part = Part()
    nothing = torch.zeros_like(part.mask)
    found = {"plain": part.gap(None, None), "mask": part.gap(part.mask, None),
             "z": part.gap(part.mask, 0.3), "DTensor": part.gap(part.mask, 0.3, as_dtensor=True),
             "mean": part.gap(part.mask, 0.3, "mean"), "huge": part.gap(None, None, scale=1e4)}
    x = _normal(2, T // RANKS, D, seed=3 + part.rank).requires_grad_()
    rows = _normal(V // RANKS, D, seed=6 + part.rank).requires_grad_()
    empty = part.loss.entropy(x, rows, part.targets, nothing)
    empty.backward()
    with torch.no_grad():
        quiet = part.loss.entropy(x, rows, part.targets, part.mask, reduction="sum")
    return {"gaps": found, "no rows": [empty.item(), x.grad.abs().max().item(), rows.grad.abs().max().item()],
            "quiet": quiet.requires_grad, "refused": _refused(part, x, rows), "memory": _memory(part),
            "bf16": _bf16(part), "embedding": _embedding(part)}


def _refused(part: Part, x: Tensor, rows: Tensor) -> list[str]:
    wrong = part.targets.clone()
    wrong[1, 4] = V
    said = []
    for call in (
            lambda: part.loss.entropy(x, rows, wrong),
            lambda: part.loss.entropy(x, rows, part.targets[:, :-1]),
            lambda: part.loss.entropy(x, rows, part.targets, part.mask.int()),
            lambda: part.loss.entropy_z(x, rows, part.targets, z_loss=0.0),
            lambda: part.loss.entropy(x, rows, part.targets, reduction="none")):
        with pytest.raises(ValueError, match="linear_cross_entropy") as refused:
            call()
        said.append(str(refused.value))
    with pytest.MonkeyPatch.context() as patch:
        # asked for as use_backend does, where no kernel could run
        patch.setattr(ops.backend, "_asked", "triton")
        with pytest.raises(BackendError) as kernels:
            part.loss.entropy(x, rows, part.targets)
    # as if it had never been refused, on any rank
    assert part.gap(wrong < V, None) < 1e-12
    return [*said, str(kernels.value)]


def _memory(part: Part) -> int:
    """The largest tensor on the way, of 2 x 48 tokens and 2 x 40 words."""
    x, rows = torch.zeros(2, 24, 4, requires_grad=True), torch.zeros(40, 4, requires_grad=True)
    with _Largest() as largest:
        part.loss.entropy(x, rows, torch.zeros(2, 48, dtype=torch.int64)).backward()
    return largest.numbers


def _bf16(part: Part) -> tuple[float, list[torch.dtype]]:
    """Under autocast: the difference to exact products, and the types of the loss and the gradients."""
    x, weight = _normal(2, T, D, seed=0).float(), _normal(V, D, seed=1).float()
    exact = ops.linear_cross_entropy(x, weight, part.targets)
    here, rows = (share(whole, part.rank, RANKS, dim).clone().requires_grad_() for whole, dim in ((x, 1), (weight, 0)))
    with torch.autocast("cpu", torch.bfloat16):
        total = part.loss.entropy(here.bfloat16(), rows, part.targets)
    total.backward()
    # it has rounded, and not much
    assert total != exact
    return abs(total / exact - 1).item(), [total.dtype, here.grad.dtype, rows.grad.dtype]


def _embedding(part: Part) -> dict[str, Any]:
    weight, outer = _normal(V, D, seed=4), _normal(2, T, D, seed=5)
    rows = DTensor.from_local(share(weight, part.rank, RANKS, 0).clone(), part.mesh.along("tensor"), [Shard(0)])
    layer = VocabularyEmbedding(nn.Parameter(rows), part.mesh.group("tensor"))
    x = layer(part.targets)
    (x * share(outer, part.rank, RANKS, 1)).sum().backward()
    whole = weight.clone().requires_grad_()
    expected = F.embedding(part.targets, whole)
    (expected * outer).sum().backward()
    gaps = [x - share(expected, part.rank, RANKS, 1), layer.weight.grad.full_tensor() - whole.grad]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(part.targets)
    for word in (-1, V):
        with pytest.raises(IndexError):
            layer(part.targets.masked_fill(part.targets == part.targets[0, 0], word))
    return {"gap": max(gap.abs().max().item() for gap in gaps), "dtype": narrow.dtype,
            "rounded": torch.equal(narrow, share(expected, part.rank, RANKS, 1).bfloat16())}


def test_two_ranks_with_half_of_the_words_each_are_one_process() -> None:
    for found in run_ranks(RANKS, _losses):
        assert all(gap < 1e-12 for gap in found["gaps"].values()), found["gaps"]
        assert found["no rows"] == [0, 0, 0]
        assert not found["quiet"]
        wrong, length, mask, z_loss, reduction, kernels = found["refused"]
        assert f"to {V}; they must lie in [0, {V})" in wrong
        assert "targets has shape (2, 9)" in length
        assert "must be torch.bool" in mask
        assert "z_loss is 0.0" in z_loss
        assert "'mean' or 'sum'" in reduction
        assert "triton" in kernels
        # four rows of half of the words, not even the gathered hidden states' 96 x 4
        assert found["memory"] <= 96 * 4
        assert found["bf16"][0] < 1e-2
        assert found["bf16"][1] == [torch.float32] * 3
        assert found["embedding"] == {"gap": found["embedding"]["gap"], "dtype": torch.bfloat16, "rounded": True}
        assert found["embedding"]["gap"] < 1e-12
