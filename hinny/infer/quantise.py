"""Matrices in 8 or 4 bits for inference, through torchao: a model in half the memory of bfloat16, or a quarter.

    int8    one scale for each row, which is its largest value / 127.5
    fp8     float8_e4m3fn, one scale for each row
    int4    one scale and one zero for each 128 values of a row; a GPU's own format alone

Products are of the numbers that the short ones stand for, with inputs as they are (weight-only). The embedding, the
head, norms, convolutions and decays stay as they are, and so do the projections to time steps: their errors add up over
a sequence, and they are small. torchao widens int8 and fp8 before a product unless it is compiled: they save memory,
not time.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hinny.config import ModelConfig
from hinny.errors import BackendError, ConfigError
from hinny.model import Model

Kind = Literal["int8", "fp8", "int4"]
KINDS: tuple[str, ...] = get_args(Kind)

GROUP = 128
"""Values of a row that share int4's scale and zero."""

TILE = (8, 1024)
"""Rows and columns are filled up to multiples of these in int4's format."""

WHOLE = ("x_proj", "dt_proj", "in_proj.dt")
"""Projections of a layer that stay as they are: what the time steps, B and C of Mamba-1 are made from."""


def quantise(model: Model, kind: Kind) -> None:
    """Put the layers' projections into `kind` in place; the model is for inference alone from then on.

    Weights are float32 or bfloat16, on the device where they will be used. `tensor_parallel` comes before it, `prepare`
    after it. Raises ConfigError for a kind or weights that cannot be used, BackendError where torchao or the device is
    missing; the model is then as it was.
    """
    check_kind(kind)
    chosen = dict(_projections(model))
    for name, part in chosen.items():
        _check(name, part, kind)
    options = _options(kind)
    quantize = _torchao().quantize_
    for part in chosen.values():
        part.weight.requires_grad_(False)
        # torchao's filter is asked about `part` alone
        quantize(part, options, filter_fn=_all)


def check_kind(kind: str) -> None:
    """Raises ConfigError for a kind that is not known."""
    if kind not in KINDS:
        raise ConfigError(f"weights are to be {kind!r}; allowed: {', '.join(KINDS)}.")


def quantised_bytes(config: ModelConfig, kind: Kind, width: int = 4) -> int:
    """Bytes of a model's weights after `quantise`; width: of each number of the matrices that stay, 2 in bfloat16."""
    check_kind(kind)
    with torch.device("meta"):
        model = Model(config)
    # by the tensors: a tied head is the embedding
    sizes: dict[Tensor, int] = {weight: weight.numel() * 4 for weight in model.parameters()}
    sizes |= {part.weight: part.weight.numel() * width for part in model.modules()
              if isinstance(part, nn.Linear | nn.Embedding)}
    sizes |= {part.weight: matrix_bytes(part.out_features, part.in_features, kind) for _, part in _projections(model)}
    return sum(sizes.values())


def matrix_bytes(rows: int, columns: int, kind: Kind) -> int:
    """Bytes of a quantised matrix, its scales included: float32 ones, but of int4 bfloat16."""
    if kind != "int4":
        return rows * (columns + 4)
    rows, columns = (-(-size // tile) * tile for size, tile in zip((rows, columns), TILE, strict=True))
    return rows * columns // 2 + rows * columns // GROUP * 2 * 2


def is_quantised(weight: Tensor) -> bool:
    """Whether `weight` stands for other numbers than it holds."""
    return type(weight) not in (Tensor, nn.Parameter)


def _projections(model: Model) -> Iterator[tuple[str, nn.Linear]]:
    """The layers' matrices that are made shorter, by name."""
    for number, block in enumerate(model.blocks):
        for name, part in block.layer.named_modules():
            if isinstance(part, nn.Linear) and not name.startswith(WHOLE):
                yield f"layers.{number}.{name}", part


def _check(name: str, part: nn.Linear, kind: Kind) -> None:
    """Raises ConfigError or BackendError if the weight of `part` cannot be put into `kind`."""
    weight = part.weight
    if is_quantised(weight):
        raise ConfigError(f"the weight of {name} is {type(weight).__name__} already; "
                          "quantise the model as it was read.")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"the weight of {name} is {weight.dtype}; only float32 and bfloat16 can be made {kind}.")
    if kind != "int4":
        return
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise BackendError(f"int4 needs a GPU of compute capability 8.0 or more, and {name} is on {weight.device}; "
                           "take int8, which runs everywhere.")
    if weight.dtype != torch.bfloat16:
        raise ConfigError(f"int4 is made from bfloat16, and the weight of {name} is {weight.dtype}; convert the model "
                          "with hinny.infer.precision.to_bfloat16 first.")
    if weight.shape[1] % GROUP:
        raise ConfigError(f"int4 has one scale for {GROUP} values of a row, and the weight of {name} has rows of "
                          f"{weight.shape[1]}, no multiple of it; take int8.")


def _options(kind: Kind) -> Any:
    library = _torchao()
    if kind == "int8":
        return library.Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "fp8":
        return library.Float8WeightOnlyConfig(set_inductor_config=False)
    return library.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d",
                                        set_inductor_config=False)


def _torchao() -> Any:
    # it tells of every compiled part that is for another machine
    logger = logging.getLogger("torchao")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError:
        raise BackendError("torchao is not installed; it is the extra 'quantise': pip install 'hinny[quantise]'."
                           ) from None
    finally:
        logger.setLevel(before)


def _all(_: nn.Module, __: str) -> bool:
    return True
