"""What the Hugging Face and state-spaces formats share in reading and writing a folder: settings, weights, head.

A setting is read, or must have the one value that our layers compute, or is named among those that change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hinny.checkpoint.formats.files import (
    Fields,
    SafetensorsFolder,
    has_safetensors,
    listed,
    read_json,
    tokenizer_files,
)
from hinny.checkpoint.formats.foreign import LONGEST, Foreign, Tensors
from hinny.checkpoint.formats.pickles import PickledTensors
from hinny.checkpoint.formats.table import Row
from hinny.config import ModelConfig, validate
from hinny.errors import CheckpointError, ConfigError
from hinny.run import write_atomically

CONFIG = "config.json"
PICKLE = "pytorch_model.bin"

EMBEDDINGS = ("embeddings", "embedding")
"""The Mamba classes' name for the embedding, and that of files from before it was settled."""

MAMBA1_CHUNK = 16
"""model.mamba1.chunk_len of what is imported: it changes speed and memory alone, and no foreign format has it."""

INIT_STD = 0.02
"""model.init_std where a format says none: it matters to nothing that is already trained."""

DROPOUTS = ("attention_dropout", "hidden_dropout")
BOOKKEEPING = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map",
               "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "return_dict")
"""Settings that say nothing of what the weights compute; all others are read, checked or named as left aside."""


class Settings(Fields):
    """config.json, which also knows the keys that nobody asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where there is no readable config.json."""
        super().__init__(folder, CONFIG)
        self.asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def need(self, key: str, kind: type[Any]) -> Any:
        self.asked.add(key)
        value = super().need(key, kind)
        # all whole numbers that are asked for are sizes and counts
        if kind is int and value < 1:
            raise CheckpointError(f"{self.file}: {key} is {value}; it must be 1 or more.")
        return value

    def must_be(self, key: str, *allowed: Any, absent: bool = True) -> None:
        self.asked.add(key)
        super().must_be(key, *allowed, absent=absent)

    def must_lack(self, key: str, what: str) -> None:
        """Refuse a value of `key`; absent, null, empty and 0 are none. what: what hinny has not."""
        if key in self and self.table[key]:
            raise CheckpointError(f"{self.file}: {key} is {self.table[key]!r}; hinny has no {what}: "
                                  "only a checkpoint without can be read.")

    def agree(self, key: str, value: Any, source: str) -> None:
        """Refuse a `key` that is there and says otherwise than `source` does."""
        if key in self and self.table[key] != value:
            raise CheckpointError(f"{self.file}: {key} is {self.table[key]!r}, but {source} says {value!r}; it is not "
                                  "clear which is meant. Make them agree.")

    def unused(self) -> list[str]:
        """Keys with a value that nothing has asked for, so far."""
        return [key for key, value in self.table.items()
                if value is not None and key not in self.asked and key not in BOOKKEEPING]


def recognised(folder: Path, model_type: str) -> bool:
    """Whether config.json in `folder` is of this `model_type`. Never raises."""
    return peek(folder).get("model_type") == model_type


def peek(folder: Path) -> dict[str, Any]:
    """config.json of `folder`; empty where there is none that can be read."""
    try:
        return read_json(folder / CONFIG)
    except CheckpointError:
        return {}


def check_class(settings: Settings, model_type: str, architecture: str) -> None:
    """Refuse another class than `architecture`, and weights that are no plain numbers."""
    settings.must_be("model_type", model_type, absent=False)
    settings.must_be("architectures", [architecture])
    settings.must_lack("quantization_config", "quantised weights")


def open_class(
    folder: Path, model_type: str, architecture: str, model_of: Callable[[Settings], ModelConfig],
    rows_of: Callable[[ModelConfig, str, str], list[Row]], embeddings: Sequence[str], *, rotary: bool = False,
    more: Callable[[Settings, ModelConfig], Mapping[str, str]] = lambda settings, model: {},
) -> Foreign:
    """The checkpoint of a class in `folder`; rows_of: model, prefix, name of the embedding → the name table.

    rotary: stored rotary frequencies are no weights. more: facts of the class.
    """
    settings, tensors = Settings(folder), open_weights(folder)
    check_class(settings, model_type, architecture)
    model = model_of(settings)
    prefix, embedding = find_prefix(tensors, folder, embeddings)
    ignored = tied_head(tensors, f"{prefix}{embedding}.weight", folder) if model.tie_embeddings else {}
    ignored = ignored | (frequencies(tensors) if rotary else {})
    said = dict(more(settings, model))  # before the settings that nobody asked for are told
    if model.attention is not None and model.attention.rope_scaling is not None:
        said[LONGEST] = str(model.attention.rope_scaling.reach)
    return Foreign(format=f"Hugging Face {model_type}", model=model, tensors=tensors,
                   rows=rows_of(model, prefix, embedding), ignored=ignored, tokenizer=tokenizer_files(folder),
                   facts=facts(settings, tensors) | said)


def open_weights(folder: Path) -> Tensors:
    """The tensors of `folder`: its safetensors files, else its files of torch.save."""
    if has_safetensors(folder):
        return SafetensorsFolder(folder)
    # one file, or several numbered ones: a lost one shows in the names that are missing
    files = [folder / PICKLE] if (folder / PICKLE).is_file() else sorted(folder.glob("pytorch_model-*.bin"))
    if not files:
        raise CheckpointError(f"{folder} has no weights: no model.safetensors, no index of such files, no {PICKLE}. "
                              "Copy them too.")
    return PickledTensors(files)


def find_prefix(tensors: Tensors, folder: Path, embeddings: Sequence[str]) -> tuple[str, str]:
    """What stands before all names but the head's, and which of `embeddings` the embedding is called."""
    for prefix in ("backbone.", "model.", "transformer.", ""):
        for name in embeddings:
            if f"{prefix}{name}.weight" in tensors.infos:
                return prefix, name
    raise CheckpointError(f"{folder} has no embedding: no name ends in {' or '.join(embeddings)}.weight. "
                          f"It holds {listed(tensors.infos)}.")


def tied_head(tensors: Tensors, embedding: str, folder: Path) -> dict[str, str]:
    """The head's stored copy of a tied embedding, as a name to leave aside. Raises CheckpointError if they differ."""
    head = "lm_head.weight"
    if head not in tensors.infos:
        return {}
    if not torch.equal(tensors.read(head), tensors.read(embedding)):
        raise CheckpointError(f"{folder}: {CONFIG} ties head and embedding, but {head} is not {embedding}. "
                              "Set tie_word_embeddings (tie_embeddings) to false if the head is meant.")
    return {head: f"{embedding} again: they are tied"}


def frequencies(tensors: Tensors) -> dict[str, str]:
    """Tables of rotary frequencies, which old files hold, as names to leave aside."""
    return {name: "computed from rope_theta" for name in tensors.infos if name.endswith("rotary_emb.inv_freq")}


def width(heads: int, head_dim: int, d_model: int) -> dict[str, int]:
    """[model.mamba2]'s key for the width: expand where it is whole, else n_heads."""
    return {"n_heads": heads} if heads * head_dim % d_model else {"expand": heads * head_dim // d_model}


def time_steps(settings: Settings) -> dict[str, float]:
    """[model.mamba*]'s keys for the range of the first time steps; ours where theirs is no range."""
    low, high = settings.get("time_step_min", float, 0.0), settings.get("time_step_max", float, 0.0)
    return {"dt_min": low, "dt_max": high} if 0 < low < high else {}


def time_step_limit(settings: Settings) -> None:
    """Refuse time steps that are clamped."""
    unclamped(settings, "time_step_limit", settings.get("time_step_limit", list, [0.0, float("inf")]))


def unclamped(settings: Settings, key: str, limit: Any) -> None:
    """Refuse a range of time steps, found under `key`, that is not all of them."""
    try:
        # transformers 5 writes infinity as a table, JSON having none
        low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in limit)
    except (TypeError, ValueError, KeyError):
        raise CheckpointError(f"{settings.file}: {key} is {limit!r}; it must be two numbers.") from None
    if not (low <= 0 and high == float("inf")):
        raise CheckpointError(f"{settings.file}: {key} is [{low}, {high}]; hinny clamps no time step: it can only "
                              "compute [0, infinity] exactly.")


def model_config(settings: Settings, data: Mapping[str, Any]) -> ModelConfig:
    """[model] from `data`. Raises CheckpointError, which names the file, where the sizes contradict each other."""
    try:
        return validate(ModelConfig, data, str(settings.file))
    except ConfigError as fault:
        raise CheckpointError(f"{fault} The settings of this checkpoint make no model of ours.") from None


def facts(settings: Settings, tensors: Tensors) -> dict[str, str]:
    """What else is worth keeping of a checkpoint; call it when all settings have been asked for."""
    found = {"tensors": f"{len(tensors.infos):,}"}
    if "max_position_embeddings" in settings:
        found[LONGEST] = str(settings.table["max_position_embeddings"])
    if dropped := [f"{key} = {settings.table[key]}" for key in DROPOUTS if key in settings and settings.table[key]]:
        found["dropout, which hinny does not train with"] = ", ".join(dropped)
    if unused := settings.unused():
        found["settings that change nothing here"] = ", ".join(unused)
    return found


def write_config(folder: Path, settings: Mapping[str, Any], *, dtype: torch.dtype, eod: int | None) -> None:
    """Write config.json: `settings`, the type of the weights under both its names, and the token that ends a text."""
    kind = str(dtype).removeprefix("torch.")
    # no token begins a text here, and none is for padding: said, because the classes' own defaults name some
    common = {"torch_dtype": kind, "dtype": kind, "bos_token_id": None, "eos_token_id": eod, "pad_token_id": None,
              "use_cache": True}
    write_atomically(folder / CONFIG, json.dumps({**settings, **common}, indent=2) + "\n")


def refuse_all_but(model: ModelConfig, name: str, *, layers: str, norm: str) -> list[str]:
    """Why format `name`, with these layers and this norm alone, cannot express the model; empty where it can."""
    found = []
    if odd := sorted(set(model.pattern) - set(layers) - {"|"}):
        found.append(f"model.pattern has {_quoted(odd)} layers; {name} has {_quoted(layers)} alone.")
    if model.attention is not None and model.attention.score_scale is not None:
        found.append(f"model.attention.score_scale is {model.attention.score_scale}; {name} has no such factor.")
    if model.norm != norm:
        found.append(f'model.norm is "{model.norm}"; {name} has "{norm}" alone.')
    return found


def refuse_unless_blocks(model: ModelConfig, name: str) -> list[str]:
    """Why format `name`, whose layer is attention and then an MLP, cannot express the pattern."""
    symbols = model.pattern.replace("|", "")
    if symbols == "*-" * (len(symbols) // 2):
        return []
    return [f'model.pattern is "{model.pattern}"; {name} has "*-" repeated alone.']


def _quoted(symbols: Iterable[str]) -> str:
    return ", ".join(f"'{symbol}'" for symbol in symbols)
