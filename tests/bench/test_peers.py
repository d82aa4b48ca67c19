"""Against transformers, an independent implementation: the same weights give the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small_config

from hinny.bench import bench
from hinny.bench.peers import transformers_twin
from hinny.errors import ConfigError
from hinny.model import Model

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about absent CUDA kernels

GROUPED = dict(d_state=8, head_dim=8, n_groups=2, expand=2, d_conv=4, chunk_len=8)
WIDE = {key: value for key, value in GROUPED.items() if key != "expand"} | dict(n_heads=5, n_groups=1)
"""40 channels in a model 16 wide: no whole `expand`."""
CASES: dict[str, dict[str, Any]] = {
    "mamba": dict(pattern="11"),
    "mamba2": dict(pattern="MM", mamba2=GROUPED | dict(n_groups=1)),
    "transformer": dict(pattern="*-*-", norm="layernorm1p", mlp=dict(d_ff=24, activation="relu2")),
    "hybrid": dict(pattern="M-M*-", mamba2=GROUPED, attention=dict(n_heads=4, n_kv_heads=2, head_dim=8,
                                                                    positions="none")),
    "tied": dict(pattern="M-M-", tie_embeddings=True, mamba2=GROUPED),
    "wide": dict(pattern="M-", mamba2=WIDE | dict(n_groups=5)),
}
TOKENS = torch.randint(37, (2, 21), generator=torch.Generator().manual_seed(3))


def _model(**changes: Any) -> Model:
    model = Model(small_config(**changes))
    model.init_weights(1)
    # random gains and biases, so that none can be left out unseen
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("D"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str) -> None:
    model = _model(**CASES[case])
    twin = transformers_twin(model)
    ours, theirs = model(TOKENS), twin(TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.detach().abs().max()))
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    embedded = next(p for n, p in twin.named_parameters() if "embed" in n)
    torch.testing.assert_close(model.embedding.weight.grad, embedded.grad, rtol=0,
                               atol=1e-4 * float(embedded.grad.abs().max()))


def test_greedy_generation_equals_transformers() -> None:
    model = _model(**CASES["hybrid"])
    twin = transformers_twin(model)
    state, piece, ours = model.init_state(2), TOKENS, []
    with torch.no_grad():
        for _ in range(6):
            piece = model(piece, state)[:, -1:].argmax(-1)
            ours.append(piece)
        theirs = TOKENS
        for _ in range(6):
            theirs = torch.cat([theirs, twin(theirs).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.cat(ours, dim=1), theirs[:, 21:])


@pytest.mark.parametrize("changes", [dict(pattern="MM", mamba2=GROUPED), dict(pattern="1M"),
                                     dict(pattern="MM", mamba2=WIDE), dict(pattern="*-"),
                                     dict(pattern="*-", norm="layernorm1p", attention=CASES["hybrid"]["attention"])])
def test_a_model_that_no_class_expresses_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be used with this recipe"):
        transformers_twin(_model(**changes))


def test_a_race_reports_both_sides() -> None:
    (row,) = bench("train", recipe="tiny-mamba2", steps=1, batch=1, length=16, against="transformers")
    assert row["what"] == "train"
    assert row["peer"].endswith("Mamba2ForCausalLM")
    assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])


@pytest.mark.parametrize("options", [dict(precision="fp64"), dict(against="fla"), dict(steps=0), dict(batch=0),
                                     dict(length=-5), dict(against="transformers", precision="bf16")])
def test_bench_options_act_or_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bench("train", recipe="tiny-mamba2", **options)


def test_an_unknown_bench_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: eval, generate, kernels, quality, train"):
        bench("kernel")
