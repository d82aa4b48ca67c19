"""Which implementation of an op runs: chosen by name for a block of code, never by surprise.

    triton      kernels, on a GPU of compute capability 8.0 or newer (or in Triton's interpreter); float64 has none
    torch       fast chunked forms in plain torch
    reference   the definitions: recurrences and explicit sums, slow, for checking
    auto        the fastest that can run the tensors at hand: triton, else torch

Ops without kernels of ours (linear, split_linear, attention but that of packed documents) run PyTorch's own on every
backend. `ssd` of a single token runs torch's step: decoding on kernels is `ssd_update`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from hinny.errors import BackendError

BACKENDS = ("auto", "triton", "torch", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)
_asked = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ops called inside the block run on backend `name`.

    Raises BackendError for a name that is not known, and for "triton" where no kernel could run at all; an op raises
    it for tensors that its kernel cannot take. An op's backward runs on the backend of its forward. The choice holds
    for the whole process: PyTorch recomputes checkpointed layers in threads of its own, and they must make the same.
    """
    global _asked
    if name not in BACKENDS:
        raise BackendError(f"ops backend {name!r} is not known. Use one of {', '.join(BACKENDS)}.")
    if name == "triton" and (missing := _no_kernels()):
        raise BackendError(f"ops backend 'triton': {missing}. Use auto, torch or reference here.")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def asked() -> str:
    """The name that was asked for, "auto" unless `use_backend` says otherwise."""
    return _asked


def chosen(x: Tensor) -> str:
    """The backend that an op called here on `x` runs on: "triton", "torch" or "reference".

    Says once, in the log, what auto chose. Raises BackendError if kernels were asked for by name and x cannot use them.
    A function that torch.compile traced keeps the backend that it was traced with.
    """
    return _choose(x.device, x.dtype)


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    name = _asked
    if name in ("torch", "reference"):
        return name
    reason = _no_kernel_for(device, dtype)
    if name == "triton":
        if reason:
            raise BackendError(f"ops backend 'triton': {reason}. Use auto, torch or reference for this tensor.")
        return name
    _say_choice("torch" if reason else "triton", reason)
    return "torch" if reason else "triton"


def decline(op: str, reason: str) -> None:
    """Says once that `op` runs on torch because of `reason`; raises BackendError if kernels were asked for by name."""
    if _asked == "triton":
        raise BackendError(f"ops backend 'triton': {reason}. Use auto or torch for this call.")
    _say_declined(op, reason)


@cache
def _say_declined(op: str, reason: str) -> None:
    logging.getLogger(__name__).info("ops backend: %s runs on torch (%s)", op, reason)


# what torch.compiler.assume_constant_result sets; calling it would import the compiler, and Triton, with every op
asked._dynamo_marked_constant = True  # type: ignore[attr-defined]
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
decline._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET=1, set before the first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _no_kernels() -> str:
    """Why no kernel can run in this process; empty if one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it is a dependency on Linux alone)"
    if not torch.cuda.is_available() and not interpreting():
        return "this machine has no GPU"
    return ""


@cache
def _no_kernel_for(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel can run on a tensor of this device and dtype; empty if one can."""
    if missing := _no_kernels():
        return missing
    if device.type != "cuda" and not (interpreting() and device.type == "cpu"):
        return f"the tensor is on {device.type}, and kernels run on a GPU"
    if dtype not in KERNEL_DTYPES:
        return f"the tensor is {str(dtype).removeprefix('torch.')}, and kernels take float32, bfloat16 and float16"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "kernels need a GPU of compute capability 8.0 or newer"
    return ""


@cache
def _say_choice(name: str, reason: str) -> None:
    why = f" ({reason})" if reason else ""
    logging.getLogger(__name__).info("ops backend: auto chose %s%s", name, why)
