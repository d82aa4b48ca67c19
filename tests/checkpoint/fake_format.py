"""A format of the tests' own, with all that a real one may have: joined, interleaved and padded tensors, ignored names.

    fake.txt            its settings: the pattern, and the words of the vocabulary
    model.safetensors   the weights
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from small import small_config

from hinny.checkpoint.formats.files import SafetensorsFolder, tokenizer_files
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.formats.table import Interleaved, Row, Stacked
from hinny.model import Model

NAME = "fake"
CONFIG = small_config("M*-", vocab_size=260)
PAD = 4


def recognises(folder: Path) -> bool:
    return (folder / "fake.txt").is_file()


def rows(model):
    mixer, inner = "blocks.0.mixer.", "layers.0.layer."
    parts = ("z", "x", "B", "C", "dt")
    return [
        Row("embed", ("embedding.weight",), padded=True),
        *(Row(f"blocks.{i}.norm", (f"layers.{i}.norm.weight",)) for i in range(3)),
        Row(f"{mixer}in", tuple(f"{inner}in_proj.{part}.weight" for part in parts)),
        Row(f"{mixer}conv", tuple(f"{inner}conv.{part}.weight" for part in "xBC"), Stacked(unit=True)),
        Row(f"{mixer}conv_bias", tuple(f"{inner}conv.{part}.bias" for part in "xBC")),
        *(Row(mixer + name, (inner + name,)) for name in ("A_log", "D", "dt_bias")),
        Row(f"{mixer}gain", (f"{inner}norm.weight",)),
        Row(f"{mixer}out", (f"{inner}out_proj.weight",)),
        Row("blocks.1.qkv", tuple(f"layers.1.layer.{part}.weight" for part in "qkv"), Interleaved(2)),
        Row("blocks.1.o", ("layers.1.layer.o.weight",)),
        Row("blocks.2.up", ("layers.2.layer.up.weight",)),
        Row("blocks.2.down", ("layers.2.layer.down.weight",)),
        Row("last", ("norm.weight",)),
        Row("head", ("head.weight",), padded=True)]


def open_checkpoint(folder: Path) -> Foreign:
    tensors = SafetensorsFolder(folder)
    return Foreign(format="the tests' own", model=CONFIG, tensors=tensors, rows=rows(CONFIG),
                   ignored={"steps": "a count"}, tokenizer=tokenizer_files(folder),
                   facts={"longest sequence": "96", "colour": "green"}, variants={"its older layout": "mixer.old"})


def refusals(model):
    return [] if model.pattern == "M*-" else [f'model.pattern is "{model.pattern}"; fake has "M*-" alone.']


def write_settings(model, folder: Path, *, dtype, max_len, eod=None):
    (folder / "fake.txt").write_text(f"{dtype} {max_len} {eod}")
    return ["It is fake."]


def ours(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of ours, in bfloat16, all different."""
    model = Model(CONFIG)
    model.init_weights(seed)
    values = {name: value.bfloat16() for name, value in model.state_dict().items()}
    return {name: torch.randn(value.shape).bfloat16() if value.ndim == 1 else value for name, value in values.items()}


def theirs(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as a checkpoint holds them, joined by hand."""
    a, b = "layers.0.layer.", "layers.1.layer."
    qkv = []
    for group in range(2):
        qkv += [own[f"{b}q.weight"][16 * group:16 * group + 16], own[f"{b}k.weight"][8 * group:8 * group + 8],
                own[f"{b}v.weight"][8 * group:8 * group + 8]]
    pad = torch.full((PAD, 16), 7.0, dtype=torch.bfloat16)
    return {
        "embed": torch.cat([own["embedding.weight"], pad]), "head": torch.cat([own["head.weight"], pad]),
        **{f"blocks.{i}.norm": own[f"layers.{i}.norm.weight"] for i in range(3)},
        "blocks.0.mixer.in": torch.cat([own[f"{a}in_proj.{part}.weight"] for part in ("z", "x", "B", "C", "dt")]),
        "blocks.0.mixer.conv": torch.cat([own[f"{a}conv.{part}.weight"] for part in "xBC"])[:, None],
        "blocks.0.mixer.conv_bias": torch.cat([own[f"{a}conv.{part}.bias"] for part in "xBC"]),
        **{f"blocks.0.mixer.{name}": own[a + name] for name in ("A_log", "D", "dt_bias")},
        "blocks.0.mixer.gain": own[f"{a}norm.weight"], "blocks.0.mixer.out": own[f"{a}out_proj.weight"],
        "blocks.1.qkv": torch.cat(qkv), "blocks.1.o": own[f"{b}o.weight"],
        "blocks.2.up": own["layers.2.layer.up.weight"], "blocks.2.down": own["layers.2.layer.down.weight"],
        "last": own["norm.weight"], "steps": torch.tensor([3])}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of this format."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "model.safetensors")
    (folder / "fake.txt").write_text("M*-")
    return folder
