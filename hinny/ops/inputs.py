"""What the sequence ops share about their arguments: shapes, precision, step sizes and document boundaries."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def check_shapes(op: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor whose shape is not the expected one; None stands for "not given"."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {shape} beside the others.")


def check_rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raises ValueError unless `tensor` has one axis per letter and none of them is empty."""
    if tensor.dim() != len(letters.split()) or 0 in tensor.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be ({letters}), no axis empty.")


def check_length(op: str, name: str, value: int) -> None:
    """Raises ValueError unless `value` is a positive number of tokens."""
    if value < 1:
        raise ValueError(f"{op}: {name} is {value}; it must be at least 1.")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums, decays and states are kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    """The tensors in `dtype`, None kept."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on x's device: the ops choose their own precision."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """The positive time steps of a state space model, in `dtype`: softplus(dt + dt_bias), either part optional."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def count_documents(segments: Tensor) -> Tensor:
    """How many documents began after position 0, per token: segments (b t) -> (b t) int64.

    Two tokens are of the same document exactly if their counts are equal, also when an id comes back later.
    """
    count = torch.zeros(segments.shape, dtype=torch.int64, device=segments.device)
    count[:, 1:] = (segments[:, 1:] != segments[:, :-1]).cumsum(1)
    return count


def document_starts(segments: Tensor) -> Tensor:
    """True where a token begins another document than the one before it: segments (b t) -> (b t); never at 0."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))


def pad_documents(documents: Tensor, padding: int) -> Tensor:
    """documents (b t) → (b t+padding): the padding belongs to the last one."""
    return torch.cat([documents, documents[:, -1:].expand(-1, padding)], 1)
