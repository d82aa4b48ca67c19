"""Converted weights in a run: planned files that others read, whole or absent, and used like any checkpoint."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from converted_runs import CONFIG, converted, infos_of, values_of
from small import small_config, small_model

import hinny
from hinny.checkpoint import latest, load, load_model, read_meta, save, sharded, store, weights
from hinny.checkpoint.formats.foreign import Info
from hinny.config import load_recipe
from hinny.errors import CheckpointError
from hinny.infer.engine import Engine
from hinny.model import Model
from hinny.run import Run
from hinny.train.loop import train
from hinny.train.optim import make_optimizer


@pytest.fixture
def values():
    return values_of(CONFIG)


@pytest.fixture
def run(tmp_path, values):
    return converted(tmp_path / "run", values)


def test_the_files_are_those_of_the_library_with_an_index_as_hugging_face_writes_it(run, values):
    folder = latest(run)
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [f.name for f in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    read = {}
    for file in files:
        held = safetensors.torch.load_file(file)
        assert not held.keys() & read.keys()
        size = sum(v.nbytes for v in held.values())
        assert size <= 3000 or len(held) == 1
        read |= held
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    assert index["weight_map"].keys() == values.keys()
    for name, file in index["weight_map"].items():
        assert name in safetensors.torch.load_file(folder / file)


def test_meta_has_the_checksum_of_every_file_and_says_what_the_weights_are(run):
    folder, meta = latest(run), read_meta(run)
    assert folder.name == "step-00000000"
    assert meta["step"] == 0
    assert meta["source"]["format"] == "test"
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "meta.json"}
    assert meta["files"] == sums


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5,), (7, 3)])
def test_any_shape_any_type_and_any_strides_are_written_bit_for_bit(tmp_path, shape):
    values = {}
    for i, dtype in enumerate([torch.bfloat16, torch.float32, torch.float16, torch.float64]):
        value = torch.randn(shape, dtype=torch.float64).to(dtype)
        values[f"a{i}"] = value
        values[f"b{i}"] = value.mT if value.ndim == 2 else value
    sharded.write(tmp_path, sharded.plan(infos_of(values), single=True), values.__getitem__)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, value in values.items():
        assert read[name].shape == value.shape
        assert torch.equal(read[name], value)


def test_a_tensor_larger_than_a_block_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "BLOCK", 8)
    values = {"long": torch.arange(100.0), "turned": torch.arange(30.0).view(6, 5).T, "wide": torch.ones(3, 20).T}
    shares = []
    sharded.write(tmp_path, sharded.plan(infos_of(values), 4), values.__getitem__, shares.append)
    read = {}
    for file in tmp_path.glob("*.safetensors"):
        read |= safetensors.torch.load_file(file)
    assert all(torch.equal(read[name], value) for name, value in values.items())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_model_has_the_weights_in_float32_or_in_the_types_they_are_stored_in(run, values):
    model = load_model(run)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, values[name].float())
    stored = load_model(run, dtype="stored")
    for name, value in stored.state_dict().items():
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name])
    with pytest.raises(CheckpointError, match=r"dtype is 'bf16'"):
        load_model(run, dtype="bf16")


@pytest.mark.parametrize("pattern", ["M", "1", "*-", "M-*1"])
def test_stored_types_compute_what_float32_does_to_their_precision_also_while_decoding(tmp_path, pattern):
    config = small_config(pattern, vocab_size=257)
    run = converted(tmp_path / "run", values_of(config), config=config)
    tokens = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    model, exact = load_model(run, dtype="stored"), load_model(run)
    with torch.no_grad():
        expected, found = exact(tokens), model(tokens).float()
        state = model.init_state(2)
        steps = [model(tokens[:, :5], state), *(model(tokens[:, i:i + 1], state) for i in range(5, 9))]
    scale = expected.abs().max()
    # bfloat16 rounds to 2^-9; a few dozen roundings in a row
    assert (found - expected).abs().max() < 0.05 * scale
    assert (torch.cat(steps, 1).float() - expected).abs().max() < 0.05 * scale


def test_a_trained_checkpoint_can_be_read_in_its_types_too_and_tensor_by_tensor(trained_run):
    model, stored = load_model(trained_run), load_model(trained_run, dtype="stored")
    by_name = store.read_weights(trained_run)
    assert by_name.infos.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(stored.state_dict()[name], value)
        assert torch.equal(by_name.read(name), value)
        assert by_name.infos[name] == Info(tuple(value.shape), value.dtype)


def test_generate_and_evaluate_work_on_a_converted_run(run):
    engine = Engine(run.path)
    assert "".join(hinny.generate(run.path, "abc", max_tokens=4)) == engine.generate("abc", max_tokens=4)
    rows = hinny.evaluate(run.path, ["copy", "mqar"], hinny.evals.EvalOptions(samples=2, lengths=(64,), pairs=(4,)))
    assert {row["what"] for row in rows} == {"copy.accuracy", "mqar.accuracy"}
    assert Engine(run.path, dtype="stored").model.head.weight.dtype == torch.bfloat16


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("dtype", [None, "stored"])
def test_one_flipped_bit_is_found(run, dtype):
    damage(sorted(latest(run).glob("*.safetensors"))[1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors is damaged.*No earlier"):
        load_model(run, dtype=dtype)


def test_a_missing_file_is_named(run):
    (latest(run) / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_model(run)


@pytest.mark.parametrize("dtype", [None, "stored"])
def test_weights_of_another_model_are_refused(run, dtype):
    other = small_config("M-*", vocab_size=257)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this model.*layers\.3"):
        load(run, Model(other))
    wider = CONFIG.model_copy(update={"mlp": CONFIG.mlp.model_copy(update={"d_ff": 32})})
    with pytest.raises(CheckpointError, match=r"could not be loaded: the size of layers\.1\.layer\.up.*24, 16.*32, 16"):
        load(run, Model(wider))
    run.write_recipe(run.recipe.model_copy(update={"model": wider}))
    with pytest.raises(CheckpointError, match=r"\[model\] in recipe\.toml is not that of the checkpoint"):
        load_model(run, dtype=dtype)


def test_an_optimiser_cannot_be_filled_from_weights_alone(run):
    model = Model(CONFIG)
    with pytest.raises(CheckpointError, match=r"no optimiser state.*begin anew"):
        load(run, model, make_optimizer(model, run.recipe.optim))


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path, values):
    def read(name):
        if name == list(values)[-1]:
            raise CheckpointError("the source went away")
        return values[name]

    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match="went away"):
        weights.save(run, infos_of(values), read, {})
    assert list(run.checkpoints.iterdir()) == []


def test_a_full_disk_is_said(tmp_path, values):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = Run(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(CheckpointError, match=r"could not be written.*File too large.*Make room"):
            weights.save(run, infos_of(values), values.__getitem__, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(run.checkpoints.iterdir()) == []


def test_training_begins_anew_from_converted_weights_and_keeps_them(run, values, byte_data):
    # rate 0: what is left after three steps is what was begun with
    recipe = load_recipe(run.path / "recipe.toml", ["train.steps=3", "train.save_every=1", "optim.lr=1e-30"])
    done = train(recipe, run.path, data=str(byte_data), threads=1)
    assert done.finished
    assert [f.name for f in run.checkpoint_folders()] == ["step-00000000", "step-00000002", "step-00000003"]
    for name, value in load_model(run).state_dict().items():
        assert torch.allclose(value, values[name].float(), rtol=0, atol=1e-6), name
    assert run.env["earlier"][0]["data_fingerprint"] == "none"
    # the optimiser is there now: a longer run goes on as any does
    with pytest.raises(CheckpointError, match=r"train\.steps: 3 → 5"):
        train(load_recipe(run.path / "recipe.toml", ["train.steps=5"]), run.path, data=str(byte_data))


def test_training_from_converted_weights_refuses_another_model_and_another_tokenizer(run, byte_data, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.norm_eps: 1e-05 → 0\.001"):
        train(load_recipe(run.path / "recipe.toml", ["model.norm_eps=1e-3"]), run.path, data=str(byte_data))
    (run.path / "tokenizer.json").write_text('{"kind": "other"}')
    with pytest.raises(CheckpointError, match=r"tokenizer of .* is not that of .*hinny prepare DIR --tokenizer"):
        train(load_recipe(run.path / "recipe.toml"), run.path, data=str(byte_data))


def test_a_converted_checkpoint_is_not_pruned_and_trained_ones_are(run):
    model = small_model("M-*1", vocab_size=257).float()
    optimizer = make_optimizer(model, run.recipe.optim)
    model(torch.arange(8).view(1, 8)).square().mean().backward()
    optimizer.step()
    for step in (1, 2, 3):
        save(run, step, model, optimizer, {"recipe": run.recipe.model_dump(mode="json")})
    assert [f.name for f in run.checkpoint_folders()] == ["step-00000000", "step-00000002", "step-00000003"]


def test_every_tensor_lies_at_a_multiple_of_its_size_in_the_file(tmp_path):
    values = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(5), "more": torch.ones(7).bfloat16(),
              "widest": torch.ones(3, dtype=torch.float64)}
    sharded.write(tmp_path, sharded.plan(infos_of(values), single=True), values.__getitem__)
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 64 == 0
    header = json.loads(content[8:start])
    for name, value in values.items():
        assert (start + header[name]["data_offsets"][0]) % value.element_size() == 0
