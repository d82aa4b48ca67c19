"""Files of torch.save, read with nothing executed.

Such a file is a zip archive: data.pkl, a pickle of the containers, and one member a storage. A pickle is a program.
Here it may name only what rebuilds tensors (TORCH) and a few foreign classes (STAND_INS), in whose place stand classes
of ours that hold data or drop it. A file that names more is refused with that name before anything of it runs. Three
locks, one behind the other: the archive's directory, a scan of the pickle, and torch's own weights-only reader.
"""

from __future__ import annotations

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hinny.checkpoint.formats.archive import first_line, read_pickle
from hinny.checkpoint.formats.files import listed
from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.errors import CheckpointError

DEEPEST = 32
"""Tables inside tables."""

PROTOCOL = 2
"""What torch.save writes, and all that torch's weights-only reader knows."""


class Record:
    """Stands for a class of named fields, argparse.Namespace for one: the fields as data, and nothing of the class."""

    fields: dict[str, Any]

    def __new__(cls) -> Record:
        """A pickle makes a record without __init__."""
        made = super().__new__(cls)
        made.fields = {}
        return made

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError("the fields of a record are no table of names and values")
        self.fields = dict(state)


class Inert:
    """Stands for anything that is of no use here: made from any arguments, it keeps none."""

    def __new__(cls, *_arguments: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
          "int8", "uint8", "bool")

TORCH = frozenset({
    "collections.OrderedDict", "builtins.set", "_codecs.encode", "torch.Size", "torch.device",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage",
    *(f"torch.{dtype}" for dtype in DTYPES),
    *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte",
                                          "Bool")),
})
"""What torch itself writes for tensors and their containers; each is also on the list of its weights-only reader."""

STAND_INS: Mapping[str, type] = {
    "argparse.Namespace": Record,
    "types.SimpleNamespace": Record,
    **dict.fromkeys((
        # states of random number generators
        "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "torch._C.Generator",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        # Megatron-LM
        "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
        "signal.Signals", "pathlib.PosixPath",
        # Transformer Engine's scales
        "_io.BytesIO",
    ), Inert),
}
"""Foreign class → ours in its place. None of the foreign ones is imported."""


class PickledTensors(Tensors):
    """The tensors of some files of torch.save, mapped into memory; tables in tables give dotted names.

    table: the key under which the tensors lie in each file; none if they are at the top.
    others: what is not a tensor, by name.
    """

    def __init__(self, files: Sequence[Path], table: str | None = None) -> None:
        """Raises CheckpointError as `load` does, and for a table that is not there or a name that is there twice."""
        self.files = list(files)
        self.tensors: dict[str, Tensor] = {}
        self.others: dict[str, object] = {}
        for file in self.files:
            tree = load(file)
            if table is not None:
                if not isinstance(tree, dict) or table not in tree:
                    raise CheckpointError(f"{file} has no table {table!r}; it holds {_contents(tree)}.")
                tree = tree[table]
            tensors, others = flatten(tree, file)
            if twice := sorted((self.tensors.keys() | self.others.keys()) & (tensors.keys() | others.keys())):
                raise CheckpointError(f"{file} holds again what a file before it holds: {listed(twice)}. "
                                      "A tensor lies in one file; copy the checkpoint again.")
            self.tensors |= tensors
            self.others |= others
        self._infos = {name: Info(tuple(v.shape), v.dtype) for name, v in self.tensors.items()}

    @property
    def infos(self) -> Mapping[str, Info]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def largest_file(self) -> int:
        return max(file.stat().st_size for file in self.files)


def load(file: Path) -> Any:
    """What `file` holds: containers, numbers, texts, stand-ins, and tensors on the CPU that are views of the file.

    Raises CheckpointError for a file that is damaged, not of torch.save, or that wants a class that no list here has.
    """
    _check_pickle(file, read_pickle(file))
    return _load(file, file)


def load_piece(file: Path, start: int, length: int) -> Any:
    """The same for a file of torch.save that is a piece of `file`; it is read into memory."""
    try:
        with open(file, "rb") as handle:
            handle.seek(start)
            content = io.BytesIO(handle.read(length))
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be read: {fault.strerror}.") from None
    _check_pickle(file, read_pickle(file, content))
    content.seek(0)
    return _load(file, content)


def _load(file: Path, source: Path | io.BytesIO) -> Any:
    with torch.serialization.safe_globals([(cls, name) for name, cls in STAND_INS.items()]):
        try:
            return torch.load(source, map_location="cpu", mmap=isinstance(source, Path), weights_only=True)
        # a malformed pickle raises whatever its wrong arguments raise
        except Exception as fault:
            raise CheckpointError(f"{file} cannot be read; it is damaged, or made to harm: {first_line(fault)}. "
                                  "Copy it again from where it was made.") from None


def flatten(tree: object, file: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors in nested tables, and everything else in them, under dotted names.

    Raises CheckpointError for what is no table, for a name that is no text or comes twice, and for a tensor that is
    larger than its numbers in the file.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, object] = {}
    seen: set[int] = set()

    def walk(table: Mapping[object, object], prefix: str, depth: int) -> None:
        if depth > DEEPEST:
            raise CheckpointError(f"{file}: more than {DEEPEST} tables lie in each other, as {prefix[:60]!r} begins. "
                                  "No checkpoint is like that; do not use it.")
        # a few tables that hold each other over and over are a walk without end
        if id(table) in seen:
            raise CheckpointError(f"{file}: the table {prefix[:60]!r} is one that stands elsewhere too. "
                                  "No checkpoint is like that; do not use it.")
        seen.add(id(table))
        for key, value in table.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{file}: {prefix or 'the table'} has a key that is a {type(key).__name__}; "
                                      "names are texts.")
            name = prefix + key
            if isinstance(value, dict):
                walk(value, name + ".", depth + 1)
            elif name in tensors or name in others:
                raise CheckpointError(f"{file}: two entries are called {name}; only one can be meant.")
            elif isinstance(value, Tensor):
                tensors[name] = check_dense(value, name, file)
            else:
                others[name] = value

    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} holds {_contents(tree)}, not a table of names and tensors.")
    walk(tree, "", 0)
    return tensors, others


def check_dense(v: Tensor, name: str, file: Path) -> Tensor:
    """`v` without gradient. Raises CheckpointError for a view that shows numbers more than once: a file of no size
    could hold one of any size."""
    if v.layout != torch.strided or v.numel() * v.element_size() > v.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name} of shape {list(v.shape)} is not stored as that many numbers. "
                              "Save it again after calling .contiguous() on it.")
    return v.detach()


def _check_pickle(file: Path, pickle: bytes) -> None:
    """Read the pickle's instructions without following them; refuse every name that is on neither list."""
    wanted, protocol = set(), None
    try:
        for instruction, argument, _ in pickletools.genops(pickle):
            if instruction.name == "PROTO":
                protocol = argument
            elif instruction.name == "GLOBAL":
                wanted.add(_global(str(argument)))
            elif instruction.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"):
                # names that only running it would tell
                raise ValueError(f"the instruction {instruction.name}")
    except (ValueError, UnicodeError, OverflowError) as fault:
        raise CheckpointError(f"{file}: data.pkl is no pickle as torch.save writes it: {first_line(fault)}. "
                              "Copy the file again, or save it again with torch.save as it comes.") from None
    if protocol != PROTOCOL:
        raise CheckpointError(f"{file}: data.pkl has pickle protocol {protocol}; only {PROTOCOL} is read. Save it "
                              "again without pickle_protocol, or with 2.")
    if unknown := sorted(wanted - TORCH - STAND_INS.keys()):
        raise CheckpointError(
            f"{file} wants to load {', '.join(unknown[:8])}{' and more' if len(unknown) > 8 else ''}, which is more "
            "than tensors and plain data. Nothing of it was run. Where you trust it, open it with what made it, and "
            "save the state dict alone with torch.save.")


def _global(argument: str) -> str:
    """Dotted name of what a GLOBAL instruction names, by its name in Python 3."""
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"


def _contents(tree: object) -> str:
    """What `tree` is, for an error."""
    return listed(map(str, tree)) if isinstance(tree, dict) else f"a {type(tree).__name__}"
