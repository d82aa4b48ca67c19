"""What the op tests share: seeded inputs, comparing values and every gradient, packing documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(run: Callable, given: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """run(**given)'s outputs, and the gradient of a fixed random mixture of all of them to every floating input."""
    inputs = {name: v.detach().clone().requires_grad_(v.is_floating_point()) for name, v in given.items()}
    outputs = run(**inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = sum((o * normal(*o.shape, seed=900 + i, dtype=o.dtype)).sum() for i, o in enumerate(outputs))
    wanted = {name: v for name, v in inputs.items() if v.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    return [o.detach() for o in outputs], dict(zip(wanted, found, strict=True))


def assert_same(fast: Callable, definition: Callable, given: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Outputs and every gradient of `fast` equal those of `definition`."""
    outputs, grads = gradients(fast, given)
    expected, expected_grads = gradients(definition, given)
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"output {i}: {m}")
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=tolerance, atol=tolerance,
                                   msg=lambda m, name=name: f"gradient of {name}: {m}")


def packed(lengths: list[int], batch: int) -> Tensor:
    """Segment ids (b t) of documents of these lengths, the same ids coming back: 7, 3, 7, 3, ... per row."""
    ids = [7 if i % 2 == 0 else 3 for i in range(len(lengths))]
    return torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths)).expand(batch, -1).contiguous()
