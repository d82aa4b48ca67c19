"""Recomputation: the same gradients, less kept, and matrix products no more often than they must."""

from __future__ import annotations

import pytest
import torch
from live_bytes import Live, products
from ranks import run_ranks
from small import PATTERNS, small_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hinny import counts
from hinny.config import ModelConfig, ParallelConfig
from hinny.errors import ConfigError
from hinny.model import Model
from hinny.objective import Objective
from hinny.parallel.apply import parallelize
from hinny.parallel.context import own
from hinny.parallel.mesh import Mesh
from hinny.parallel.recompute import apply_recompute

MODES = ["full", "selective"]
SWIGLU = {"mlp": {"d_ff": 24, "activation": "swiglu"}}
RELU2 = {"mlp": {"d_ff": 24, "activation": "relu2"}}


def _batch(packed: bool, length: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    numbers = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(37, (2, 2, length), generator=numbers)
    mask = torch.rand(2, length, generator=numbers) < 0.8
    segments = torch.tensor([0] * 7 + [1] * 3 + [2] * (length - 10)).expand(2, length) if packed else None
    return tokens, targets, mask, segments


def _objective(pattern: str, mode: str | list[str] | None, **changes: dict) -> Objective:
    objective = Objective(small_model(pattern, **changes))
    if mode is not None:
        apply_recompute(objective, mode)
    return objective


def _gradients(objective: Objective, packed: bool) -> dict[str, Tensor]:
    objective.zero_grad()
    loss, _ = objective(*_batch(packed))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in objective.named_parameters()}


CASES = [*((pattern, {}) for pattern in PATTERNS), ("*-", SWIGLU), ("M-", RELU2)]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("pattern", "changes"), CASES)
def test_gradients_are_the_same_bits(pattern: str, changes: dict, packed: bool) -> None:
    expected = _gradients(_objective(pattern, None, **changes), packed)
    for mode in [*MODES, [pattern[0]]]:
        found = _gradients(_objective(pattern, mode, **changes), packed)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("mode", MODES)
def test_passes_may_follow_and_lie_within_each_other(mode: str) -> None:
    # accumulation, as between pipeline stages: two forwards, then their backwards in either order
    plain, changed = _objective("M-M*-", None), _objective("M-M*-", mode)
    for objective in (plain, changed):
        first, second = (objective(*_batch(packed))[0] for packed in (False, True))
        first.backward()
        second.backward(retain_graph=True)
        second.backward()
        with torch.no_grad():
            objective(*_batch(True))
    for p, q in zip(plain.parameters(), changed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def _kept(objective: Objective) -> tuple[int, int]:
    """Bytes that blocks keep, and matrix products of a pass forward and backward."""
    with Live() as live:
        hidden = objective.model.hidden(_batch(False)[0])
        kept = live.settle()
        hidden.sum().backward()
    return kept, products(live)


@pytest.mark.parametrize("pattern", ["1", "M", "*-", "M-M*-"])
def test_less_is_kept_and_selective_makes_each_matrix_product_once(pattern: str) -> None:
    (all_kept, once), (few, twice), (some, still_once) = (_kept(_objective(pattern * 2, mode))
                                                          for mode in (None, *MODES))
    assert few < some < all_kept
    assert still_once == once < twice


def _product_flops(objective: Objective) -> int:
    """FLOPs of a token's matrix products, forward and backward, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counted:
        objective(*_batch(False, 24))[0].backward()
    return counted.get_flop_counts()["Global"][torch.ops.aten.mm] // 48


@pytest.mark.parametrize("mode", ["full", "selective", ["*"], ["1", "-"]], ids=str)
def test_flops_that_are_counted_as_computed_again_are(mode: str | list[str]) -> None:
    config = small_model("1*M-").config
    found = _product_flops(_objective("1*M-", mode)) - _product_flops(_objective("1*M-", None))
    # what mixes tokens and the convolutions' 2 w per channel are no matrix products of the layers' weights
    others = {symbol: counts.layer(config, symbol).mixing(24) for symbol in "1*M-"}
    others["1"] += 2 * 4 * 32
    others["M"] += 2 * 4 * (32 + 2 * 2 * 8)
    kinds = {"full": "1*M-", "selective": ""}[mode] if isinstance(mode, str) else mode
    expected = found + sum(others[symbol] for symbol in kinds)
    assert counts.recomputed_flops(config, 24, ParallelConfig(recompute=mode)) == expected


def test_a_layer_keeps_what_the_mode_says_and_no_more() -> None:
    b, t, d, f = 2, 23, 16, 24
    unit = 8 * b * t
    # beside the blocks: the embedded tokens, the last norm's x, gated x and scale, what comes out, its upcast weight
    before = [_kept(_objective("-" * n, "full"))[0] for n in (1, 3)]
    assert before[1] - before[0] == 2 * unit * d
    # selective: the input, and what `up` gives
    before = [_kept(_objective("-" * n, "selective"))[0] for n in (1, 3)]
    assert before[1] - before[0] == 2 * unit * (d + f)


def test_only_blocks_of_the_kinds_named_are_recomputed() -> None:
    model = _objective("M-M*-", ["M", "*"]).model
    assert ["forward" in vars(block) for block in model.blocks] == [True, False, True, True, False]
    with pytest.raises(ConfigError, match=r"parallel\.recompute names 1 \(Mamba-1\), which is not in model\.pattern"):
        _objective("M-M*-", ["M", "1"])


def test_names_stay_and_a_model_on_meta_can_be_changed() -> None:
    plain = small_model("1*M-")
    with torch.device("meta"):
        model = Model(plain.config)
    objective = Objective(model)
    apply_recompute(objective, "selective")
    assert list(model.state_dict()) == list(plain.state_dict())
    objective.double().to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    expected, found = _gradients(Objective(plain), True), _gradients(objective, True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_the_same_when_a_layer_runs_again(mode: str) -> None:
    found = []
    for objective in (_objective("1*M-", None), _objective("1*M-", mode)):
        objective.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = objective(*_batch(False))
        loss.backward()
        found.append([p.grad for p in objective.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_carried_without_gradients_and_refused_with_them(mode: str) -> None:
    plain, model = small_model("M-M*-"), _objective("M-M*-", mode).model
    tokens = _batch(False)[0]
    with torch.no_grad():
        assert torch.equal(model(tokens, model.init_state(2)), plain(tokens, plain.init_state(2)))
    with pytest.raises(ValueError, match="recomputed cannot carry a state"):
        model(tokens, model.init_state(2))


def test_what_mixes_tokens_runs_once_where_it_was_replaced_too() -> None:
    runs = []

    def mix(*args: object, **options: object) -> object:
        runs.append(1)
        return small_model("M").blocks[0].layer.mix(*args, **options)

    config: ModelConfig = small_model("M").config
    objective = Objective(Model(config))
    objective.model.init_weights(0)
    objective.double().model.blocks[0].layer.mix = mix
    apply_recompute(objective, "selective")
    _gradients(objective, True)
    assert len(runs) == 1


def _on_ranks() -> list[str]:
    """Cut over two ranks, parameters whose gradients change with recomputation."""
    changed = []
    sizes = {"mamba2": dict(d_state=8, head_dim=8, n_groups=2, expand=2, d_conv=4, chunk_len=4), "vocab_size": 38}
    for config in (ParallelConfig(shard=2), ParallelConfig(tensor=2), ParallelConfig(context=2)):
        mesh, found = Mesh(config), []
        tokens, targets, mask, segments = _batch(True, 24)
        if mesh.size("context") > 1:
            tokens, targets, mask = (own(part, mesh) for part in (tokens, targets, mask))
        for mode in (None, *MODES):
            objective = Objective(small_model("1*M-", **sizes))
            parallelize(objective, mesh, config.model_copy(update={"recompute": mode}))
            for _ in range(2):
                objective(tokens, targets, mask, segments)[0].backward()
            found.append({name: p.grad.to_local() for name, p in objective.named_parameters()})
        changed += [f"{config} {name}" for gradients in found[1:] for name, grad in gradients.items()
                    if not torch.equal(grad, found[0][name])]
    return changed


def test_models_cut_over_ranks_have_the_same_gradients() -> None:
    assert run_ranks(2, _on_ranks) == [[], []]
