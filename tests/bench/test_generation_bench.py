"""`hinny bench generate`: of a run and of a recipe, through the engine's own runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from typer.testing import CliRunner

from hinny import counts, predict
from hinny.bench import bench
from hinny.bench.evaluation import random_model
from hinny.bench.generation_engine import WARM_UP, Ours
from hinny.bench.generation_rows import point_of
from hinny.cli import app
from hinny.config import load_recipe
from hinny.errors import ConfigError
from hinny.infer.limits import PAGE
from hinny.memory.quantised import quantised_bytes
from hinny.run import Run

SMALL = ["model.d_model=32", "model.mamba2.head_dim=16", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
         "model.attention.head_dim=16", "model.mlp.d_ff=48", "model.vocab_size=64"]


def _bench(**options: Any) -> list[dict[str, Any]]:
    return bench("generate", recipe="tiny-hybrid", overrides=SMALL, **options)


def _ours(recipe: str = "tiny-hybrid", piece: int = 32) -> Ours:
    model = random_model(load_recipe(recipe, SMALL), torch.device("cpu"), "fp32")
    return Ours(model, state=torch.float32, piece=piece)


def test_every_kind_of_point_has_its_row() -> None:
    made = _bench(contexts=[16, 200], batch=[1, 2], prefill=[40], prompts=[20], tokens=3, piece=16)
    decoded = [(point_of(row).batch, point_of(row).context) for row in made if row["what"] == "decode"]
    assert decoded == [(1, 16), (2, 16), (1, 200), (2, 200)]  # the smallest first
    for row in made:
        assert row["value"] > 0
        if row["what"] == "decode":
            assert row["low"] <= row["value"] <= row["high"]
            copy = next(one["value"] for one in made if one["what"] == "decode.copy_rate")
            point = point_of(row)
            moved = predict.decode_bytes(point.model, point.batch, point.context, dtype_bytes=4)
            assert row["bound"] == pytest.approx(point.batch * copy * 1e12 / moved)
    assert [row["what"] for row in made].count("prefill") == 1
    assert [row["what"] for row in made].count("answer") == 2


def test_a_command_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINNY_COMMIT", "0123abc")
    from hinny.run import commit

    commit.cache_clear()
    try:
        file = tmp_path / "rows.json"
        once, killed = Ours.decode, []

        def decode(self: Ours, batch: int, context: int, tokens: int) -> list[float]:
            killed.append(context)
            if len(killed) == 2:
                raise KeyboardInterrupt
            return once(self, batch, context, tokens)

        monkeypatch.setattr(Ours, "decode", decode)
        command = ["bench", "generate", "--recipe", "tiny-hybrid", "--contexts", "8,16", "--tokens", "2", "--save",
                   str(file), *SMALL]
        assert CliRunner().invoke(app, command).exit_code != 0
        first = json.loads(file.read_text())
        assert {point_of(row).context for row in first if row["what"] == "decode"} == {8}
        assert CliRunner().invoke(app, command).exit_code == 0
        assert killed == [8, 16, 16]
        after = json.loads(file.read_text())
        assert after[:len(first)] == first
        assert {point_of(row).context for row in after if row["what"] == "decode"} == {8, 16}
    finally:
        commit.cache_clear()


def test_a_step_is_of_all_sequences_at_the_context_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seen = _ours(), []
    once = ours._pools

    def pools(batch: int, tokens: int) -> Any:
        runner, pages = once(batch, tokens)
        run = runner.run
        monkeypatch.setattr(runner, "run", lambda parts: seen.append(parts) or run(parts))
        return runner, pages

    monkeypatch.setattr(ours, "_pools", pools)
    assert len(ours.decode(batch=3, context=100, tokens=5)) == 5
    assert len(seen) == WARM_UP + 5
    timed = seen[WARM_UP:]
    assert [part.start for part in timed[2]] == [100, 100, 100]  # the middle one of five
    pages = [set(part.pages) for part in timed[0]]
    assert all(len(own) * PAGE >= timed[-1][0].start + 1 for own in pages)
    assert len(set().union(*pages)) == sum(map(len, pages))  # no page is shared


def test_pages_and_states_are_filled_before_a_step() -> None:
    ours = _ours()
    runner, _ = ours._pools(2, 100)
    ours._fill(runner)
    for tensor in runner.pool.tensors():
        assert tensor.float().std() > 0.5


@pytest.mark.parametrize("recipe", ["tiny-hybrid", "tiny-mamba2", "tiny-transformer", "tiny-mamba"])
def test_a_prompt_in_pieces_is_read_as_the_model_reads_it(recipe: str) -> None:
    overrides = [one for one in SMALL if recipe == "tiny-hybrid" or one.startswith(("model.d_m", "model.v"))]
    if recipe == "tiny-mamba2":
        overrides.append("model.mamba2.head_dim=16")
    model = random_model(load_recipe(recipe, overrides), torch.device("cpu"), "fp32")
    prompt = list(range(40))
    expected = model(torch.tensor([prompt]))[0, -1]
    ours = Ours(model, state=torch.float32, piece=16)
    torch.testing.assert_close(ours.logits(prompt), expected, rtol=1e-4, atol=1e-4)


def test_answers_are_as_long_as_asked_for() -> None:
    ours = _ours()
    assert len(ours.answer(batch=3, length=20, tokens=4, repeats=2)) == 2


@pytest.mark.parametrize(("options", "said"), [
    ({}, "nothing to time"), ({"contexts": [0]}, "contexts is 0"), ({"contexts": [8], "batch": [2, 0]}, "batches is 0"),
    ({"contexts": [8], "against": "vllm"}, "known: transformers, transformers-static"),
    ({"prefill": [8], "against": "transformers"}, "of decode points"),
    ({"contexts": [8], "peer_context": 4}, "of decode points"),
    ({"contexts": [8], "tensor": 2, "against": "transformers"}, "on one GPU"),
    ({"contexts": [8], "tensor": 2}, "there are 1 processes"),
    ({"contexts": [8], "precision": "fp16"}, "precision is 'fp16'"),
    ({"contexts": [8], "precision": "int8", "against": "transformers"}, "whole weights"),
    ({"contexts": [8], "state_dtype": "int8"}, "state_dtype is 'int8'"),
    ({"contexts": [8], "repeats": 2}, "repeats"), ({"contexts": [8], "run": "x"}, "one of the three"),
])
def test_options_act_or_raise(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _bench(**options)


def test_projections_in_eight_bits_are_fewer_bytes_and_say_so() -> None:
    pytest.importorskip("torchao")
    rows = {precision: _bench(contexts=[16], tokens=2, precision=precision) for precision in ("bf16", "int8")}
    moved = {precision: next(row["value"] for row in made if row["what"] == "decode.bytes")
             for precision, made in rows.items()}
    model = point_of(rows["int8"][0]).model
    saved = counts.weight_bytes(model) - quantised_bytes(model, "int8", 2)
    assert moved["bf16"] - moved["int8"] == saved > 0
    assert all("precision=int8" in row["shape"] for row in rows["int8"])


def test_a_run_refuses_what_is_of_recipes(trained_run: Run) -> None:
    with pytest.raises(ConfigError, match="prefill has no effect on a run"):
        bench("generate", run=str(trained_run.path), prefill=[8])
    with pytest.raises(ConfigError, match="at one batch, not 2"):
        bench("generate", run=str(trained_run.path), batch=[1, 2])


def test_a_runs_rows_are_those_that_reports_read(trained_run: Run) -> None:
    made = bench("generate", run=str(trained_run.path), contexts=(8, 16), tokens=2, repeats=1, batch=[2])
    assert [(row["what"], *row["shape"].split()[:2]) for row in made] == [
        (what, f"context={context}", "batch=2") for context in (8, 16) for what in ("prefill", "decode", "state_bytes")]
    assert trained_run.rows("generate") == made


def test_a_peer_stands_in_the_rows_of_its_points() -> None:
    pytest.importorskip("transformers")
    made = _bench(contexts=[24], batch=[2], tokens=2, against="transformers-static", peer_context=8)
    (decode,) = [row for row in made if row["what"] == "decode"]
    assert decode["peer"].startswith("transformers ")
    assert decode["peer"].endswith("static cache, context 8")
    assert decode["ratio"] == pytest.approx(decode["value"] / decode["peer_value"])


def _cut(file: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    sizes = [one for one in SMALL if "n_kv_heads" not in one]
    return bench("generate", recipe="tiny-hybrid", tensor=2,
                 overrides=[*sizes, "model.attention.n_kv_heads=2", "model.mamba2.n_groups=2"],
                 contexts=[24], batch=[2], prefill=[20], prompts=[10], tokens=3, piece=8, save=Path(file))


def test_a_model_cut_over_processes_is_timed_on_all_and_told_by_the_first(tmp_path: Path) -> None:
    first, second = run_ranks(2, _cut, str(tmp_path / "rows.json"))
    assert second == []
    assert json.loads((tmp_path / "rows.json").read_text()) == first
    assert [row["what"] for row in first] == ["decode", "decode.floor_share", "decode.bytes", "decode.copy_rate",
                                              "prefill", "answer"]
    point = point_of(first[0])
    assert point.tensor == 2
    assert first[2]["value"] == predict.decode_bytes(point.model, 2, 24, dtype_bytes=4) // 2
