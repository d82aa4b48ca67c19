"""A foreign checkpoint becomes a run, every bit accounted for, or nothing."""

import fcntl
import json
import os
import sys
import types

import fake_format
import pytest
import safetensors.torch
import torch

import hinny
from hinny.checkpoint import convert as module
from hinny.checkpoint import formats, load_model, matching, read_meta, read_weights, sharded
from hinny.config import load_recipe
from hinny.errors import CheckpointError, ConfigError, DataError
from hinny.infer.engine import Engine
from hinny.run import Run
from hinny.tokenizer import BYTES_FILE, train_bpe


def changed(source, **tensors):
    """`source` with some tensors replaced; None removes one."""
    held = safetensors.torch.load_file(source / "model.safetensors") | tensors
    return fake_format.write(source, {name: value for name, value in held.items() if value is not None})


def test_every_weight_arrives_bit_for_bit_and_exponents_in_float32(source, own, tmp_path):
    record = hinny.convert(source, tmp_path / "run", shard_bytes=4000)
    stored = read_weights(Run(tmp_path / "run"))
    assert stored.infos.keys() == own.keys()
    for name, value in own.items():
        wide = name.endswith(("A_log", ".D", "dt_bias"))
        assert stored.infos[name].dtype == (torch.float32 if wide else torch.bfloat16)
        assert torch.equal(stored.read(name).bfloat16(), value), name
    assert len(stored.paths) > 3
    assert record["parameters"] == sum(value.numel() for value in own.values())
    assert record["done"]
    assert record["ignored"] == {"steps": "a count"}


def test_a_run_has_all_that_a_run_needs(source, tmp_path):
    hinny.convert(source, tmp_path / "name")
    run = Run(tmp_path / "name")
    assert run.recipe.name == "name"
    assert "the tests' own" in run.recipe.description
    assert str(source) in run.recipe.description
    assert run.recipe.train.seq_len == 96
    assert run.recipe.model == fake_format.CONFIG
    assert load_recipe(tmp_path / "name" / "recipe.toml") == run.recipe
    assert run.env["command"]
    kept = read_meta(run)["source"]
    assert kept["facts"]["colour"] == "green"
    assert kept["parameters"] == sum(p.numel() for p in load_model(run).parameters())
    assert Engine(run.path).generate("ab", max_tokens=3) is not None
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "env.json", "recipe.toml", "tokenizer.json"]


def test_a_dry_run_tells_the_mapping_and_writes_nothing(source, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    record = hinny.convert(source, tmp_path / "run", dry_run=True)
    assert hinny.convert(source, dry_run=True)["mapping"] == record["mapping"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not record["done"]
    assert record["problems"] == {}
    lines = {line["theirs"]: line for line in record["mapping"]}
    assert lines["blocks.1.qkv"] == {"theirs": "blocks.1.qkv", "shape": [64, 16], "dtype": "bfloat16",
                                     "ours": [f"layers.1.layer.{part}.weight" for part in "qkv"]}
    assert len(lines) == len(fake_format.rows(fake_format.CONFIG))
    assert json.loads(json.dumps(record)) == record


def test_everything_wrong_is_said_at_once_in_groups(source, tmp_path):
    extra = {f"mixer.{i}.extra": torch.zeros(1) for i in range(30)}
    broken = changed(source, head=None, last=torch.zeros(17), embed=torch.zeros(259, 16), **extra,
                     **{"blocks.0.norm": None, "blocks.1.norm": None, "mixer.old": torch.zeros(1),
                        "blocks.2.up": torch.zeros(24, 16, dtype=torch.int8)})
    with pytest.raises(CheckpointError) as error:
        hinny.convert(broken, tmp_path / "run")
    text = str(error.value)
    assert "missing: 3 (blocks.0.norm and 1 like it; head)" in text
    assert "left over: 31 (" in text
    assert "mixer.0.extra and 29 like it" in text
    assert "last is 17, not 16" in text
    assert "embed is 259 x 16, not at least 260 x 16" in text
    assert "blocks.2.up is int8" in text
    assert "It looks like its older layout." in text
    assert not (tmp_path / "run").exists()
    record = hinny.convert(broken, dry_run=True)
    assert record["problems"]["missing"] == ["blocks.0.norm", "blocks.1.norm", "head"]
    assert record["looks_like"] == ["its older layout"]


def test_an_error_lists_eight_kinds_and_counts_the_rest():
    names = [f"kind{'abcdefghijkl'[i % 12]}.x" for i in range(12)]
    assert matching.summary(names).startswith("12 (kinda.x; ")
    assert matching.summary(names).endswith("and 4 more kinds)")


def test_a_table_that_leaves_a_weight_out_or_fills_it_twice_is_refused(source, tmp_path, monkeypatch):
    table = fake_format.rows(fake_format.CONFIG)
    for rows, message in ((table[1:], "held by nothing: 1 \\(embedding.weight\\)"),
                          ([*table, table[-1]], "held more than once: 1 \\(head.weight\\)")):
        monkeypatch.setattr(fake_format, "rows", lambda _, rows=rows: rows)
        with pytest.raises(CheckpointError, match=message):
            hinny.convert(source, tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor_and_count(source, own, tmp_path, value):
    held = fake_format.theirs(own)["blocks.0.mixer.in"].clone()
    held[3, 2:5] = value
    with pytest.raises(CheckpointError, match=r"mixer\.in has 3 of 1,600 values that are not finite.*in_proj"):
        hinny.convert(changed(source, **{"blocks.0.mixer.in": held}), tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_padding_may_hold_anything(source, own, tmp_path):
    held = fake_format.theirs(own)["head"].clone()
    held[-1] = float("nan")
    hinny.convert(changed(source, head=held), tmp_path / "run")
    assert torch.equal(read_weights(Run(tmp_path / "run")).read("head.weight"), own["head.weight"])


def test_a_tensor_is_looked_at_whole_also_beyond_one_block(monkeypatch):
    monkeypatch.setattr(sharded, "BLOCK", 16)
    value = torch.zeros(10, 7)
    assert matching.not_finite(value) == matching.not_finite(value.T) == 0
    value[9, 6] = value[2, 1] = float("nan")
    assert matching.not_finite(value) == matching.not_finite(value.T) == 2


def test_a_target_that_is_not_empty_is_left_alone(source, tmp_path):
    (tmp_path / "run").mkdir()
    hinny.convert(source, tmp_path / "run")
    with pytest.raises(CheckpointError, match="not empty"):
        hinny.convert(source, tmp_path / "run")
    with pytest.raises(CheckpointError, match="not empty"):
        hinny.convert(source, source / "fake.txt")


def test_a_conversion_that_stops_leaves_nothing_and_the_next_one_clears_what_was_killed(source, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.weights, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        hinny.convert(source, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "hinny.checkpoint.formats.fake", fake_format)
    monkeypatch.setattr(formats, "FORMATS", {"fake": "fake"})
    (tmp_path / ".partial-run" / "checkpoints" / "old").mkdir(parents=True)
    hinny.convert(source, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "source"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]


def test_two_processes_do_not_write_one_target(source, tmp_path):
    partial = tmp_path / ".partial-run"
    partial.mkdir()
    (partial / "half").write_text("x")
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="being written by another process"):
            hinny.convert(source, tmp_path / "run")
        assert (partial / "half").exists()
    finally:
        os.close(handle)


def test_a_link_in_the_way_is_not_followed_and_cleared(source, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / ".partial-run").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        hinny.convert(source, tmp_path / "run")
    assert (tmp_path / "precious" / "file").exists()


def test_the_target_may_be_this_folder(source, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    hinny.convert(source, ".")
    assert Run(tmp_path / "run").recipe.name == "run"


def test_too_little_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match=r"needs .* GB, and 0\.0 GB are free"):
        hinny.convert(source, tmp_path / "run")


def test_the_format_is_found_or_asked_for(source, tmp_path, monkeypatch):
    twin = types.ModuleType("twin")
    twin.__dict__.update(NAME="twin", recognises=lambda folder: True, open_checkpoint=fake_format.open_checkpoint)
    monkeypatch.setitem(sys.modules, "hinny.checkpoint.formats.twin", twin)
    monkeypatch.setattr(formats, "FORMATS", {"fake": "fake", "twin": "twin"})
    with pytest.raises(CheckpointError, match="formats fake and twin; say which with --from"):
        hinny.convert(source, tmp_path / "run")
    hinny.convert(source, tmp_path / "run", format="twin")
    monkeypatch.setattr(formats, "FORMATS", {"fake": "fake"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no checkpoint that hinny knows; it holds a\.txt\. Known formats: fake"):
        hinny.convert(tmp_path / "text", tmp_path / "other")
    with pytest.raises(CheckpointError, match="unknown format 'gguf'; known: fake"):
        hinny.convert(source, tmp_path / "other", format="gguf")


def test_the_tokenizer_is_the_checkpoints_or_the_one_given(source, tmp_path):
    words = train_bpe(["some text to learn " * 20], 270)
    words.save(tmp_path)
    with pytest.raises(CheckpointError, match="270 tokens and the model 260; it is that of another model"):
        hinny.convert(source, tmp_path / "run", tokenizer=tmp_path / "tokenizer.json")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a file of the `tokenizers` library.*--tokenizer none"):
        hinny.convert(source, tmp_path / "run")
    assert hinny.convert(source, tmp_path / "run", tokenizer="none")["tokenizer"] is None
    hinny.convert(source, tmp_path / "other", tokenizer="bytes")
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == BYTES_FILE
    (source / "tokenizer.json").unlink()
    for name in "ab":
        (source / f"{name}.model").touch()
    with pytest.raises(CheckpointError, match=r"not clear which tokenizer is meant, .*a\.model or .*b\.model"):
        hinny.convert(source, tmp_path / "third")
    for name in "ab":
        (source / f"{name}.model").unlink()
    assert hinny.convert(source, tmp_path / "third")["tokenizer"] is None


def test_an_option_without_effect_is_refused(source, tmp_path):
    for options, message in (({"tp": 2}, "megatron"), ({"layout": "current"}, "megatron"),
                             ({"verify": "no-such"}, "known releases: mamba2-8b-3t-4k")):
        with pytest.raises(ConfigError, match=message):
            hinny.convert(source, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="no effect on a dry run"):
        hinny.convert(source, dry_run=True, verify="mamba2-8b-3t-4k")
    with pytest.raises(ConfigError, match="a target is needed"):
        hinny.convert(source)
    hinny.convert(source, tmp_path / "run")
    for options, message in (({"format": "fake"}, "no effect"), ({"verify": "x"}, "no effect"), ({"pp": 2}, "no ranks"),
                             ({"layout": "current"}, "no effect on fake")):
        with pytest.raises(ConfigError, match=message):
            hinny.convert(tmp_path / "run", tmp_path / "out", to="fake", **options)
    with pytest.raises(ConfigError, match="is a run of hinny"):
        hinny.convert(tmp_path / "run", tmp_path / "out", format="fake")


def test_a_run_of_ours_becomes_one_with_its_newest_weights_alone(trained_run, tmp_path):
    record = hinny.convert(trained_run.path, tmp_path / "bare")
    bare = Run(tmp_path / "bare")
    assert record["facts"]["step"] == str(trained_run.steps_done)
    model, recipe = load_model(trained_run), trained_run.recipe
    for name, value in load_model(bare).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert bare.recipe == recipe.model_copy(update={"name": "bare", "description": bare.recipe.description})
    assert (bare.path / "tokenizer.json").read_bytes() == (trained_run.path / "tokenizer.json").read_bytes()
    files = [f.name for f in bare.checkpoint_folders()[0].iterdir()]
    assert sorted(files) == ["meta.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    texts = [Engine(run.path).generate("ab", max_tokens=4) for run in (bare, trained_run)]
    assert texts[0] == texts[1]
