"""A saved state comes back whole, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SECTIONS, small_model

from hinny.errors import RequestError
from hinny.state import KVState, State, join
from hinny.state.layers import GROWTH

ALL = "1M*-"


def filled(pattern: str = ALL, batch: int = 2, tokens: int = 5, **changes: object) -> State:
    """The state of a small model after some tokens."""
    model = small_model(pattern, **changes)
    state = model.init_state(batch)
    with torch.no_grad():
        model(torch.arange(batch * tokens).view(batch, tokens), state)
    return state


def contents(state: State) -> list[torch.Tensor]:
    return [t.clone() for layer in state.layers if layer is not None for t in layer.tensors().values()]


def assert_refused(state: State, file: Path, message: str) -> None:
    """`state` refuses `file`, by name, and stays as it was."""
    before, position = contents(state), state.position
    with pytest.raises(RequestError, match=message) as refusal:
        state.load(file)
    assert str(file) in str(refusal.value)
    assert state.position == position
    assert all(torch.equal(a, b) for a, b in zip(before, contents(state), strict=True))


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_saved_state_loads_into_a_fresh_one_and_into_one_that_has_gone_on(tmp_path: Path, tokens: int) -> None:
    saved = filled(tokens=5)
    saved.save(tmp_path / "state")
    other = filled(tokens=tokens) if tokens else small_model(ALL).init_state(2)
    other.load(tmp_path / "state")
    assert other.position == 5
    assert all(torch.equal(a, b) for a, b in zip(contents(saved), contents(other), strict=True))


@pytest.mark.parametrize(("symbol", "change"), [("1", {"d_state": 8}), ("1", {"d_conv": 3}), ("M", {"d_state": 4}),
                                                ("M", {"d_conv": 3}), ("M", {"head_dim": 16}),
                                                ("*", {"n_kv_heads": 4}), ("*", {"head_dim": 16})])
def test_a_state_of_another_size_is_refused_whichever_tensor_differs(tmp_path: Path, symbol: str, change: dict) -> None:
    (name, section), = SECTIONS[symbol].items()
    filled(symbol, **{name: section | change}).save(tmp_path / "state")
    assert_refused(filled(symbol), tmp_path / "state", r"of layer 0 has shape .* here it has .*another model")


@pytest.mark.parametrize("symbol", ["1", "M", "*"])
def test_a_state_of_another_batch_is_refused(tmp_path: Path, symbol: str) -> None:
    filled(symbol, batch=3).save(tmp_path / "state")
    assert_refused(filled(symbol, batch=2), tmp_path / "state", r"shape \(3, .*\(2, .*another batch size")


def test_more_layers_are_refused_also_where_they_carry_nothing(tmp_path: Path) -> None:
    filled("M--").save(tmp_path / "state")
    assert_refused(filled("M-"), tmp_path / "state", "3 layers, this model has 2; .* another model")


def test_keys_that_are_not_as_many_as_the_tokens_are_refused(tmp_path: Path) -> None:
    filled("*").save(tmp_path / "state")
    tensors = {name: tensor[:, :3].contiguous() for name, tensor in load_file(tmp_path / "state").items()}
    save_file(tensors, tmp_path / "cut", metadata={"position": "5", "layers": "1"})
    assert_refused(filled("*"), tmp_path / "cut", r"shape \(2, 3, 2, 8\) at position 5")


def test_a_file_that_is_absent_foreign_or_cut_is_refused_by_name(tmp_path: Path) -> None:
    state = filled()
    assert_refused(state, tmp_path / "absent", "cannot be read: No such file")
    (tmp_path / "text").write_text("no tensors at all, only words")
    assert_refused(state, tmp_path / "text", "not a file of State.save")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    assert_refused(state, tmp_path / "weights", "not a file of State.save")
    state.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-8])
    assert_refused(state, tmp_path / "cut", "not a file of State.save, or a damaged one")


def unequal(*tokens: int, pattern: str = ALL) -> State:
    """One row after each of these numbers of tokens."""
    return join([filled(pattern, batch=1, tokens=n) for n in tokens])


def test_unequal_rows_have_positions_and_no_position() -> None:
    state = unequal(5, 3, 4)
    assert state.positions.tolist() == [5, 3, 4]
    with pytest.raises(ValueError, match="positions 3 to 5"):
        _ = state.position
    assert state.select(torch.tensor([1])).position == 3


def test_joined_rows_of_equal_length_need_no_lengths() -> None:
    for state in (unequal(5, 5), unequal(3, 5, 5).select(torch.tensor([2, 1]))):
        assert state.position == 5
        kept = state.layers[2]
        assert isinstance(kept, KVState)
        assert kept.lengths is None
        assert kept.k.shape[1] == 5


def test_states_of_different_models_are_not_joined() -> None:
    with pytest.raises(ValueError, match="all of one model"):
        join([filled("M"), filled("M-")])
    with pytest.raises(ValueError, match="at least one"):
        join([])


def test_bytes_are_those_of_each_row_alone() -> None:
    alone = [filled(batch=1, tokens=n).bytes() for n in (5, 3, 4)]
    state = unequal(5, 3, 4)
    assert state.bytes() == sum(alone)
    assert state.select(torch.tensor([1, 1])).bytes() == 2 * alone[1]


def test_unequal_rows_are_saved_and_loaded(tmp_path: Path) -> None:
    saved, other = unequal(5, 3), filled(tokens=4)
    saved.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert other.positions.tolist() == [5, 3]
    assert all(torch.equal(a, b) for a, b in zip(contents(saved), contents(other), strict=True))
    assert torch.equal(other.layers[2].start, saved.layers[2].start)  # type: ignore[union-attr, arg-type]
    three = filled(batch=3)
    with pytest.raises(RequestError, match="2 rows, this state has 3"):
        three.load(tmp_path / "state")
    assert three.position == 5


def ones(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, tokens, 1, 2, dtype=dtype), torch.ones(1, tokens, 1, 2, dtype=dtype)


def test_a_full_buffer_gets_room_in_steps_or_as_much_as_was_reserved() -> None:
    least, most = GROWTH
    for tokens, room in ((1, least), (100, 100), (most, most), (most + 9, most)):
        state = KVState(*ones(0))
        state.append(*ones(tokens))
        assert state.bytes(None) == state.bytes(tokens + room)
    state.reserve(40)
    state.append(*ones(room))
    assert state.bytes(None) == state.bytes(tokens + room)  # there was room: nothing is made anew
    state.append(*ones(40))
    assert state.bytes(None) == state.bytes(tokens + room + 40 + most)
    state = KVState(*ones(0))
    state.reserve(40)
    state.append(*ones(3))
    assert state.bytes(None) == state.bytes(40)


def test_keys_have_the_type_of_the_newest_ones() -> None:
    state = KVState(*ones(0))
    state.append(*ones(3, torch.bfloat16))
    assert state.k.dtype == state.v.dtype == torch.bfloat16
    held = state.k.data_ptr()
    state.append(*ones(1, torch.bfloat16))
    assert state.k.data_ptr() == held
    state.append(*ones(1))
    assert state.k.dtype == torch.float32
    assert torch.equal(state.k, ones(5)[0])
