"""transformers' generate() over the same weights, as the peer of decoding.

Only decoding is timed, from one choice of tokens to the next, so that neither the prompt nor the start of generate()
counts. `transformers` is the extra `oracle`.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hinny import ops
from hinny.bench.kernel_peers import MambaSSM, find_peer
from hinny.bench.peers import on_kernels, transformers_twin
from hinny.errors import BackendError
from hinny.model import Model

PEERS = ("transformers", "transformers-static")

FIRST = 4
"""Steps at the start of an answer that are not timed."""

CHECKED = 24
"""Tokens of the prompt behind which both sides must say the same."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest ||a - b|| / ||b|| of the logits. The twin rounds decays and time steps to bfloat16 too, hinny does not."""


class Reads(Protocol):
    """The other side."""

    def logits(self, prompt: list[int]) -> Tensor:
        """(v,), behind the prompt."""


class Transformers:
    """The twin of `model` on its device, in its weights' type; `name` says what it runs on."""

    def __init__(self, model: Model, *, static: bool, at: int | None) -> None:
        """static: its static cache, with which generate() compiles on a GPU, in place of its default one; at: the
        longest context that it is timed at. BackendError where transformers is absent.
        """
        weight = model.embedding.weight
        self.device, self.dtype, self.at = weight.device, weight.dtype, at
        self.vocab_size = model.config.vocab_size
        twin, kernels = _on(weight.device, _twin(model))
        self._twin: Any = twin.eval().requires_grad_(False)
        self._cache = {"cache_implementation": "static"} if static else {}
        self.name = (f"transformers {version('transformers')} {type(twin).__name__}, "
                     f"{'static' if static else 'default'} cache{kernels}")

    def context(self, asked: int) -> int:
        """The context that it is timed at where `asked` is."""
        return asked if self.at is None else min(asked, self.at)

    @torch.no_grad()
    def check(self, ours: Reads) -> None:
        """BackendError if both sides disagree about what comes behind a prompt."""
        prompt = self._prompt(1, CHECKED)
        theirs, mine = self._twin(prompt).logits[0, -1].float(), ours.logits(prompt[0].tolist()).float()
        error = float((theirs - mine).norm() / mine.norm())
        if not error <= TOLERANCE[self.dtype]:
            raise BackendError(f"{self.name} with the same weights has logits {error:.2g} away from ours, above "
                               f"{TOLERANCE[self.dtype]:g}: nothing was timed.")

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        """Seconds of `tokens` steps of `batch` sequences behind `context` tokens and a few."""
        prompt = self._prompt(batch, context)
        self._times(prompt, FIRST + tokens)  # compiles, where it does
        times = self._times(prompt, FIRST + tokens)[FIRST - 1:]
        return [after - before for before, after in pairwise(times)]

    @torch.no_grad()
    def _times(self, prompt: Tensor, tokens: int) -> list[float]:
        """When each of so many tokens was chosen. A step waits for the device before the next one's choice."""
        times: list[float] = []

        def choosing(_: Tensor, scores: Tensor) -> Tensor:
            times.append(time.perf_counter())
            return scores

        found = self._twin.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                    min_new_tokens=tokens, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
                                    logits_processor=[choosing], **self._cache)
        assert found.shape == (len(prompt), prompt.shape[1] + tokens), found.shape
        assert len(times) == tokens, (times, tokens)
        return times

    def _prompt(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (batch, length), generator=generator).to(self.device)


def _twin(model: Model) -> nn.Module:
    """Made where `model` is and in its weights' type: a large one in float32 beside the CPU would take minutes."""
    weight, before = model.embedding.weight, torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            return transformers_twin(model).to(weight.dtype)
    finally:
        torch.set_default_dtype(before)


def _on(device: torch.device, twin: nn.Module) -> tuple[nn.Module, str]:
    """`twin` with the fastest kernels at hand, and which: mamba_ssm's where it is, else transformers' own PyTorch step
    behind prompts that hinny's scan reads, for its own has no room for long ones, and they are not timed.
    """
    mixers = [one for one in twin.modules() if type(one).__name__.endswith("Mamba2Mixer")]
    if not mixers or device.type != "cuda":
        return twin, ""
    module: Any = importlib.import_module(type(mixers[0]).__module__)
    try:
        peer = find_peer("mamba_ssm")
    except BackendError:
        module.mamba2_chunk_scan = _scan
        return twin, ", without mamba_ssm"
    twin, _ = on_kernels(twin, device)
    module.mamba2_chunk_scan = _only_known(module.mamba2_chunk_scan)
    module.mamba2_selective_state_update = _step(peer)
    return twin, f", {peer.name}'s step"


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, dt_bias: Tensor,
          initial_states: Tensor | None, return_final_states: bool, **_: Any) -> Tensor | tuple[Tensor, Tensor]:
    """hinny's, as transformers calls its own: with softplus, and with the state behind the prompt where it is kept."""
    found = ops.ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, initial_state=initial_states)
    return found if return_final_states else found[0]


def _step(peer: MambaSSM) -> Callable[..., Tensor]:
    def step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, dt_bias: Tensor,
             **_: Any) -> Tensor:
        # transformers has repeated them for each number of a head
        return peer.ssd_update(state, x, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], dt_bias[:, 0])

    return step


def _only_known(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without the options that generate() hands down to everything."""
    known = inspect.signature(function).parameters

    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **{name: value for name, value in options.items() if name in known})

    return call
