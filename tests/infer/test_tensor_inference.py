"""Ranks that share a model find what one process finds, with their share of its memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from converted_runs import converted, values_of
from ranks import run_ranks
from small import small_config, small_model
from torch import Tensor

from hinny.checkpoint.store import load_model
from hinny.errors import BackendError, ConfigError
from hinny.infer.head import logits
from hinny.infer.precision import to_bfloat16
from hinny.infer.sums import Sums
from hinny.infer.tensor import Head, load_tensor, random_model, tensor_parallel
from hinny.model import Model
from hinny.parallel.plan import PLAN
from hinny.run import Run

V, WORDS = 36, 33
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("1", {"tie_embeddings": True}),
    "mamba-2": ("M", {}),
    "transformer": ("*-", {"norm": "layernorm1p"}),
    "hybrid": ("M-M*-", {"mlp": {"d_ff": 24, "activation": "swiglu"}, "tie_embeddings": True}),
    "without positions": ("1*M-", {"attention": dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="none")}),
}
IN_THREES = ("1M*-", {
    "mamba2": dict(d_state=8, head_dim=8, n_groups=3, n_heads=6, d_conv=4, chunk_len=4), "d_model": 12,
    "attention": dict(n_heads=6, n_kv_heads=3, head_dim=8, positions="rope", rope_fraction=0.5, rope_base=10000.0)})
PIECES = (5, 2, 1, 1, 1)


def _sums() -> Sums:
    return Sums(dist.group.WORLD, torch.device("cpu"))


def _both(pattern: str, changes: dict[str, Any], sums: Sums) -> tuple[Model, Model]:
    """A model, and this rank's part of the same one."""
    whole = small_model(pattern, vocab_size=V, **changes).eval().requires_grad_(False)
    part = copy.deepcopy(whole)
    tensor_parallel(part, sums)
    return whole, part


def _gap(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _continued(whole: Model, part: Model, sums: Sums) -> float:
    """The largest difference of logits over a prompt in pieces and single tokens, and of what follows a fork of rows
    at different positions.
    """
    tokens = torch.randint(V, (3, sum(PIECES)), generator=torch.Generator().manual_seed(0))
    head = Head(part, WORDS, sums)
    states = whole.init_state(3), part.init_state(3)
    gaps = []

    def step(piece: Tensor) -> None:
        expected, hidden = whole.hidden(piece, states[0]), part.hidden(piece, states[1])
        gaps.append(_gap(hidden, expected))
        gaps.append(_gap(head(hidden.flatten(0, 1)), logits(expected.flatten(0, 1), whole.output_weight[:WORDS])))

    for piece in tokens.split(PIECES, 1):
        step(piece)
    states = states[0].select(torch.tensor([2, 0])), states[1].select(torch.tensor([2, 0]))
    step(tokens[:2, :1])
    return max(gaps)


def _share(whole: Model, ranks: int) -> int:
    """Numbers that the plan leaves to one of so many ranks."""
    names = {f"layers.{i}.layer.{name}" for i, symbol in enumerate(whole.config.pattern) for name in PLAN[symbol]}
    names |= {"embedding.weight", "head.weight"}
    return sum(p.numel() // (ranks if name in names else 1) for name, p in whole.named_parameters())


def _facts(families: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sums = _sums()
    for name, (pattern, changes) in families.items():
        whole, part = _both(pattern, changes, sums)
        stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in part.parameters()}
        state, states = part.init_state(2), whole.init_state(2)
        for one, tokens in ((part, state), (whole, states)):
            one.hidden(torch.zeros(2, 3, dtype=torch.int64), tokens)
        found[name] = {"gap": _continued(whole, part, sums), "held": sum(stored.values()) / 8,
                       "planned": _share(whole, sums.size), "state": state.bytes() * sums.size == states.bytes(),
                       "names": list(dict(part.named_parameters())) == list(dict(whole.named_parameters())),
                       "gradients": any(p.requires_grad for p in part.parameters())}
    return found


def _two(run: str, converted: str) -> dict[str, Any]:
    sums = _sums()
    return {"families": _facts(FAMILIES), "refused": _refused(sums), "random": _random(sums),
            "loaded": _loaded(run, sums), "converted": _converted(converted, sums), "bf16": _in_bf16(sums),
            "one-shot": _one_shot(),
            "gathered": sums.gather(torch.full((2, 3), sums.rank)).tolist(),
            "summed": sums(torch.full((2, 3), 1. + sums.rank)).unique().tolist()}


def _three() -> dict[str, Any]:
    return _facts({"in threes": IN_THREES})


def _refused(sums: Sums) -> list[str]:
    """Messages for models that two ranks cannot share, which are as before."""
    said = []
    for pattern, changes in (("M", {"vocab_size": 37}), ("*", {"attention": dict(
            n_heads=3, n_kv_heads=3, head_dim=8, positions="none")})):
        model = small_model(pattern, **{"vocab_size": V} | changes)
        before = {name: p.shape for name, p in model.named_parameters()}
        with pytest.raises(ConfigError) as refused:
            tensor_parallel(model, sums)
        assert {name: p.shape for name, p in model.named_parameters()} == before
        assert not any(block.layer._forward_hooks for block in model.blocks)
        said.append(str(refused.value))
    return said


def _random(sums: Sums) -> dict[str, Any]:
    """A part that was never whole: shapes and types as of one that was cut, numbers of a model, other ones per rank."""
    pattern, changes = FAMILIES["hybrid"]
    _, part = _both(pattern, changes, sums)
    made = random_model(small_config(pattern, vocab_size=V, **changes), sums)
    hidden = made.hidden(torch.arange(6)[None])
    first = made.embedding.weight.float()
    return {"shapes": [p.shape for p in made.parameters()] == [p.shape for p in part.parameters()],
            "types": {name.split(".")[-2]: p.dtype for name, p in made.named_parameters()},
            "std": first.std().item(), "finite": hidden.isfinite().all().item(), "first": first[0, 0].item()}


def _loaded(run: str, sums: Sums) -> dict[str, Any]:
    """The logits of a run's model, from its part, in float32."""
    tokens = torch.arange(9)[None]
    whole, part = load_model(Run(run)), load_tensor(Run(run), sums)
    short = load_tensor(Run(run), sums, "bf16")
    with torch.no_grad():
        expected = logits(whole.hidden(tokens)[0], whole.output_weight)
        found = Head(part, len(whole.output_weight), sums)(part.hidden(tokens)[0])
    return {"gap": _gap(found, expected), "bf16": short.embedding.weight.dtype, "norm": short.norm.weight.dtype}


def _converted(run: str, sums: Sums) -> dict[str, Any]:
    """Of a conversion, the types that it stores, its numbers, and nothing that keeps more of it alive."""
    whole, part = load_model(Run(run), dtype="stored"), load_tensor(Run(run), sums, "stored")
    mine = copy.deepcopy(whole)
    tensor_parallel(mine, sums)
    pairs = list(zip(part.named_parameters(), mine.parameters(), strict=True))
    return {"equal": all(torch.equal(found, wanted) for (_, found), wanted in pairs),
            "types": {found.dtype for (_, found), _ in pairs} == {p.dtype for p in whole.parameters()},
            "bytes": sum(p.untyped_storage().nbytes() for p in part.parameters())
            == sum(p.nbytes for p in mine.parameters())}


def _in_bf16(sums: Sums) -> dict[str, Any]:
    """Logits of bfloat16 weights: their type, and how far they are from those of one process, which rounds too."""
    whole, part = (model.float() for model in _both("M-M*-", {}, sums))
    to_bfloat16(whole)
    to_bfloat16(part)
    tokens = torch.arange(6)[None]
    expected, found = whole.hidden(tokens)[0], part.hidden(tokens)[0]
    return {"hidden": found.dtype, "gap": ((found.float() - expected.float()).norm() / expected.float().norm()).item(),
            "logits": Head(part, WORDS, sums)(found).dtype}


def _one_shot() -> str:
    with pytest.raises(BackendError) as refused:
        Sums(dist.group.WORLD, torch.device("cpu"), "one-shot")
    return str(refused.value)


def _check(families: dict[str, Any]) -> None:
    for name, facts in families.items():
        assert facts["gap"] < 1e-9, (name, facts)
        assert facts["held"] == facts["planned"], (name, facts)
        assert facts["state"], name
        assert facts["names"], name
        assert not facts["gradients"], name


def test_two_ranks_answer_as_one_process(even_run: Run, tmp_path: Path) -> None:
    firsts, config = set(), small_config("M-*1", vocab_size=V)
    released = converted(tmp_path / "released", values_of(config), config=config)
    for found in run_ranks(2, _two, str(even_run.path), str(released.path)):
        _check(found["families"])
        assert "model.vocab_size (37)" in found["refused"][0]
        assert "model.attention.n_kv_heads (3)" in found["refused"][1]
        assert found["random"]["shapes"]
        assert found["random"]["finite"]
        assert found["random"]["types"]["embedding"] == found["random"]["types"]["out_proj"] == torch.bfloat16
        assert found["random"]["types"]["norm"] == torch.float32
        assert 0.2 < found["random"]["std"] < 0.4  # init_std is 0.3
        assert found["loaded"] == {"gap": pytest.approx(0, abs=1e-5), "bf16": torch.bfloat16, "norm": torch.float32}
        assert found["converted"] == {"equal": True, "types": True, "bytes": True}
        # products of 8 bits
        assert found["bf16"]["gap"] < 0.05
        assert found["bf16"]["hidden"] == torch.bfloat16
        assert found["bf16"]["logits"] == torch.float32
        assert "the ranks work on cpu" in found["one-shot"]
        assert found["gathered"] == [[0, 0, 0, 1, 1, 1]] * 2
        assert found["summed"] == [3.0]
        firsts.add(found["random"]["first"])
    assert len(firsts) == 2


def test_three_ranks_share_groups_of_heads_in_threes() -> None:
    for found in run_ranks(3, _three):
        _check(found)
