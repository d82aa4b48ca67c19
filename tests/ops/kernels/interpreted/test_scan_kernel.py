"""Selective scan's kernels in the interpreter, in float32, against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hinny.ops import selective_scan, selective_scan_recurrence, selective_scan_step, use_backend
from hinny.ops.kernels import launches
from hinny.ops.kernels import scan as scan_kernels

GRADIENTS = {"CHUNKS": 2, "PROGRAMS": 1, "EDGE_BYTES": 2 ** 30, "num_warps": 1, "num_stages": 1}
WALK = {"U": 8, "num_warps": 1, "num_stages": 1, "PROGRAMS": 2112, "ENOUGH": 300, "SHORTEST": 64}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(b: int, t: int, d: int, n: int, full: bool = True) -> dict[str, Tensor]:
    inputs = {"x": normal(b, t, d, seed=0), "dt": normal(b, t, d, seed=1), "A": -normal(d, n, seed=2).exp(),
              "B": normal(b, t, n, seed=3), "C": normal(b, t, n, seed=4)}
    if not full:
        return inputs | {"dt": inputs["dt"].abs()}
    return inputs | {"D": normal(d, seed=5), "z": normal(b, t, d, seed=6), "dt_bias": normal(d, seed=7),
                     "initial_state": normal(b, d, n, seed=8)}


def gradients(run: Callable, inputs: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient to every input of a mixture of them that is the same in any precision."""
    inputs = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
    outputs = list(run(**inputs))
    total = sum((o * normal(*o.shape, seed=900 + i).to(o.dtype)).sum() for i, o in enumerate(outputs))
    found = torch.autograd.grad(total, list(inputs.values()))
    return [o.detach() for o in outputs], dict(zip(inputs, found, strict=True))


def check(inputs: dict[str, Tensor], tolerance: float = 2e-6, **options: object) -> None:
    expected, expected_grads = gradients(partial(selective_scan_recurrence, **options), inputs)
    with use_backend("triton"):
        outputs, grads = gradients(partial(selective_scan, **options), {k: v.float() for k, v in inputs.items()})
    for a, b in zip(outputs, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    for name, b in expected_grads.items():
        assert (grads[name].double() - b).norm() <= tolerance * b.norm(), name


def documents(*lengths: int) -> Tensor:
    ids = torch.tensor([7 if i % 2 == 0 else 3 for i in range(len(lengths))])
    return torch.repeat_interleave(ids, torch.tensor(lengths))[None]


def test_every_argument_with_every_gradient_and_documents() -> None:
    check(given(1, 21, 3, 3), dt_softplus=True, segments=documents(3, 13, 5))


def test_every_optional_argument_may_be_absent() -> None:
    check(given(2, 5, 3, 1, full=False))


def test_a_batch_in_pieces_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_kernels, "LARGEST_BATCH", 2)
    check(given(3, 5, 2, 2), dt_softplus=True, segments=documents(2, 3).expand(3, -1))


def test_spans_walked_at_once_equal_one_walk() -> None:
    with launches.trial({"scan_walk": WALK | {"SHORTEST": 16}}):
        check(given(1, 37, 2, 2), dt_softplus=True, segments=documents(18, 19))


def test_states_over_warps_and_pieces_of_a_sequence_equal_one_of_each() -> None:
    """The backward takes 16 tokens at a time, of 3 states of 2 channels, and carries the states' gradients on."""
    uses = {"scan_walk": WALK | {"U": 4, "num_warps": 2}, "scan_walk_back": {"U": 8, "num_warps": 4, "num_stages": 1},
            "scan_gradients": GRADIENTS | {"EDGE_BYTES": 16 * 3 * 2 // 2}}
    with launches.trial(uses):
        check(given(1, 37, 2, 3), dt_softplus=True, segments=documents(18, 19))


def test_spans_and_pieces_and_groups_of_channels_equal_one_of_each() -> None:
    uses = {"scan_walk": WALK | {"SHORTEST": 16}, "scan_gradients": GRADIENTS | {"EDGE_BYTES": 16 * 33 // 2}}
    with launches.trial(uses):
        check(given(1, 33, 33, 1), dt_softplus=True)


def test_steps_repeat_the_sequence_whatever_the_state_s_memory() -> None:
    inputs = given(3, 4, 5, 3)
    expected, final = selective_scan_recurrence(**inputs, dt_softplus=True)
    inputs = {name: v.float() for name, v in inputs.items()}
    state = inputs.pop("initial_state")
    assert state.is_contiguous()
    for i in range(4):
        token = {name: v[:, i] if name in ("x", "dt", "B", "C", "z") else v for name, v in inputs.items()}
        with use_backend("triton"):
            y, state = selective_scan_step(**token, dt_softplus=True, initial_state=state)
        assert (y.double() - expected[:, i]).norm() <= 2e-6 * expected[:, i].norm()
    assert not state.is_contiguous()
    assert (state.double() - final).norm() <= 2e-6 * final.norm()


def test_one_token_has_gradients_and_goes_without_them() -> None:
    check(given(2, 1, 3, 2), dt_softplus=True)
    inputs = {name: v.float() for name, v in given(2, 1, 3, 2).items()}
    with use_backend("triton"):
        y, final = selective_scan(**inputs, dt_softplus=True)
    for a, b in zip((y, final), selective_scan_recurrence(**inputs, dt_softplus=True), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_a_document_does_not_feel_its_neighbours_at_all() -> None:
    inputs = {name: v.float() for name, v in given(1, 20, 2, 2).items()}
    other = {name: v.clone() for name, v in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name][:, :9] += 1
    results = []
    for v in (inputs, other):
        x = v["x"].requires_grad_()
        with use_backend("triton"):
            y, state = selective_scan(**v, dt_softplus=True, segments=documents(9, 11))
        results.append((y[:, 9:], state, torch.autograd.grad((y[:, 9:] ** 2).sum() + state.sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[0][2][:, :9] == 0).all()


def test_half_precision_inputs_keep_everything_inside_in_float32() -> None:
    halves = ("x", "dt", "B", "C", "z")
    inputs = {name: v.half() if name in halves else v.float() for name, v in given(1, 9, 3, 2).items()}
    with use_backend("triton"):
        y, final = selective_scan(**inputs, dt_softplus=True)
    expected, state = selective_scan_recurrence(**{name: v.double() for name, v in inputs.items()}, dt_softplus=True)
    assert y.dtype == torch.float16
    assert final.dtype == torch.float32
    assert (y.double() - expected).norm() <= 2 ** -11 * expected.norm()
    assert (final.double() - state).norm() <= 2e-6 * state.norm()


def test_the_operators_trace_with_shapes_that_change() -> None:
    inputs = {name: v.float() for name, v in given(1, 3, 2, 1).items()}
    initial = inputs.pop("initial_state").transpose(1, 2).contiguous()
    order = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    torch.library.opcheck(torch.ops.hinny.selective_scan.default, (*order, initial, None, True),
                          test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, dt, A, B, C, D, z, dt_bias = (mode.from_tensor(v) for v in order)
        y, final, _ = torch.ops.hinny.selective_scan(x, dt, A, B, C, D, z, dt_bias, None, None, True)
    assert (y.shape, final.shape) == ((1, 3, 2), (1, 1, 2))
