"""A folder of safetensors files is read as its index says, or refused with what is wrong; no path leaves it."""

import json

import pytest
import safetensors.torch
import torch

from hinny.checkpoint.formats.files import Fields, SafetensorsFolder, has_safetensors, listed, tokenizer_files
from hinny.checkpoint.formats.foreign import Info
from hinny.errors import CheckpointError

A, B = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)


def write(folder, *, weight_map=None, **files):
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    if weight_map is not None:
        text = weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(folder)


def test_one_file_or_several_are_read_by_name(tmp_path):
    (tmp_path / "one").mkdir()
    one = SafetensorsFolder(write(tmp_path / "one", model={"a": A, "b": B}))
    several = SafetensorsFolder(write(tmp_path, x={"a": A}, y={"b": B},
                                      weight_map={"a": "x.safetensors", "b": "y.safetensors"}))
    for tensors in (one, several):
        assert tensors.infos == {"a": Info((2, 3), torch.float32), "b": Info((4,), torch.bfloat16)}
        assert torch.equal(tensors.read("a"), A)
        assert torch.equal(tensors.read("b"), B)
    assert several.largest_file() == max((tmp_path / f"{n}.safetensors").stat().st_size for n in "xy")
    assert has_safetensors(tmp_path)
    assert not has_safetensors(tmp_path / "no")


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "..\\x", 7])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, path):
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path, x={"a": A})
    write(inside, weight_map={"a": path})
    refused(inside, "it must be the name of a file in this folder")


def test_an_index_must_be_that_of_its_files(tmp_path):
    write(tmp_path, x={"a": A}, y={"b": B})
    for weight_map, message in (
            ({"a": "x.safetensors"}, None),
            ({"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"},
             r"2 names: b, c; for instance, b is in y\.safetensors, and the index says x\."),
            ({"a": "x.safetensors", "b": "z.safetensors"}, r"lacks 1 of the 2 files.*z\.safetensors"),
            ({}, "has no weight_map"),
            ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' twice"),
            ("[]", "holds list, not a table"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")):
        write(tmp_path, weight_map=weight_map)
        if message is None:
            assert list(SafetensorsFolder(tmp_path).infos) == ["a"]
        else:
            refused(tmp_path, message)


def test_a_name_in_two_files_is_refused(tmp_path):
    write(tmp_path, x={"a": A}, y={"a": A, "b": B}, weight_map={"a": "x.safetensors", "b": "y.safetensors"})
    refused(tmp_path, r"a is in x\.safetensors and again in y\.safetensors")


def test_two_checkpoints_in_one_folder_are_refused(tmp_path):
    write(tmp_path, model={"a": A}, x={"a": A}, weight_map={"a": "x.safetensors"})
    refused(tmp_path, r"both model\.safetensors and model\.safetensors\.index\.json")


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path, model={"a": A})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-5], whole[:20], b"", b"\xff" * 100, whole + b"more"):
        file.write_bytes(content)
        refused(tmp_path, r"model\.safetensors is no whole safetensors file")
    file.unlink()
    refused(tmp_path, "has neither")


def test_settings_are_asked_for_by_name_and_type(tmp_path):
    (tmp_path / "config.json").write_text('{"n": 3, "x": 2, "flag": true, "none": null, "name": "y"}')
    fields = Fields(tmp_path)
    assert fields.need("n", int) == 3
    assert fields.need("x", float) == 2.0
    assert isinstance(fields.need("x", float), float)
    assert fields.need("flag", bool) is True
    assert fields.get("none", int, 5) == fields.get("gone", int, 5) == 5
    fields.must_be("name", "y", "z")
    fields.must_be("gone", "y")
    for ask, message in ((lambda: fields.need("gone", int), r"config\.json has no gone, which must be a whole number"),
                         (lambda: fields.need("flag", int), "flag is True; it must be a whole number"),
                         (lambda: fields.get("name", float, 1.0), "name is 'y'; it must be a number"),
                         (lambda: fields.must_be("name", "a", "b"), r"name is 'y'; .* 'a' or 'b' exactly"),
                         (lambda: fields.must_be("gone", 1, absent=False), "gone is None"),
                         (lambda: Fields(tmp_path / "no"), "cannot be read")):
        with pytest.raises(CheckpointError, match=message):
            ask()


def test_the_tokenizer_of_a_folder_is_one_file(tmp_path):
    assert tokenizer_files(tmp_path) == ()
    (tmp_path / "words.model").touch()
    assert tokenizer_files(tmp_path) == (tmp_path / "words.model",)
    (tmp_path / "more.model").touch()
    assert tokenizer_files(tmp_path) == ()
    (tmp_path / "tokenizer.model").touch()
    assert tokenizer_files(tmp_path) == (tmp_path / "tokenizer.model",)
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_files(tmp_path) == (tmp_path / "tokenizer.json",)


def test_a_long_list_is_cut_and_counted():
    assert listed(["a"]) == "1 name: a"
    assert listed([f"n{i}" for i in range(2000)], 2) == "2,000 names: n0, n1 and 1,998 more"
