"""Kernel launchers as PyTorch operators: traced by torch.compile, and called with little work in between otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable(
    name: str, forward: Callable, backward: Callable, *, fake: Callable, fake_backward: Callable, save: Callable,
    gradients: Callable,
) -> Callable[..., Any]:
    """One function out of a launcher for the forward and one for the backward, registered as hinny::NAME and so on.

    forward         tensors and numbers → a tensor or a tuple of tensors; its annotations are the operator's schema
    backward        the same for the backward; where there is nothing to return, an empty tensor
    fake, fake_backward   what these return, without values
    save            (ctx, inputs, output): keeps on ctx what the backward needs
    gradients       (run, ctx, *gradients of the outputs, None where unused) → gradients of the inputs; calls `run`,
                    which is `backward` or its operator

    The dispatcher and the operator's checks cost about 35 us a call more than an autograd.Function: the operator runs
    where a graph is traced or a tensor is a subclass (fake, sharded), the function elsewhere.
    """
    forward, backward = on_its_device(forward), on_its_device(backward)
    operator = torch.library.custom_op(f"hinny::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    backward_operator = torch.library.custom_op(f"hinny::{name}_backward", backward, mutates_args=())
    backward_operator.register_fake(fake_backward)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    operator.register_autograd(lambda ctx, *grads: gradients(backward_operator, ctx, *grads),
                               setup_context=setup_context)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(backward, ctx, *grads)

    def call(x: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return operator(x, *rest)
        return Direct.apply(x, *rest) if torch.is_grad_enabled() else forward(x, *rest)

    return call


def on_its_device(launcher: Callable) -> Callable:
    """The launcher, run where its first tensor is: Triton launches on the current GPU, whatever it is given."""

    @wraps(launcher)
    def run(x: Tensor, *rest: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(x, *rest, **options)
        with torch.cuda.device(x.device):
            return launcher(x, *rest, **options)

    return run
