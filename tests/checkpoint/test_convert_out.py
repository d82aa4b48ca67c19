"""A run goes out whole, as what its format says, or not at all."""

import json

import fake_format
import pytest
import safetensors.torch
import torch

import hinny
from hinny.checkpoint import convert as module
from hinny.checkpoint import load_model, read_meta, read_weights
from hinny.errors import CheckpointError
from hinny.run import Run


def test_a_run_goes_out_and_comes_back_bit_for_bit(source, own, tmp_path):
    hinny.convert(source, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.save_rows("copy", [{"what": "copy.accuracy", "shape": "length=64", "value": 0.5, "unit": "share",
                            "commit": "c0ffee", "machine": "a machine"}])
    record = hinny.convert(run.path, tmp_path / "out", to="fake", shard_bytes=4000)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    read = {}
    for file in set(index["weight_map"].values()):
        with safetensors.safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        read |= safetensors.torch.load_file(out / file)
    wanted = {name: value for name, value in fake_format.theirs(own).items() if name != "steps"}
    wanted |= {name: wanted[name][:-fake_format.PAD] for name in ("embed", "head")}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name].bfloat16(), value) for name, value in wanted.items())
    assert (out / "fake.txt").read_text() == "torch.bfloat16 96 256"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 256}
    assert record["notes"] == ["It is fake."]
    card = (out / "README.md").read_text()
    for text in ("# run", "M*-", f"{record['parameters']:,}", "0.5", "c0ffee", "the tests' own", "colour | green",
                 "- It is fake."):
        assert text in card, text
    hinny.convert(out, tmp_path / "back")
    back = read_weights(Run(tmp_path / "back"))
    stored = read_weights(run)
    assert all(torch.equal(back.read(name), stored.read(name)) for name in own)


def test_a_trained_run_goes_out_with_its_training_on_the_card(
        trained_run, tmp_path, monkeypatch, only_the_fake_format):
    monkeypatch.setattr(fake_format, "refusals", lambda model: [])
    monkeypatch.setattr(fake_format, "rows", lambda model: [
        fake_format.Row(name, (name,)) for name in load_model(trained_run).state_dict()])
    record = hinny.convert(trained_run.path, tmp_path / "out", to="fake")
    read = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_model(trained_run).state_dict().items():
        assert torch.equal(read[name], value)
    card = (tmp_path / "out" / "README.md").read_text()
    meta = read_meta(trained_run)
    for text in ("| steps | 6 of 6 |", f"| tokens | {meta['tokens']:,} |", meta["data_fingerprint"],
                 f"| lr | {trained_run.recipe.optim.lr} |", trained_run.env["commit"]):
        assert text in card, text
    assert record["step"] == 6


def test_what_a_format_cannot_express_is_refused_by_name(source, tmp_path, monkeypatch):
    hinny.convert(source, tmp_path / "run")
    monkeypatch.setattr(fake_format, "refusals", lambda model: ["a is 1; fake has 2.", "b is 3; fake has 4."])
    with pytest.raises(CheckpointError, match=r"(?s)cannot be written as fake.*  a is 1; fake has 2\.\n  b is 3"):
        hinny.convert(tmp_path / "run", tmp_path / "out", to="fake", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_value_that_is_not_finite_is_refused(source, own, tmp_path):
    hinny.convert(source, tmp_path / "run")
    run = Run(tmp_path / "run")
    folder = run.checkpoint_folders()[0]
    file = folder / "model-00001-of-00001.safetensors"
    held = safetensors.torch.load_file(file)
    held["norm.weight"][3] = float("nan")
    safetensors.torch.save_file(held, file)
    meta = read_meta(run)
    meta["files"][file.name] = module.weights.sharded.hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"norm\.weight has 1 of 16 values that are not finite"):
        hinny.convert(run.path, tmp_path / "out", to="fake")
    assert not (tmp_path / "out").exists()
