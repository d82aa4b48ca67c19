"""The reader on a GPU: shared prefixes, unequal rows and recorded decoding give what each request gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="hinny.model reads recipes")

from plain_reader import WORDS, Letters, plainly
from small import PATTERNS, SECTIONS, small_config

from hinny.infer.reading.reader import ModelReader
from hinny.infer.reading.requests import Generate, Score, Scored
from hinny.infer.reading.sizes import free_bytes
from hinny.infer.reading.trie import Request
from hinny.model import Model

pytestmark = pytest.mark.gpu
SIZES = {"1": {"mamba1": SECTIONS["1"]["mamba1"] | {"d_state": 16, "dt_rank": 8}},
         "M": {"mamba2": SECTIONS["M"]["mamba2"] | {"d_state": 64, "head_dim": 32, "chunk_len": 64}},
         "*": {"attention": SECTIONS["*"]["attention"] | {"head_dim": 32}},
         "-": {"mlp": SECTIONS["-"]["mlp"] | {"d_ff": 256}}}


@pytest.fixture(autouse=True)
def _as_in_use() -> Iterator[None]:
    """Graphs are recorded with PyTorch's usual ops, not with its deterministic ones."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("budget", [None, 1 << 22])
def test_answers_are_those_to_each_request_alone(pattern: str, budget: int | None) -> None:
    changes = {name: size for symbol in SIZES if symbol in pattern for name, size in SIZES[symbol].items()}
    model = Model(small_config(pattern, d_model=128, vocab_size=64, init_std=0.1, **changes))
    model.init_weights(0)
    model.cuda().requires_grad_(False)
    draw = random.Random(0)

    def words(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, WORDS) for _ in range(n))

    requests: list[Request] = []
    for _ in range(12):
        context = words(draw.randint(1, 900))
        requests += [Score(context, words(draw.randint(1, 30))) for _ in range(4)]
        requests += [Generate(context, 20, ("abc",))]
    found = ModelReader(model, Letters(), budget=budget, tokens=2048, piece=512).answer(requests)
    for mine, theirs in zip(found, plainly(model, requests), strict=True):
        if isinstance(mine, Scored) and isinstance(theirs, Scored):
            np.testing.assert_allclose(mine.log_probabilities, theirs.log_probabilities, rtol=0, atol=1e-3)
        else:
            assert mine == theirs


def test_free_memory_counts_what_torch_keeps_unused() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = free_bytes(device)
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    held = free_bytes(device)
    del block
    assert before - held >= 1 << 28
    assert free_bytes(device) >= held + (1 << 28)
