"""Squared ReLU and SwiGLU, one kernel each way: a program takes BLOCK elements, reads and writes each once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.gates import sigmoid, silu_slope
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable


@triton.jit
def relu2_forward(x, y, n, BLOCK: tl.constexpr):
    """x (n) → y (n) = max(x, 0)^2."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = _positive(tl.load(x + at, mask=at < n, other=0).to(tl.float32))
    tl.store(y + at, (positive * positive).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def relu2_backward(x, dy, dx, n, BLOCK: tl.constexpr):
    """x, dy (n) → dx (n)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = _positive(tl.load(x + at, mask=at < n, other=0).to(tl.float32))
    gradient = tl.load(dy + at, mask=at < n, other=0).to(tl.float32)
    tl.store(dx + at, (2 * positive * gradient).to(dx.dtype.element_ty), mask=at < n)


@triton.jit
def _positive(value):
    """max(value, 0), NaN kept, as PyTorch's relu does."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def swiglu_forward(gate, up, y, n, BLOCK: tl.constexpr):
    """gate, up (n) → y (n) = silu(gate) up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gate + at, mask=at < n, other=0).to(tl.float32)
    other = tl.load(up + at, mask=at < n, other=0).to(tl.float32)
    tl.store(y + at, (value * sigmoid(value) * other).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def swiglu_backward(gate, up, dy, dgate, dup, n, BLOCK: tl.constexpr):
    """gate, up, dy (n) → dgate, dup (n)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gate + at, mask=at < n, other=0).to(tl.float32)
    other = tl.load(up + at, mask=at < n, other=0).to(tl.float32)
    gradient = tl.load(dy + at, mask=at < n, other=0).to(tl.float32)
    tl.store(dgate + at, (gradient * other * silu_slope(value)).to(dgate.dtype.element_ty), mask=at < n)
    tl.store(dup + at, (gradient * value * sigmoid(value)).to(dup.dtype.element_ty), mask=at < n)


def _run(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Launches a kernel on elements in the order of the shape."""
    n = outputs[0].numel()
    use = launch(kernel.fn.__name__, outputs[0].device)
    kernel[(triton.cdiv(n, use["BLOCK"]),)](*(x.contiguous() for x in inputs), *outputs, n, **use)


def _relu2_forward(x: Tensor) -> Tensor:
    y = _relu2_fake(x)
    _run(relu2_forward, (x,), (y,))
    return y


def _relu2_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _relu2_backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = _relu2_fake_backward(x, dy)
    _run(relu2_backward, (x, dy), (dx,))
    return dx


def _relu2_fake_backward(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _swiglu_fake(gate, up)
    _run(swiglu_forward, (gate, up), (y,))
    return y


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    found = _swiglu_fake_backward(gate, up, dy)
    _run(swiglu_backward, (gate, up, dy), found)
    return found


def _swiglu_fake_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _relu2_gradients(run: Any, ctx: Any, dy: Tensor | None) -> Tensor | None:
    return None if dy is None else run(*ctx.saved_tensors, dy)


def _swiglu_gradients(run: Any, ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if dy is None else run(*ctx.saved_tensors, dy)


_relu2 = differentiable("relu2", _relu2_forward, _relu2_backward, fake=_relu2_fake, fake_backward=_relu2_fake_backward,
                        save=_save, gradients=_relu2_gradients)
_swiglu = differentiable("swiglu", _swiglu_forward, _swiglu_backward, fake=_swiglu_fake,
                         fake_backward=_swiglu_fake_backward, save=_save, gradients=_swiglu_gradients)


def relu2(x: Tensor) -> Tensor:
    """`hinny.ops.relu2` on a GPU."""
    found: Tensor = _relu2(x)
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`hinny.ops.swiglu` on a GPU."""
    found: Tensor = _swiglu(gate, up)
    return found


KERNELS = (relu2_forward, relu2_backward, swiglu_forward, swiglu_backward)


def compilations(table: str) -> list[Compilation]:
    """Every kernel with every configuration of a shipped table, in bfloat16 and float32."""
    cases = []
    for kernel in KERNELS:
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            use = rule["use"]
            for dtype in ("bf16", "fp32"):
                signature = {name: "i32" if name == "n" else f"*{dtype}"
                             for name in kernel.arg_names if name != "BLOCK"}
                cases.append(Compilation(f"{kernel.fn.__name__}-{number}-{dtype}", kernel, signature,
                                         {"BLOCK": use["BLOCK"]}, use["num_warps"], use["num_stages"],
                                         tuple(signature)))
    return cases


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    sizes = ((1024, 4), (2048, 4), (4096, 4), (2048, 8), (4096, 8), (8192, 8))
    return {kernel.fn.__name__: [{"BLOCK": block, "num_warps": warps, "num_stages": 1} for block, warps in sizes]
            for kernel in KERNELS}
