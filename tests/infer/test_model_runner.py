"""Passes over pools: every sequence as it goes alone, whatever goes beside it and whoever had its memory before."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from small import small_model

from hinny.errors import ConfigError
from hinny.infer.parts import Part
from hinny.infer.pool import Pool
from hinny.infer.prepare import prepare
from hinny.infer.runner import MOST_FEW, ModelRunner
from hinny.model import Model

WORDS, PAGE, SLOTS = 30, 4, 6
PATTERNS = ["M-", "*-", "1-", "M-*-1"]


class Host:
    """Sequences of random tokens that grow in a runner's memory by random steps, each beside a plain forward of its
    own: what a scheduler does, without a plan."""

    def __init__(self, model: Model, runner: ModelRunner, seed: int, pages: int) -> None:
        self.model, self.runner, self.draw = model, runner, random.Random(seed)
        self.slots, self.pages = list(range(SLOTS)), list(range(pages))
        self.draw.shuffle(self.pages)
        self.alive: list[dict] = []

    def begin(self) -> None:
        slot = self.slots.pop(self.draw.randrange(len(self.slots)))
        self.runner.clear_slot(slot)
        text = [self.draw.randrange(37) for _ in range(self.draw.randint(1, 40))]
        self.alive.append({"slot": slot, "pages": [], "held": 0, "text": text})

    def end(self, sequence: dict) -> None:
        self.alive.remove(sequence)
        self.slots.append(sequence["slot"])
        self.pages += sequence["pages"]

    def part(self, sequence: dict, most: int) -> Part:
        left = len(sequence["text"]) - sequence["held"]
        count = self.draw.randint(1, min(most, left))
        room = -(-(sequence["held"] + count) // PAGE)
        while len(sequence["pages"]) < room:
            sequence["pages"].append(self.pages.pop())
        start, sequence["held"] = sequence["held"], sequence["held"] + count
        return Part(sequence["slot"], sequence["pages"], start, sequence["text"][start:start + count],
                    wanted=self.draw.randint(0, count))

    def expected(self, sequence: dict, part: Part) -> torch.Tensor:
        end = part.start + len(part.tokens)
        return self.model(torch.tensor([sequence["text"][:end]]))[0, end - part.wanted:, :WORDS]

    def step(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        while self.slots and (not self.alive or self.draw.random() < 0.7):
            self.begin()
        chosen = self.draw.sample(self.alive, self.draw.randint(1, len(self.alive)))
        parts = [self.part(sequence, most) for sequence in chosen]
        if most == 1:
            parts = [Part(part.slot, part.pages, part.start, part.tokens) for part in parts]
        found = self.runner.run(parts).clone()
        wanted = torch.cat([self.expected(*pair) for pair in zip(chosen, parts, strict=True)])
        for sequence in [s for s in self.alive if s["held"] == len(s["text"])]:
            self.end(sequence)
        return found, wanted


def host(pattern: str, seed: int, *, recorded: bool, **changes) -> Host:
    model = small_model(pattern, **changes).requires_grad_(False)
    prepared = copy.deepcopy(model)
    prepare(prepared)
    pages = SLOTS * 12
    runner = ModelRunner(prepared, slots=SLOTS, pages=pages, page=PAGE, words=WORDS, recorded=recorded)
    for tensor in runner.pool.tensors():
        if tensor.dim() == 4 and pattern != "1-" and tensor.shape[0] == pages:
            tensor.normal_(std=1e3)  # what others left behind
    return Host(model, runner, seed, pages)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("most", [1, MOST_FEW, 23])
@torch.no_grad()
def test_sequences_side_by_side_have_the_logits_that_each_has_alone(pattern, most):
    for seed in range(2):
        work = host(pattern, seed, recorded=most == 1 and seed > 0)
        for _ in range(14):
            found, wanted = work.step(most)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_positions_are_each_sequences_own_without_rotation_too():
    attention = dict(n_heads=4, n_kv_heads=4, head_dim=8, positions="none")
    work = host("*M", 5, recorded=False, attention=attention)
    for _ in range(20):
        found, wanted = work.step(9)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", ["M-*-1"])
@torch.no_grad()
def test_a_fork_goes_on_by_itself(pattern):
    work = host(pattern, 0, recorded=False)
    runner, text = work.runner, list(range(11))
    runner.clear_slot(0)
    runner.run([Part(0, [0, 1, 2], 0, text[:10])])
    runner.copy_slot(0, 1)
    runner.copy_page(2, 7)
    for slot, pages, token in ((0, [0, 1, 2], 20), (1, [0, 1, 7], 21), (0, [0, 1, 2], 22)):
        start = 10 if token < 22 else 11
        found = runner.run([Part(slot, pages, start, [token])])
        told = [*[*text[:10], 20, 22][:start], token]
        torch.testing.assert_close(found[0], work.model(torch.tensor([told]))[0, -1, :WORDS], rtol=0, atol=1e-9)


@torch.no_grad()
def test_padding_of_a_recorded_step_touches_nothing():
    work = host("M*1", 0, recorded=True)
    runner = work.runner
    for slot in range(3):
        runner.clear_slot(slot)
    for tensor in runner.pool.tensors():
        tensor[3:] = 7.0
    for start in range(3):  # three rows run as four
        runner.run([Part(slot, [slot], start, [slot + start]) for slot in range(3)])
    for tensor in runner.pool.tensors():
        assert bool((tensor[3:] == 7.0).all())


@torch.no_grad()
def test_a_state_of_few_bits_is_rounded_once_a_step():
    model = small_model("M").float().requires_grad_(False)
    runner = ModelRunner(model, slots=1, pages=0, state_dtype=torch.bfloat16)
    state, layer = model.init_state(1), runner.pool.layers[0]
    for start, token in enumerate([3, 9, 27, 4]):
        wanted = model(torch.tensor([[token]]), state)[0, -1]
        state.layers[0].ssm = state.layers[0].ssm.bfloat16().float()
        found = runner.run([Part(0, [], start, [token])])[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert layer.ssm.dtype == torch.bfloat16
        torch.testing.assert_close(layer.ssm.float(), state.layers[0].ssm, rtol=0, atol=1e-6)


def test_a_pool_says_what_it_holds():
    pool = Pool(small_model("M*1").float(), slots=3, pages=5, page=PAGE)
    assert sum(tensor.nbytes for tensor in pool.tensors()) == 3 * pool.slot_bytes + 5 * pool.page_bytes
    # keys and values of 2 heads of 8; Mamba-2: 4 heads of 8 x 8, 64 channels of 3; Mamba-1: 32 x 4, 32 channels of 3
    assert pool.page_bytes == 4 * 2 * PAGE * 2 * 8
    assert pool.slot_bytes == 4 * (4 * 8 * 8 + (32 + 2 * 2 * 8) * 3 + 32 * 4 + 32 * 3)


def test_a_type_that_no_state_can_have_is_refused():
    with pytest.raises(ConfigError, match="state_dtype is torch"):
        Pool(small_model("M"), 1, 0, PAGE, torch.int8)
