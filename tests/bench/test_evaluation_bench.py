"""The evaluation's bench: requests of the stated shapes, and a peer that agrees or stops it."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest

from hinny.bench import bench
from hinny.bench.eval_items import CASES
from hinny.bench.eval_peer import HFLM
from hinny.errors import BackendError, ConfigError

SMALL = ["model.d_model=32", "model.vocab_size=320", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
         "model.attention.head_dim=16", "model.mamba2.d_state=8", "model.mlp.d_ff=48"]


def _bench(case: str, **options: Any) -> dict[str, dict[str, Any]]:
    with warnings.catch_warnings():
        # of the packages that HFLM imports
        warnings.simplefilter("ignore")
        rows = bench("eval", recipe="tiny-hybrid", overrides=SMALL, only=[case], **options)
    return {row["what"]: row for row in rows}


def test_requests_have_the_shapes_of_the_tasks() -> None:
    choices = CASES["choices"](np.random.default_rng(0), 256, items=3, length=100)
    assert len(choices) == 12
    assert len({r.context for r in choices}) == 3
    assert max(len(r.context) + len(r.continuation) for r in choices) <= 100 < 2 + max(
        len(r.context) + 31 for r in choices)
    shots = CASES["five-shot"](np.random.default_rng(0), 256, items=8, length=1)
    assert {len(r.continuation) for r in shots} == {1}
    assert len({r.context[:300] for r in shots}) == 4
    assert len({r.context for r in shots}) == 8


def test_a_case_tells_what_sharing_saves() -> None:
    found = _bench("five-shot", items=8)
    shots = CASES["five-shot"](np.random.default_rng(0), 256, items=8, length=4096)
    contexts = {r.context for r in shots}
    heads = 0  # what two questions have in common is read once
    ordered = sorted(contexts)
    for one, two in itertools.pairwise(ordered):
        heads += next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    read = sum(map(len, contexts)) - heads
    asked = sum(len(r.context) + 1 for r in shots)
    assert found["eval.tokens_saved"]["value"] <= asked / read
    assert found["eval.tokens_saved"]["value"] > 5
    assert found["eval.seconds"]["value"] > 0


def test_beside_lm_eval_the_same_requests_give_the_same_figures() -> None:
    found = _bench("choices", items=2, length=96, against="lm-eval")
    seconds = found["eval.seconds"]
    assert "HFLM" in seconds["peer"]
    assert "NemotronHForCausalLM" in seconds["peer"]
    assert seconds["ratio"] == pytest.approx(seconds["peer_value"] / seconds["value"])


def test_a_peer_that_disagrees_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    true = HFLM.score
    monkeypatch.setattr(HFLM, "score", lambda self, requests: [s + 0.1 for s in true(self, requests)])
    with pytest.raises(BackendError, match="nothing was timed"):
        _bench("choices", items=1, length=64, against="lm-eval")


def test_a_needle_is_read_and_written() -> None:
    found = _bench("needle", length=200)
    assert found["eval.seconds"]["value"] > found["eval.prompt_seconds"]["value"] > 0
    assert "length=200 written=128" in found["eval.seconds"]["shape"]


@pytest.mark.parametrize(("options", "message"), [
    ({"only": ["choices", "riddles"]}, "known: choices"), ({"against": "vllm"}, "lm-eval"),
    ({"only": ["needle"], "against": "lm-eval"}, "without a peer"), ({"items": 0}, r"items \(0\)"),
    ({"only": ["five-shot"], "length": 512}, "length \\(512\\) has no effect on five-shot"),
    ({"only": ["needle"], "items": 2}, "items .* no effect"), ({"batch": 8}, "no effect .* without against"),
    ({"only": ["needle"], "length": 128}, "need more"), ({"precision": "fp8"}, "fp32 or bf16")])
def test_what_cannot_be_timed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench("eval", recipe="tiny-hybrid", overrides=SMALL, **options)
