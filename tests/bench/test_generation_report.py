"""docs/results/generation.md is what its rows say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hinny import predict
from hinny.bench.generation_claim import contests, section
from hinny.bench.generation_goals import CLAIM_CONTEXT, CONTEXTS, CURVE_BATCHES, SMALL
from hinny.bench.generation_report import main, render
from hinny.bench.generation_rows import point_of
from hinny.config import load_recipe
from hinny.run import row

HYBRID, MHA, GQA = "8b-hybrid", "8b-transformer", "8b-transformer model.attention.n_kv_heads=8"
MACHINE = "a processor, 16 cores, 128 GiB, NVIDIA {}, Python 3.11, torch 2.11"
NAMES = {"H100": "H100 80GB HBM3", "H200": "H200"}


def made(what: str, variant: str, value: float, shape: str, gpu: str | None = "H200", **more: Any) -> dict[str, Any]:
    found = row(what, variant, value, "tokens/s", shape=shape, command="a command", **more)
    machine = MACHINE.format(NAMES[gpu]) if gpu else "a processor, 2 cores, Python 3.11, torch 2.11"
    return found | {"machine": machine, "commit": "0123abc"}


def decoded(variant: str, value: float | None, *, context: int = 16384, batch: int = 32, tensor: int = 1,
            gpu: str | None = "H200", precision: str = "bf16", state: str = "fp32", **more: Any) -> dict[str, Any]:
    """A decode row, half as fast as its floor; without a value 0.8 times as fast as its data sheet says."""
    cut = f"tensor={tensor} " if tensor > 1 else ""
    where = f"gpus={tensor}" if gpu else "threads=1"
    shape = f"context={context} batch={batch} precision={precision} state={state} {cut}{where}"
    value = 0.8 * point_of(made("decode", variant, 1.0, shape, gpu)).predicted() if value is None else value
    return made("decode", variant, value, shape, gpu, low=0.9 * value, high=1.1 * value, bound=2 * value, **more)


ROWS = [decoded(HYBRID, 5000.0), decoded(GQA, 2000.0), decoded(HYBRID, 4900.0, context=65536),
        decoded(GQA, 700.0, context=65536), decoded(HYBRID, 9000.0, tensor=2, context=CLAIM_CONTEXT),
        decoded(MHA, 1200.0, tensor=2, context=CLAIM_CONTEXT)]


def everything() -> list[dict[str, Any]]:
    """Rows of all that was asked for, but of points that do not fit."""
    peer = {"peer": "transformers 5", "peer_value": 20.0, "ratio": 4.5}
    rows = [decoded(name, None, batch=batch, context=context, tensor=2) for name in (HYBRID, MHA)
            for batch in (1, 32) for context in (4096, CLAIM_CONTEXT)]
    for name in (HYBRID, GQA):
        for batch in CURVE_BATCHES:
            for context in CONTEXTS:
                one = decoded(name, None, batch=batch, context=context)
                fits = point_of(one).memory(24) < 141e9
                rows.append(one if fits else one | {"what": "decode.skipped", "value": 200.0, "unit": "GB"})
    rows += [decoded(name, None, batch=batch, context=context, gpu="H100", **(peer if name == HYBRID else {}))
             for name in (HYBRID, "8b-mamba2", MHA) for batch in (1, 32) for context in (1024, 4096)]
    prompt = "length=32768 batch=1 piece=4096 precision=bf16 state=fp32 gpus=1"
    rows += [made("prefill", HYBRID, 29_000.0, prompt, "H100"), made("prefill.mfu", HYBRID, 0.512, prompt, "H100"),
             made("answer", HYBRID, 900.0, "prompt=1024 batch=32 written=24 precision=bf16 gpus=1", "H100")]
    return rows + [decoded(name, 300.0, gpu=None, precision="fp32", batch=1, context=256, **peer) for name in SMALL]


@pytest.fixture(scope="module", autouse=True)
def _not_calibrated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "CALIBRATED", {})
        yield


@pytest.fixture(scope="module")
def full() -> tuple[str, dict[str, str]]:
    """The page of everything, and its pictures."""
    return render(everything())


def line_of(page: str, *cells: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return line


def test_the_claim_is_a_ratio_of_two_rows_beside_its_prediction_and_the_papers() -> None:
    page, _ = render(ROWS)
    line = line_of(page, "32", "16K", "fp32", "5,000", "2,000", "**2.50x**")
    hybrid, gqa = (predict.decode_bytes(model, 32, 16384) for model in _models())
    assert line.endswith(f"| {gqa / hybrid:.2f}x |")
    assert line_of(page, "32", "15K", "fp32", "9,000", "1,200", "**7.50x**").endswith("| up to 8x |")
    assert page.index("### Beside MHA, on 2 H200") < page.index("### Beside GQA-8, on 1 H200")


def _models() -> list[Any]:
    return [load_recipe(HYBRID).model, load_recipe(MHA, ["model.attention.n_kv_heads=8"]).model]


def test_a_hybrid_of_shorter_states_stands_beside_the_same_transformer() -> None:
    (contest,) = contests([*ROWS[:4], decoded(HYBRID, 6000.0, state="bf16")])
    assert [(pair.at.context, pair.states, pair.ratio) for pair in contest.pairs] == [
        (16384, "fp32", 2.5), (16384, "bf16", 3.0), (65536, "fp32", 7.0)]
    assert [pair.states for pair in contest.curves[32]] == ["fp32", "fp32"]


@pytest.mark.parametrize("other", [{"tensor": 2}, {"gpu": "H100"}, {"batch": 31}, {"context": 9}, {"precision": "fp32"},
                                   {"gpu": None}], ids=str)
def test_rows_of_different_points_are_no_pair(other: dict[str, Any]) -> None:
    assert contests([ROWS[0], decoded(GQA, 2000.0, **other)]) == []


def test_curves_are_drawn_by_batch_and_beside_the_papers_transformer_its_claim(
        full: tuple[str, dict[str, str]]) -> None:
    _, pictures = full
    assert {*pictures} == {"generation-mha-2xh200.svg", "generation-gqa-8-1xh200.svg", "generation-mha-1xh100.svg"}
    mha, gqa = (pictures[f"generation-{name}xh200.svg"] for name in ("mha-2", "gqa-8-1"))
    assert [mha.count(said) for said in ("batch 1<", "batch 32<", "paper: up to 8x")] == [1, 1, 1]
    assert [gqa.count(said) for said in ("batch 1<", "batch 8<", "batch 32<", "batch 64<", "paper")] == [1, 1, 1, 1, 0]
    assert render(ROWS)[1] == render(ROWS)[1] != {}  # every time the same
    assert render(ROWS[:2])[1] == {}  # one point is no curve


def test_the_grid_says_what_has_no_room_and_what_is_not_measured() -> None:
    page = "".join(map(section, contests([one for one in everything() if place_of(one) != (GQA, 8, 4096)])))
    heads, _, first, second = page[page.index("in brackets as predicted"):].splitlines()[2:6]
    assert heads == "|  | 1K | 4K | 16K | 32K | 128K |"
    assert first.count("**") == 10
    assert second.startswith("| batch 8 | **")
    assert "| not measured |" in second
    batch64 = next(line for line in page.splitlines() if line.startswith("| batch 64 |"))
    assert batch64.endswith("no room |")


def place_of(one: dict[str, Any]) -> tuple[str, int, int] | None:
    """Of a decode row: model, batch, context."""
    if one["what"] != "decode":
        return None
    point = point_of(one)
    return one["variant"], point.batch, point.context


def test_what_was_asked_for_is_said_of_all_rows(full: tuple[str, dict[str, str]]) -> None:
    page, _ = full
    asked = page[page.index("## What was asked"):page.index("## Up to 8x faster")]
    for said in ("| 2 H200 | 6x | 10x | **", " have no room |",
                 "batch 1: **50%** at 1K, **50%** at 4K; batch 32: **50%** at",
                 "batch 1: **4.50x** (transformers 5); batch 32: **4.50x**", "| 45% | 55% | **51.2%** |",
                 "off by **25.0%** at most, on one GPU 25.0%; 0 of ", "tiny-hybrid **4.50x**",
                 "130m-transformer **4.50x**"):
        assert said in asked, said
    assert "not measured" not in asked


def test_what_has_no_rows_is_not_measured() -> None:
    asked = render(ROWS[:1])[0].split("## What was asked")[1].split("## Up to 8x faster")[0]
    lines = asked.strip().splitlines()[2:]
    assert len(lines) == 9
    for line in lines:
        assert "not measured" in line or line.startswith("| prediction")
    assert "Not measured." in render(ROWS[:1])[0].split("## Up to 8x faster")[1]


def test_speed_of_random_weights_is_said_to_be_that() -> None:
    head, claim = render(ROWS)[0].split("## Up to 8x faster")
    assert "Weights are random" in head
    assert "with random weights" in claim.split("###")[0]


def test_decoding_stands_beside_its_floor_its_prediction_and_its_peer() -> None:
    page, _ = render([decoded(HYBRID, 5000.0, peer="transformers 5", peer_value=1000.0, ratio=5.0)])
    line = line_of(page, HYBRID, "1 H200", "bf16", "fp32", "32", "16K", "5,000", "4,500 … 5,500", "**50%**")
    assert line.endswith("| transformers 5: 1,000, **5.00x** |")
    said = predict.decode(_models()[0], predict.HARDWARE["H200"], batch=32, context=16384)["tokens_per_s"]
    assert f"| {said:,.0f} | {said / 5000 - 1:+.1%} |" in line


def test_constants_change_what_was_predicted_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = render(ROWS)
    assert "by its data sheet: 6 points" in before
    monkeypatch.setitem(predict.CALIBRATED, "H200", predict.Calibration(0.9, 5e-6, None, "a test"))
    after, _ = render(ROWS)
    assert "H200, by 90.0% of the data sheet's bandwidth and 5.0 µs a layer: 4 points" in after
    assert "by its data sheet: 2 points" in after  # sums over two GPUs were not timed


def test_the_point_that_the_prediction_is_furthest_from_is_named() -> None:
    rows = [decoded(GQA, None), decoded(HYBRID, 1e9, batch=8, context=4096), decoded(HYBRID, None)]
    assert (f"The worst is off by -100.0%: {HYBRID} on 1 H200, weights bf16, states fp32, batch 8, context 4K."
            in render(rows)[0])


def test_a_point_without_memory_is_named_until_it_is_measured() -> None:
    skipped = decoded(GQA, 200.0, context=131072) | {"what": "decode.skipped", "unit": "GB"}
    assert "131072" in render([*ROWS, skipped])[0]
    assert "want of memory" not in render([*ROWS, skipped, decoded(GQA, 300.0, context=131072)])[0]


def test_prompts_answers_and_what_made_them_are_shown() -> None:
    shape = "length=32768 batch=1 piece=2048 precision=bf16 gpus=1"
    page, _ = render([made("prefill", HYBRID, 21_000.0, shape), made("prefill.mfu", HYBRID, 0.512, shape),
                      made("answer", "tiny-hybrid", 99.0, "prompt=64 batch=2 written=16 precision=fp32 threads=1",
                           None)])
    assert "| 8b-hybrid | 1 H200 | bf16 | 32K | 2048 | 21,000 | **51.2%** |" in page
    assert "| tiny-hybrid | CPU, threads 1 | fp32 | 2 | 64 | 16 | 99 |" in page
    assert f"- {MACHINE.format('H200')}, commit 0123abc: `a command`" in page
    assert "## Decoding" not in page


def test_the_command_writes_the_page_and_its_picture(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:4]))
    main([str(tmp_path / "rows.json"), "--out", str(tmp_path / "page.md")])
    page, pictures = render(ROWS[:4])
    assert (tmp_path / "page.md").read_text() == page
    assert {name: (tmp_path / name).read_text() for name in pictures} == pictures
    assert len(pictures) == 1
    with pytest.raises(SystemExit, match="no rows"):
        main([str(tmp_path / "none.json"), "--out", str(tmp_path / "page.md")])
