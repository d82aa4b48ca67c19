"""Matrix products of the layers' linears in float8, by torchao (an optional package).

Both factors of each product, forward and backward, are scaled by one number each, found at the time, and rounded to
float8: e4m3 for weights and activations, e5m2 for gradients. Weights, gradients and the optimiser stay as they are.
Left as they are: embedding and head; the projections that make time steps, and Mamba's B and C, which are small and
whose rounding the states would add up; and linears whose sizes are no multiples of 16, which the hardware cannot take.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import torch
from torch import nn

from hinny.errors import ConfigError
from hinny.objective import Objective

UNIT = 16
"""Sizes of a product in float8 are multiples of this."""

OLDEST_GPU = (8, 9)

FINE = ("x_proj.dt", "x_proj.B", "x_proj.C", "dt_proj", "in_proj.dt")
"""Ends of the names of linears that keep their precision."""


def apply_float8(objective: Objective, ranks: int = 1) -> None:
    """Replace the layers' linears, in place, by torchao's; the first change of all, so that others find its modules.

    ranks: among how many (parallel.tensor) a linear's rows or columns are cut; the parts' sizes must be multiples too.
    Without a GPU torchao emulates the products in float32: the same rounding, slower. Raises ConfigError where torchao
    is missing, the GPU is too old, or no linear is left to change.
    """
    torchao = _torchao()
    names = [name for name, module in objective.named_modules() if _is_layers_linear(name, module)]
    chosen = {name for name in names if _fits(name, objective.get_submodule(name), ranks)}
    if not chosen:
        raise ConfigError(f"parallel.float8 is true, but no linear of the layers has sizes that are multiples of "
                          f"{UNIT * ranks}. Set it to false, or change the model's sizes.")
    config = torchao.Float8LinearConfig(emulate=not torch.cuda.is_available())
    torchao.convert_to_float8_training(objective, config=config, module_filter_fn=lambda _, name: name in chosen)
    kept = [name for name in names if name not in chosen]
    logging.getLogger(__name__).info(
        "float8: %d linears%s; in their own precision: %s", len(chosen),
        "" if torch.cuda.is_available() else ", emulated", ", ".join(kept) or "embedding and head alone")


def _torchao() -> Any:
    try:
        found = import_module("torchao.float8")
    except ImportError as fault:
        raise ConfigError(f"parallel.float8 is true and torchao cannot be imported ({fault}). Install it: pip install "
                          "torchao, or set float8 to false.") from None
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < OLDEST_GPU:
        version, oldest = (".".join(map(str, v)) for v in (capability, OLDEST_GPU))
        raise ConfigError(f"parallel.float8 is true and this GPU is of compute capability {version}: products in "
                          f"float8 need {oldest} or newer. Set float8 to false.")
    return found


def _is_layers_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name


def _fits(name: str, linear: nn.Module, ranks: int) -> bool:
    assert isinstance(linear, nn.Linear)
    return not name.endswith(FINE) and not any(size % (UNIT * ranks) for size in linear.weight.shape)
