"""Tiny models of other libraries, filled so that no tensor is like another, and ways to hold ours against them."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hinny.checkpoint import formats
from hinny.checkpoint.formats.foreign import Foreign
from hinny.checkpoint.matching import Reader, match
from hinny.model import Model

OURS = ("state-spaces", "mamba", "mamba2", "nemotron_h", "nemotron", "llama")
WORDS = 37
TOKENS = torch.randint(WORDS, (2, 19), generator=torch.Generator().manual_seed(3))
KEPT_WIDE = ("A_log", "D", "dt_bias")


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter numbers of its own, far from those that it would start from. Tied ones stay tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.rand(parameter.shape, generator=generator)
            last = name.rpartition("mixer.")[2].rpartition("layer.")[2]
            if last in ("dt_bias", "dt_proj.bias"):
                # steps from 1e-4 to 1: some are under every usual time_step_min
                parameter.copy_(drawn * 10 - 9)
            elif last == "A_log":
                parameter.copy_(drawn * 3 - 1)
            elif "norm" in name or last == "D":
                parameter.copy_(drawn + 0.5)
            else:
                parameter.copy_((drawn - 0.5) * 3 / max(parameter.shape[-1], 4) ** 0.5)


def bring_in(folder: Path) -> tuple[Foreign, Model]:
    """The checkpoint in `folder`, recognised by itself, and our model with its weights."""
    (module,) = (module for name in OURS if (module := formats.load(name)).recognises(folder))
    foreign = module.open_checkpoint(folder)
    matched = match(foreign)
    matched.require(str(folder))
    read = Reader(matched)
    with torch.device("meta"):
        model = Model(foreign.model)
    model.load_state_dict({name: read(name).clone() for name in matched.infos}, assign=True)
    return foreign, model.eval()


def take_out(model: Model, module: ModuleType, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write `model` to `folder` by the format's table and settings; returns its notes."""
    assert module.refusals(model.config) == []
    ours = {name: tensor if name.rpartition(".")[2] in KEPT_WIDE else tensor.to(dtype)
            for name, tensor in model.state_dict().items()}
    save_file(joined(ours, module, model), folder / "model.safetensors", {"format": "pt"})
    return module.write_settings(model.config, folder, dtype=dtype, max_len=64, eod=0)


def joined(ours: dict[str, Tensor], module: ModuleType, model: Model, **options: Any) -> dict[str, Tensor]:
    """Their tensors by name, from ours."""
    return {row.theirs: row.layout.join([ours[name] for name in row.ours]).contiguous().clone()
            for row in module.rows(model.config, **options)}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value: float32, by another order of sums."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def assert_computes(model: Model, expected: Tensor, tokens: Tensor = TOKENS) -> None:
    """The full forward, and the same read in pieces and then token by token, both give these logits."""
    assert float(expected.std()) > 0.05
    assert_same(model(tokens), expected)
    state, logits, cuts = model.init_state(len(tokens)), [], [0, 7, 8, 12, *range(13, tokens.shape[1] + 1)]
    for start, end in itertools.pairwise(cuts):
        logits.append(model(tokens[:, start:end], state))
    assert_same(torch.cat(logits, 1), expected)
