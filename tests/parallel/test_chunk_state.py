"""What a chunk adds to a state and lets pass, against the recurrences; in float64 unless said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_same, normal, packed
from torch import Tensor

from hinny import ops
from hinny.parallel import chunk_state as module
from hinny.parallel.chunk_state import chunk_state, scan_decay


def inputs(b: int = 2, t: int = 9, g: int = 2, r: int = 2, p: int = 3, n: int = 4) -> dict[str, Tensor]:
    return {"x": normal(b, t, g * r, p, seed=0), "dt": normal(b, t, g * r, seed=1),
            "A": -normal(g * r, seed=2).exp(), "B": normal(b, t, g, n, seed=3), "dt_bias": normal(g * r, seed=4)}


def by_recurrence(segments: Tensor | None, softplus: bool = True):
    """added and decay by their meaning: the final state from zero, and how it changes with the initial one."""
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"dt_bias": dt_bias, "dt_softplus": softplus, "segments": segments}
        b, _, h, p = x.shape
        from_zero = ops.ssd_recurrence(x, dt, A, B, B, **options)[1]
        from_one = ops.ssd_recurrence(torch.zeros_like(x), dt, A, B, B, **options,
                                      initial_state=x.new_ones(b, h, p, B.shape[-1]))[1]
        return from_zero, from_one[..., 0, 0]
    return run


@pytest.mark.parametrize("lengths", [None, [9], [8, 1], [1, 8], [3, 2, 4], [1] * 9])
@pytest.mark.parametrize("at_once", [2 ** 26, 30])
def test_added_and_decay_are_those_of_the_recurrence_with_every_gradient(lengths, at_once, monkeypatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)  # 30: one token at a time
    segments = None if lengths is None else packed(lengths, 2)
    assert_same(lambda **v: chunk_state(**v, dt_softplus=True, segments=segments), by_recurrence(segments), inputs())


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 2), t=st.integers(1, 12), g=st.integers(1, 3), r=st.integers(1, 3), p=st.integers(1, 3),
       n=st.integers(1, 3), data=st.data())
def test_any_sizes_and_documents(b: int, t: int, g: int, r: int, p: int, n: int, data: st.DataObject) -> None:
    segments = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=t, max_size=t), min_size=b,
                                               max_size=b)))
    v = inputs(b, t, g, r, p, n) | {"dt": normal(b, t, g * r, seed=1).abs()}
    assert_same(lambda **v: chunk_state(**v, segments=segments), by_recurrence(segments, softplus=False),
                v | {"dt_bias": v["dt_bias"].abs()})


@pytest.mark.parametrize("lengths", [None, [5], [2, 3]])
def test_a_scan_keeps_the_decay_of_the_recurrence_with_every_gradient(lengths) -> None:
    segments = None if lengths is None else packed(lengths, 2)
    v = {"dt": normal(2, 5, 3, seed=0), "A": -normal(3, 4, seed=1).exp(), "dt_bias": normal(3, seed=2)}
    none = torch.zeros(2, 5, 3, dtype=torch.float64)

    def definition(dt: Tensor, A: Tensor, dt_bias: Tensor) -> Tensor:
        B = none.new_zeros(2, 5, 4)
        return ops.selective_scan_recurrence(none, dt, A, B, B, dt_bias=dt_bias, dt_softplus=True, segments=segments,
                                             initial_state=none.new_ones(2, 3, 4))[1]

    assert_same(lambda **v: scan_decay(**v, dt_softplus=True, segments=segments), definition, v)


def test_a_long_chunk_in_float32_weighs_its_last_tokens_exactly() -> None:
    # the steps sum to 1600 and more: as a difference of two such sums the last tokens' decays would be off by 1e-4
    v = inputs(t=4096) | {"dt": normal(2, 4096, 4, seed=1).abs() / 2, "dt_bias": torch.zeros(4)}
    exact = chunk_state(**v)[0]
    rounded = chunk_state(**{name: part.float() for name, part in v.items()})[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-6)


def test_low_precision_is_weighed_and_summed_in_float32() -> None:
    v = inputs(t=512)
    low = {name: part.bfloat16() if name in ("x", "dt", "B") else part.float() for name, part in v.items()}
    with torch.autocast("cpu", torch.bfloat16):
        added, decay = chunk_state(**low, dt_softplus=True)
    exact = chunk_state(**{name: part.double() for name, part in low.items()}, dt_softplus=True)
    assert added.dtype == decay.dtype == torch.float32
    # one rounding of each weighted x to 8 bits; sums in 8 bits would be off by ten times as much
    assert (added - exact[0]).abs().max() < 2 ** -8 * exact[0].abs().max()
    torch.testing.assert_close(decay.double(), exact[1], rtol=1e-3, atol=1e-12)


def test_nothing_of_the_inputs_size_is_kept_but_the_inputs() -> None:
    v = inputs(t=64, p=16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: part.requires_grad_() for name, part in v.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        added, _ = chunk_state(**leaves, dt_softplus=True)
    for leaf in leaves.values():
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    assert added.requires_grad
    assert sum(kept.values()) <= v["dt"].nbytes
