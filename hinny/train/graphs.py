"""A forward and backward pass recorded once as a CUDA graph, and replayed: no Python and no launches in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Losses = tuple[Tensor, Tensor]
"""The cross-entropy of counted targets, without the z-loss, and the z-loss."""


class Replayed:
    """`run(*inputs)`, which adds to gradients and returns losses, as a replay.

    The first call records, so `run` must have run before, with kernels compiled and gradients there; every later one
    must have inputs of the same shapes. The results are overwritten by the next call. Gradients are never dropped
    between steps: the graph writes to the memory that it was recorded with.
    renewed: parameters whose gradients are what one call gives; the caller zeroes the others', and calls add to them.
    """

    def __init__(self, run: Callable[..., Losses], renewed: Sequence[nn.Parameter] = ()) -> None:
        self._run = run
        self._renewed = renewed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._outputs: Losses

    def __call__(self, *inputs: Tensor | None) -> Losses:
        """Run once with these inputs."""
        if self._graph is None:
            self._graph = self._record(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            assert (held is None) == (given is None), "a replayed pass has the inputs that it was recorded with"
            if held is not None and given is not None:
                assert held.shape == given.shape, f"recorded for {tuple(held.shape)}, called with {tuple(given.shape)}"
                held.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _record(self, inputs: Sequence[Tensor | None]) -> torch.cuda.CUDAGraph:
        self._inputs = [None if given is None else given.clone() for given in inputs]
        for parameter in self._renewed:
            # without one to add to, the backward's own tensor becomes the gradient
            parameter.grad = None
        # a graph of before that is collected while this one is recorded would spoil it
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._run(*self._inputs)
        return graph
