"""Files of torch.save are read with nothing executed, and refused by name where they want more than data."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hinny.checkpoint.formats.pickles import STAND_INS, TORCH, PickledTensors, Record, flatten, load
from hinny.errors import CheckpointError


def save(path, tree):
    torch.save(tree, path)
    return path


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewrite(path, changed, method=zipfile.ZIP_STORED):
    """The archive with these members in place of its own."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in changed.items():
            archive.writestr(name, content)
    return path


def with_pickle(path, program):
    """A file of torch.save whose data.pkl is `program`."""
    save(path, {"w": torch.zeros(2)})
    return rewrite(path, {n: program if n.endswith("/data.pkl") else v for n, v in members(path).items()})


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def megatron_classes(monkeypatch):
    """Classes that the pickles below are made with, under the names of Megatron's; gone before they are read."""
    module = types.ModuleType("megatron.core.enums")

    class ModelType:
        def __reduce__(self):
            return ModelType, (1,)

    ModelType.__module__, ModelType.__qualname__ = module.__name__, "ModelType"
    module.ModelType = ModelType
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    monkeypatch.undo()


def test_tensors_come_back_bit_for_bit_as_views_of_the_file(tmp_path):
    tree = {"a": torch.randn(3, 4), "b": {"c": torch.randn(5).bfloat16(), "d": nn.Parameter(torch.ones(2))},
            "n": torch.arange(3)}
    tensors = PickledTensors([save(tmp_path / "x.pt", tree)])
    assert {name: (info.shape, info.dtype) for name, info in tensors.infos.items()} == {
        "a": ((3, 4), torch.float32), "b.c": ((5,), torch.bfloat16), "b.d": ((2,), torch.float32),
        "n": ((3,), torch.int64)}
    assert torch.equal(tensors.read("a"), tree["a"])
    assert torch.equal(tensors.read("b.c"), tree["b"]["c"])
    assert not tensors.read("b.d").requires_grad
    assert tensors.largest_file() == (tmp_path / "x.pt").stat().st_size
    if sys.platform == "linux":
        assert "x.pt" in Path("/proc/self/maps").read_text()


def test_several_files_and_a_named_table_are_one_set_of_tensors(tmp_path):
    files = [save(tmp_path / f"{i}.bin", {"module": OrderedDict({f"w{i}": torch.full((2,), i)}), "step": 7})
             for i in range(2)]
    tensors = PickledTensors(files, "module")
    assert [int(tensors.read(f"w{i}")[0]) for i in range(2)] == [0, 1]
    with pytest.raises(CheckpointError, match=r"holds again .* w0"):
        PickledTensors([files[0], files[0]], "module")
    with pytest.raises(CheckpointError, match="no table 'model'; it holds 2 names: module, step"):
        PickledTensors(files, "model")


def test_foreign_classes_become_plain_data_and_none_of_them_is_imported(tmp_path, megatron_classes):
    args = argparse.Namespace(hidden_size=8, model_type=megatron_classes.ModelType(), dtype=torch.bfloat16,
                              inner=types.SimpleNamespace(x=1))
    extra = io.BytesIO(b"scales")
    state = {"args": args, "model": {"w": torch.ones(2), "w._extra_state": extra, "none": None},
             "rng_state": [{"random": random.getstate(), "np": np.random.get_state(), "torch": torch.get_rng_state()}]}
    file = save(tmp_path / "x.pt", state)
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        del sys.modules[name]
    tree = load(file)
    assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
    fields = tree["args"].fields
    assert type(tree["args"]) is Record
    assert fields["hidden_size"] == 8
    assert fields["dtype"] is torch.bfloat16
    assert fields["inner"].fields == {"x": 1}
    tensors, others = flatten(tree["model"], file)
    assert list(tensors) == ["w"]
    assert list(others) == ["w._extra_state", "none"]
    assert others["w._extra_state"] is not extra


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_pieces_are_known_by_their_old_and_new_names(tmp_path, core):
    program = pickle.dumps({"x": np.arange(3, dtype=np.uint32)}, protocol=2)
    program = program.replace(b"cnumpy._core.", b"cnumpy.core.").replace(b"cnumpy.core.", f"cnumpy.{core}.".encode())
    assert f"numpy.{core}.multiarray".encode() in program
    assert not isinstance(load(with_pickle(tmp_path / "x.pt", program))["x"], np.ndarray)


def test_every_name_of_torch_is_on_the_list_of_its_own_weights_only_reader():
    known = torch._weights_only_unpickler._get_allowed_globals()
    assert not sorted(TORCH - known.keys())
    assert not sorted(STAND_INS.keys() & known.keys())


@pytest.mark.parametrize(("call", "name"), [
    (Call(os.system, "touch {}"), f"{os.name}.system"),
    (Call(eval, "open('{}', 'w')"), "builtins.eval"),
    (Call(getattr, Call(__import__, "os"), "system"), "builtins.__import__, builtins.getattr"),
    (Call(exec, "open('{}', 'w')"), "builtins.exec"),
], ids=["system", "eval", "getattr", "exec"])
def test_a_pickle_that_calls_is_refused_by_name_and_does_not_run(tmp_path, call, name):
    mark = tmp_path / "ran"
    function, arguments = call.call
    filled = Call(function, *[a.format(mark) if isinstance(a, str) else a for a in arguments])
    file = save(tmp_path / "x.pt", {"model": {"w": torch.ones(1)}, "args": filled})
    with pytest.raises(CheckpointError, match=f"wants to load {name}, .*Nothing of it was run"):
        load(file)
    assert not mark.exists()


def test_a_subclass_of_an_allowed_class_is_not_allowed(tmp_path):
    file = save(tmp_path / "x.pt", {"args": Sneaky()})
    with pytest.raises(CheckpointError, match=r"wants to load test_pickles\.Sneaky"):
        load(file)


class Sneaky(argparse.Namespace):
    """What unpickles as it likes."""

    def __setstate__(self, state):
        raise AssertionError("it ran")


def test_a_module_beside_an_allowed_one_is_not_allowed(tmp_path):
    """A dotted name must not reach a module through an allowed one."""
    program = b"\x80\x02cargparse\n_os.system\nX\x04\x00\x00\x00true\x85R."
    with pytest.raises(CheckpointError, match=r"wants to load argparse\._os\.system"):
        load(with_pickle(tmp_path / "x.pt", program))


def test_a_record_takes_no_attributes_but_fields(tmp_path):
    """Slot state would be set as attributes, `fields` or `__class__` for instance."""
    program = (b"\x80\x02cargparse\nNamespace\n)\x81"
               b"N}X\x09\x00\x00\x00__class__cargparse\nNamespace\ns\x86b.")
    with pytest.raises(CheckpointError, match="fields of a record"):
        load(with_pickle(tmp_path / "x.pt", program))


@pytest.mark.parametrize(("program", "says"), [
    (pickle.dumps({"a": 1}, protocol=4), "protocol 4; only 2"),
    (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "the instruction STACK_GLOBAL"),
    (b"\x80\x02(ios\nsystem\n.", "the instruction INST"),
    (b"\x80\x02(i", "no pickle as torch.save writes it"),
    (b"\x80\x02}", "no pickle as torch.save writes it"),
    (b"\x80\x02q\x00.", "damaged, or made to harm"),
])
def test_a_pickle_as_torch_never_writes_it_is_refused(tmp_path, program, says):
    with pytest.raises(CheckpointError, match=says):
        load(with_pickle(tmp_path / "x.pt", program))


def test_a_bomb_of_compressed_members_is_refused_before_it_is_unpacked(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(2_000_000)})
    whole = file.stat().st_size
    rewrite(file, members(file), zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < whole / 100
    with pytest.raises(CheckpointError, match=r"is compressed, [\d,]+ bytes that claim to be [\d,]+"):
        load(file)


def test_a_bomb_of_repeated_numbers_is_refused(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match=r"w of shape \[1000000000000\] is not stored as that many numbers"):
        PickledTensors([file])


def test_a_bomb_of_tables_in_tables_is_refused(tmp_path):
    inner = {}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    with pytest.raises(CheckpointError, match="stands elsewhere too"):
        PickledTensors([save(tmp_path / "x.pt", inner)])
    for _ in range(40):
        inner = {"a": inner}
    with pytest.raises(CheckpointError, match="tables lie in each other"):
        PickledTensors([save(tmp_path / "x.pt", inner)])


@pytest.mark.parametrize("name", ["/etc/passwd", "x/../../../escape", "..\\escape", "C:/escape"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(2)})
    rewrite(file, {**members(file), name: b"x"})
    with pytest.raises(CheckpointError, match="leads out of it"):
        load(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_there_twice_or_overlap_are_refused(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(2)})
    content = members(file)
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in [*content.items(), ("x/data/0", b"other")]:
            archive.writestr(name, value)
    with pytest.raises(CheckpointError, match="'x/data/0' is there twice"):
        load(file)
    rewrite(file, content)
    with zipfile.ZipFile(file) as archive:
        directory, first = archive.start_dir, archive.infolist()[0]
    # a second entry of the directory, under another name of the same length, for the same bytes
    raw = file.read_bytes()
    size = 46 + len(first.filename) + len(first.extra)
    entry = raw[directory:directory + size].replace(first.filename.encode(), first.filename[:-1].encode() + b"k")
    end = bytearray(raw[raw.rindex(b"PK\x05\x06"):])
    count, length = struct.unpack_from("<HI", end, 10)
    struct.pack_into("<HHI", end, 8, count + 1, count + 1, length + size)
    file.write_bytes(raw[:directory] + entry + raw[directory:raw.rindex(b"PK\x05\x06")] + bytes(end))
    with pytest.raises(CheckpointError, match="overlap"):
        load(file)


def test_a_file_cut_short_a_foreign_file_and_a_missing_file_are_told_apart(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(1000)})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"x\.pt is cut short or damaged"):
        load(file)
    (tmp_path / "y.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"y\.pt is not a file of torch\.save"):
        load(tmp_path / "y.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format that torch\.save had before PyTorch 1\.6"):
        load(tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "absent.pt")
    rewrite(tmp_path / "z.pt", {"a/readme": b"x"})
    with pytest.raises(CheckpointError, match=r"no data\.pkl. It holds 1 name: a/readme"):
        load(tmp_path / "z.pt")


def test_storages_that_the_archive_lacks_are_an_error(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(1000)})
    rewrite(file, {name: value for name, value in members(file).items() if "/data/" not in name})
    with pytest.raises(CheckpointError, match="damaged, or made to harm"):
        load(file)


def test_a_program_archive_is_refused(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(2)})
    rewrite(file, {**members(file), "x/constants.pkl": b"\x80\x02N."})
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(file)


def test_whatever_is_damaged_is_an_error_of_ours_or_harmless(tmp_path):
    tree = {"model": {"w": torch.zeros(20), "v": torch.ones(3)}, "args": argparse.Namespace(a=1)}
    file = save(tmp_path / "x.pt", tree)
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 3])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content[:draw.choice([len(content), draw.randrange(len(content))])])
        try:
            flatten(load(file), file)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_an_archive_with_a_password_is_refused(tmp_path):
    file = save(tmp_path / "x.pt", {"w": torch.zeros(2)})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    content[content.index(b"PK\x03\x04") + 6] |= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(file)
