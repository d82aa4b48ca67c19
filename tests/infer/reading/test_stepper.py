"""Decoding in steps: every row as it goes alone, whatever the others' lengths, in buffers that stay as in ones that
grow.
"""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from small import small_model

from hinny import ops
from hinny.infer.reading.fixed import ALIGNED, FixedBatch
from hinny.infer.reading.stepper import Stepper
from hinny.model import Model
from hinny.state import State, join

WORDS = 30
"""Fewer than the model's 37."""
PROMPTS = [torch.randint(37, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 3, 12, 1, 62)]


class Whole:
    """What a stepper claims to be: each row read again from its first token at every step."""

    def __init__(self, model: Model, prompts: list[torch.Tensor]) -> None:
        self.model, self.rows = model, list(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.rows = [torch.cat([row, token[None]]) for row, token in zip(self.rows, tokens, strict=True)]
        return torch.stack([self.model(row[None])[0, -1, :WORDS].argmax() for row in self.rows])

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]


def prompted(model: Model, prompts: list[torch.Tensor] = PROMPTS) -> State:
    states = []
    for prompt in prompts:
        states.append(model.init_state(1))
        model(prompt[None], states[-1])
    return join(states)


def fixed(model: Model, room: int = 0, prompts: list[torch.Tensor] = PROMPTS) -> FixedBatch:
    return FixedBatch(model, prompted(model, prompts), model.output_weight[:WORDS], room, recorded=False)


def decode(stepper: Stepper | FixedBatch | Whole, steps: int, tokens: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for _ in range(steps):
        tokens = stepper.step(tokens)
        found.append(tokens.clone())
    return found


def assert_states_close(found: State, expected: State) -> None:
    assert torch.equal(found.positions, expected.positions)
    for a, b in zip(found.layers, expected.layers, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        for name, mine in a.tensors().items():
            for row, n in enumerate(found.positions.tolist()):
                x, y = (t[row, :n] if name in "kv" else t[row] for t in (mine, b.tensors()[name]))
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "fixed"])
@torch.no_grad()
def test_every_row_goes_on_as_it_does_alone(model: Model, kind: str) -> None:
    stepper = Stepper(model, prompted(model), WORDS) if kind == "plain" else fixed(model)
    alone, tokens = Whole(model, PROMPTS), torch.tensor([1, 2, 3, 4, 5])
    for rows in ([0, 1, 2, 3, 4], [4, 0, 3, 1], [0, 2, 3], [1], [0]):
        for each in (stepper, alone):
            each.keep(torch.tensor(rows))
        found, expected = (decode(each, 4, tokens[rows]) for each in (stepper, alone))
        assert torch.equal(torch.stack(found), torch.stack(expected))
        tokens = found[-1]
        assert stepper.state.positions.tolist() == [len(row) for row in alone.rows]


@torch.no_grad()
def test_fixed_buffers_hold_the_same_states_when_they_grow_and_when_rows_leave(
    model: Model, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hinny.infer.reading.fixed.GROWTH", (1, 8))
    state = prompted(model)
    one, two = Stepper(model, state, WORDS), fixed(model)
    tokens = torch.tensor([1, 2, 3, 4, 5])
    held = []
    for rows, steps in (([4, 0, 3, 1], 7), ([0, 1, 2], 2), ([1, 2], ALIGNED)):
        for each in (one, two):
            each.keep(torch.tensor(rows))
        found, again = (decode(each, steps, tokens[rows]) for each in (one, two))
        assert torch.equal(torch.stack(found), torch.stack(again))
        tokens = found[-1]
        assert_states_close(two.state, one.state)
        held.append(two.state.fork())
    assert held[0].positions.tolist() == [69, 14, 8, 10]
    again = prompted(model).select(torch.tensor([4, 0, 3, 1]))
    decode(Stepper(model, again, WORDS), 7, torch.tensor([5, 1, 4, 2]))
    assert_states_close(held[0], again)


@torch.no_grad()
def test_a_step_moves_no_buffer_and_looks_at_no_length(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = fixed(model, room=20)
    batch.keep(torch.tensor([4, 1, 2]))
    tokens = torch.tensor([1, 2, 3])
    batch.step(tokens)
    buffers = batch._buffers
    everything = [buffers.tokens, buffers.next, buffers.before, buffers.after, buffers.alive] + [
        t for layer in buffers.state.layers if layer is not None for t in layer.tensors().values()]
    places = [t.data_ptr() for t in everything]

    def waits(*_: object) -> None:
        raise AssertionError("this waits for the device")

    for name in ("item", "tolist", "__int__", "__bool__", "__index__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    # it reads lengths, on the CPU alone; the module has the name of a function
    monkeypatch.setattr(sys.modules["hinny.ops.attention"], "_check", lambda *_: None)
    buffers.advance(model, batch._words)
    monkeypatch.undo()
    assert [t.data_ptr() for t in everything] == places
    after = [t.data_ptr() for layer in buffers.state.layers if layer is not None for t in layer.tensors().values()]
    assert after == places[5:]


@torch.no_grad()
def test_known_room_is_made_once(model: Model) -> None:
    batch = fixed(model, room=100)
    buffers = batch._buffers
    assert buffers.capacity == 62 + 100 + 30
    assert buffers.capacity % ALIGNED == 0
    decode(batch, 100, torch.tensor([1, 2, 3, 4, 5]))
    assert batch._buffers is buffers
    assert fixed(model)._buffers.capacity == 64


@torch.no_grad()
def test_a_row_that_left_at_the_end_of_the_buffer_is_in_nobodys_way() -> None:
    model, prompts = small_model("*-"), [PROMPTS[i] for i in (0, 1, 2, 4)]
    batch, alone = fixed(model, prompts=prompts), Whole(model, prompts)
    for rows, steps in (([0, 1, 2, 3], 2), ([0, 1, 2], 3)):
        for each in (batch, alone):
            each.keep(torch.tensor(rows))
        found, expected = (decode(each, steps, torch.tensor([1, 2, 3, 4])[rows]) for each in (batch, alone))
        assert torch.equal(torch.stack(found), torch.stack(expected))
    assert batch._buffers.capacity == len(PROMPTS[4]) + 2
    assert len(batch._buffers.tokens) == 4


@torch.no_grad()
def test_buffers_shrink_when_half_of_the_rows_have_left(model: Model) -> None:
    batch = fixed(model, prompts=PROMPTS[:4])
    sizes = []
    for rows in ([0, 1, 2], [1, 2], [1]):
        batch.keep(torch.tensor(rows))
        batch.step(torch.ones(len(rows), dtype=torch.int64))
        sizes.append(len(batch._buffers.tokens))
    assert sizes == [4, 2, 1]


@torch.no_grad()
def test_mamba2_changes_its_state_in_place_during_a_step_and_never_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = small_model("M1*-"), []
    updated = ops.mamba2_update
    monkeypatch.setattr(ops, "mamba2_update", lambda *given, **options: calls.append(1) or updated(*given, **options))
    batch = fixed(model)
    batch.step(torch.tensor([1, 2, 3, 4, 5]))
    assert calls == [1]
    assert all("mix" not in vars(block.layer) for block in model.blocks)


@torch.no_grad()
def test_a_mixer_that_somebody_put_there_is_used_as_it_is() -> None:
    model, calls = small_model("M"), []
    mix = model.blocks[0].layer.mix
    model.blocks[0].layer.mix = lambda *given, **options: calls.append(1) or mix(*given, **options)
    prompts = PROMPTS[:2]
    batch, alone = fixed(model, prompts=prompts), Whole(small_model("M"), prompts)
    calls.clear()
    found, expected = (decode(each, 3, torch.tensor([1, 2])) for each in (batch, alone))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len(calls) == 3


@torch.no_grad()
def test_a_batch_that_nobody_holds_is_freed_at_once(model: Model) -> None:
    gc.disable()
    try:
        batch = fixed(model)
        batch.step(torch.tensor([1, 2, 3, 4, 5]))
        buffers = weakref.ref(batch._buffers)
        del batch
        assert buffers() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_keys_of_another_type_than_the_prompts_are_refused_in_fixed_buffers() -> None:
    model = small_model("*-").float()
    batch = fixed(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"float32 .* torch.bfloat16; decode"):
        batch.step(torch.tensor([1, 2, 3, 4, 5]))


@pytest.mark.parametrize("rows", [[], [0, 0], [5], [-1]])
def test_rows_that_are_not_there_or_come_twice_are_refused(rows: list[int]) -> None:
    model = small_model("M")
    stepper = Stepper(model, prompted(model), WORDS)
    with pytest.raises(ValueError, match="must be one or more of 0 to 4"):
        stepper.keep(torch.tensor(rows, dtype=torch.int64))


def test_what_does_not_fit_is_refused() -> None:
    model = small_model("M")
    for words in (0, 38):
        with pytest.raises(ValueError, match="it must be 1 to 37"):
            Stepper(model, prompted(model), words)
    with pytest.raises(ValueError, match="no rows"):
        Stepper(model, prompted(model).select(torch.tensor([], dtype=torch.int64)), WORDS)
    with pytest.raises(ValueError, match=r"must be \(5,\)"):
        Stepper(model, prompted(model), WORDS).step(torch.tensor([1, 2]))
