"""A saved state comes back whole, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import SECTIONS, small_model

from hinny.errors import RequestError
from hinny.state import State

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
