"""The likeliest token of each row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hinny.ops import backend
from hinny.ops.inputs import check_rank


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n v) → the largest of each row (n,), and which it is (n,) int64: of equal ones the first; NaN is larger
    than all. Raises ValueError for another number of dimensions, RuntimeError where gradients would be recorded.

    A kernel for float32 on a GPU, which looks through parts of a row at once: rows are few and long.
    """
    check_rank("likeliest", "logits", logits, "n v")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise RuntimeError("likeliest has no gradients; detach the logits, or use torch.no_grad().")
    if logits.is_cuda and logits.dtype == torch.float32 and len(logits) and backend.chosen(logits) == "triton":
        from hinny.ops.kernels import likeliest as kernels  # here alone: Triton is imported where it runs

        return kernels.likeliest(logits)
    best, tokens = logits.max(-1)
    return best, tokens
