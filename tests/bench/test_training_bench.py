"""`hinny bench train`: what it times, refuses and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hinny.bench import bench
from hinny.bench.training_table import key, render_training
from hinny.cli import app
from hinny.errors import ConfigError

SMALL = ["model.d_model=32", "model.mamba2.head_dim=16", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
         "model.attention.head_dim=16", "model.mlp.d_ff=48", "train.seq_len=64", "train.batch_size=4",
         "train.micro_batch_size=2", "model.vocab_size=257"]


def _bench(*more: str, **options: Any) -> list[dict[str, Any]]:
    return bench("train", recipe="tiny-hybrid", overrides=[*SMALL, *more], **options)


def test_it_trains_on_the_shards_that_it_is_given(byte_data: Path) -> None:
    rows = {row["what"]: row for row in _bench("optim.lr=0.01", steps=6, data=str(byte_data), micro_batches=2)}
    assert rows["train"]["low"] <= rows["train"]["value"] <= rows["train"]["high"]
    assert rows["train.loss"]["value"] < rows["train.loss"]["high"] < 6.0  # it falls, from about log(257)
    assert "batch=2 micro_batches=2 length=64 precision=bf16" in rows["train"]["shape"]
    assert "data=shards" in rows["train"]["shape"]


def test_figures_in_a_file_are_replaced_by_the_same_figures_alone(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.json", tmp_path / "rows.md"
    command = ["bench", "train", "--recipe", "tiny-hybrid", "--steps", "1", "--save", str(file), "--markdown",
               str(page)]
    for extra in ([], [], ["--batch", "1"]):
        assert CliRunner().invoke(app, [*command, *extra, *SMALL]).exit_code == 0
    rows = json.loads(file.read_text())
    assert [row["what"] for row in rows] == ["train", "train.loss"] * 2
    assert page.read_text() == render_training(rows)
    assert page.read_text().count("| tiny-hybrid model.d_model=32 ") == 2


def test_a_file_of_something_else_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"loss": 1}')
    with pytest.raises(ConfigError, match="holds no result rows"):
        _bench(save=tmp_path / "other.json")


@pytest.mark.parametrize(("options", "said"), [
    ({"micro_batches": 0}, "micro_batches"), ({"length": 0}, "length"), ({"precision": "fp8"}, "precision is 'fp8'"),
    ({"against": "torchtitan"}, "the only peer known is transformers"),
    ({"against": "transformers", "precision": "bf16"}, "timed in fp32"),
])
def test_options_act_or_raise(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _bench(**options)


def test_what_makes_another_figure_is_in_its_name_or_shape(byte_data: Path) -> None:
    def named(*more: str) -> tuple[str, str]:
        (row, _) = _bench(*more, steps=1)
        return row["variant"], row["shape"]

    plain, recomputed, smaller = named(), named('parallel.recompute=["M"]'), named("model.mlp.d_ff=32")
    cut = named("train.segment_len=8")
    assert len({key({"what": "train", "variant": variant, "shape": shape}) for variant, shape in
                (plain, recomputed, smaller, cut)}) == 4
    assert "segment_len=8" in cut[1]
    assert "recompute=M" in recomputed[1]
    assert smaller[0].endswith(" model.mlp.d_ff=32")


@pytest.mark.parametrize(("change", "said"), [
    ("optim.z_loss=0.1", "has no optim.z_loss"), ("train.segment_len=8", r"has no train\.segment_len \(8\)"),
    ('data.boundaries="reset"', "documents see each other")])
def test_a_peer_that_would_do_other_work_is_refused(byte_data: Path, change: str, said: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=said):
        _bench(change, against="transformers", data=str(byte_data))


def test_one_folder_in_place_of_a_blend_is_refused(byte_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.blend of the recipe names 2"):
        _bench(f'data.blend={{"{byte_data}"=1.0, "/elsewhere"=1.0}}', data=str(byte_data))


def test_an_override_acts() -> None:
    with pytest.raises(ConfigError, match="tensor 3 = 3 x what is left, but there are 1 processes"):
        _bench("parallel.tensor=3")
