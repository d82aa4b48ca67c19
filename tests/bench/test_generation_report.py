"""docs/results/generation.md is what its rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hinny import predict
from hinny.bench.generation_report import PICTURE, main, render
from hinny.run import row

GQA = "8b-transformer model.attention.n_kv_heads=8"
MACHINE = "a processor, 16 cores, 128 GiB, NVIDIA H200, Python 3.11, torch 2.11"


def decoded(variant: str, value: float, *, context: int = 16384, batch: int = 32, tensor: int = 1,
            **more: Any) -> dict[str, Any]:
    cut = f"tensor={tensor} " if tensor > 1 else ""
    shape = f"context={context} batch={batch} precision=bf16 state=fp32 {cut}gpus={tensor}"
    return row("decode", variant, value, "tokens/s", shape=shape, low=0.9 * value, high=1.1 * value, bound=2 * value,
               command="a command", **more) | {"machine": MACHINE, "commit": "0123abc"}


ROWS = [decoded("8b-hybrid", 5000.0), decoded(GQA, 2000.0), decoded("8b-hybrid", 4900.0, context=65536),
        decoded(GQA, 700.0, context=65536), decoded("8b-hybrid", 9000.0, tensor=2),
        decoded("8b-transformer", 1200.0, tensor=2)]


def line_of(page: str, *cells: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    return line


def test_the_claim_is_a_ratio_of_two_rows_beside_its_prediction() -> None:
    page, _ = render(ROWS)
    line = line_of(page, "GQA-8", "1 H200", "32", "16K", "5,000", "2,000", "**2.50x**")
    hybrid, gqa = (predict.decode_bytes(row_model, 32, 16384) for row_model in _models())
    assert line.endswith(f"| {gqa / hybrid:.2f}x |")
    assert "| MHA | 2 H200 | 32 | 16K | 9,000 | 1,200 | **7.50x** |" in page


def _models() -> list[Any]:
    from hinny.config import load_recipe

    return [load_recipe("8b-hybrid").model, load_recipe("8b-transformer", ["model.attention.n_kv_heads=8"]).model]


def test_the_curve_is_drawn_from_points_of_one_gpu() -> None:
    _, pictures = render(ROWS)
    assert pictures[PICTURE].count("batch 32, GQA-8") == 1
    assert "MHA" not in pictures[PICTURE]
    assert render(ROWS)[1] == pictures
    assert render(ROWS[:2])[1] == {}  # one point is no curve


def test_decoding_stands_beside_its_floor_its_prediction_and_its_peer() -> None:
    page, _ = render([decoded("8b-hybrid", 5000.0, peer="transformers 5", peer_value=1000.0, ratio=5.0)])
    line = line_of(page, "8b-hybrid", "1 H200", "bf16", "fp32", "32", "16K", "5,000", "4,500 … 5,500", "**50%**")
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


def test_a_point_without_memory_is_named_until_it_is_measured() -> None:
    skipped = decoded(GQA, 200.0, context=131072) | {"what": "decode.skipped", "unit": "GB"}
    assert "131072" in render([*ROWS, skipped])[0]
    assert "want of memory" not in render([*ROWS, skipped, decoded(GQA, 300.0, context=131072)])[0]


def test_prompts_answers_and_what_made_them_are_shown() -> None:
    made = {"machine": MACHINE, "commit": "0123abc"}
    shape = "length=32768 batch=1 piece=2048 precision=bf16 gpus=1"
    rows = [row("prefill", "8b-hybrid", 21_000.0, "tokens/s", shape=shape, command="x") | made,
            row("prefill.mfu", "8b-hybrid", 0.512, "of peak", shape=shape, command="x") | made,
            row("answer", "tiny-hybrid", 99.0, "tokens/s", command="y",
                shape="prompt=64 batch=2 written=16 precision=fp32 threads=1") | made]
    page, _ = render(rows)
    assert "| 8b-hybrid | 1 H200 | bf16 | 32K | 2048 | 21,000 | **51.2%** |" in page
    assert "| tiny-hybrid | CPU, threads 1 | fp32 | 2 | 64 | 16 | 99 |" in page
    assert f"- {MACHINE}, commit 0123abc: `x`" in page
    assert "## Decoding" not in page


def test_the_command_writes_the_page_and_its_picture(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    main([str(tmp_path / "rows.json"), "--out", str(tmp_path / "page.md")])
    page, pictures = render(ROWS)
    assert (tmp_path / "page.md").read_text() == page
    assert (tmp_path / PICTURE).read_text() == pictures[PICTURE]
    with pytest.raises(SystemExit, match="no rows"):
        main([str(tmp_path / "none.json"), "--out", str(tmp_path / "page.md")])


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    rows = [one for file in sorted(results.glob("generation-*.json")) for one in json.loads(file.read_text())]
    if not rows:
        assert not (results / "generation.md").exists()
        return
    page, pictures = render(rows)
    assert (results / "generation.md").read_text() == page
    assert {name: (results / name).read_text() for name in pictures} == pictures
