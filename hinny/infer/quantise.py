"""Matrices in 8 or 4 bits for inference, through torchao: a model in half the memory of bfloat16, or a quarter.

    int8    one scale for each row, which is its largest value / 127.5
    fp8     float8_e4m3fn, one scale for each row
    int4    one scale and one zero for each 128 values of a row; a GPU's own format alone

Products are of the numbers that the short ones stand for, with inputs as they are (weight-only). The embedding, the
head, norms, convolutions and decays stay as they are, and so do the projections to time steps: their errors add up over
a sequence, and they are small. torchao widens int8 and fp8 before each product; hinny.infer.prepare gives what they
are made of to `ops.thin_linear`, whose kernel reads them as they are: decoding moves fewer bytes then.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hinny.errors import BackendError, ConfigError
from hinny.infer.precision import to_bfloat16
from hinny.memory.quantised import GROUP, Kind, check_kind
from hinny.model import Model

Precision = Literal["bf16", "stored", "int8", "fp8", "int4"]

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
        if kind == "int8":
            _drop_zeros(part.weight)


def to_precision(model: Model, precision: Precision | None) -> None:
    """Put a model as it was read into `precision` in place, on the device where it will be used.

    None and "stored" leave it as it is; what a quantised model has whole is bfloat16. Raises as `quantise`.
    """
    if precision is None or precision == "stored":
        return
    to_bfloat16(model)
    if precision != "bf16":
        quantise(model, precision)


def check_precision(precision: Precision | None) -> None:
    """Raises what `to_precision` would, as far as that is known before a model is read."""
    if precision not in (None, "stored", "bf16"):
        check_kind(precision)
        _torchao()


def is_quantised(weight: Tensor) -> bool:
    """Whether `weight` stands for other numbers than it holds."""
    return type(weight) not in (Tensor, nn.Parameter)


def scaled_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The numbers (n k) and the scales of the rows (n,) that a weight in int8 or fp8 is made of, as `ops.thin_linear`
    takes them; None for every other weight.
    """
    library = sys.modules.get("torchao.quantization")
    if library is None or not isinstance(weight, library.Int8Tensor | library.Float8Tensor):
        return None
    if list(weight.block_size) != [1, weight.shape[1]] or weight.act_quant_kwargs is not None:
        return None
    if isinstance(weight, library.Int8Tensor) and weight.zero_point is not None:
        return None
    return weight.qdata, weight.scale.flatten()


def replace_rows(weight: Any, data: Tensor, scale: Tensor) -> None:
    """Let a weight of which `scaled_rows` told be made of these, equal ones elsewhere."""
    weight.qdata, weight.scale = data, scale[:, None]


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


def _drop_zeros(weight: Any) -> None:
    """int8 is symmetric: each row's zero is 0, which None says as well."""
    assert weight.zero_point is None or not weight.zero_point.any()
    weight.zero_point = None


def _all(_: nn.Module, __: str) -> bool:
    return True
