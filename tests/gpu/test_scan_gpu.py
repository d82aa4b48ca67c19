"""Selective scan's kernels on a GPU: outputs, final state and every gradient against the recurrence in float64, beside
the torch form in the same type. Both keep everything inside in float32, so both round their results alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hinny.ops import selective_scan, selective_scan_recurrence, selective_scan_step, use_backend
from hinny.ops.kernels import hopper, launches, scan_fast

pytestmark = pytest.mark.gpu
SEQUENCES = ("x", "dt", "B", "C", "z")
FLOOR = 1e-6
scan = partial(selective_scan, dt_softplus=True)


def draw(b: int, t: int, d: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=random)

    inputs = {"x": normal(b, t, d), "dt": normal(b, t, d) - 1, "A": -normal(d, n).exp(), "B": normal(b, t, n),
              "C": normal(b, t, n), "D": normal(d), "z": normal(b, t, d), "dt_bias": normal(d),
              "initial_state": normal(b, d, n)}
    return {name: v.to(dtype) if name in SEQUENCES else v for name, v in inputs.items()}


def documents(b: int, t: int, lengths: list[int]) -> Tensor:
    """Segment ids of documents of these lengths, again and again, ids that come back."""
    ids = [i % 3 for i in range(t) for _ in range(lengths[i % len(lengths)])][:t]
    return torch.tensor(ids, device="cuda").expand(b, t).contiguous()


def gradients(run: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradient to every input of a mixture of them that is the same in any precision."""
    inputs = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    outputs = dict(zip(("y", "final"), run(**inputs), strict=True))
    total = 0
    for i, o in enumerate(outputs.values()):
        mixture = torch.randn(o.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(900 + i))
        total = total + (o * mixture.to(torch.bfloat16).to(o.dtype)).sum()
    found = torch.autograd.grad(total, list(inputs.values()))
    return {name: v.detach() for name, v in outputs.items()} | dict(zip(inputs, found, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


def check(inputs: dict[str, Tensor], floor: float = FLOOR, **options: Any) -> None:
    """Kernels are off by 1.5 times what the torch form is off, at most."""
    exact = gradients(partial(selective_scan_recurrence, **options), {name: v.double() for name, v in inputs.items()})
    run = partial(selective_scan, **options)
    with use_backend("torch"):
        plain = gradients(run, inputs)
    with use_backend("triton"):
        found = gradients(run, inputs)
        again = gradients(run, inputs)
    for name, right in exact.items():
        assert found[name].dtype == plain[name].dtype, name
        assert error(found[name], right) <= 1.5 * error(plain[name], right) + floor, name
        assert torch.equal(found[name], again[name]), name


@settings(max_examples=12, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 260), d=st.integers(1, 80), seed=st.integers(0, 9),
       lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_packed_documents_with_every_gradient(b: int, t: int, d: int, seed: int, lengths: list[int]) -> None:
    check(draw(b, t, d, 16, seed, torch.bfloat16), dt_softplus=True, segments=documents(b, t, lengths))


@settings(max_examples=6, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 120), d=st.integers(1, 80), seed=st.integers(0, 9),
       rates=st.sampled_from([None, 50.0, 1e-8]))
def test_float32_with_every_gradient_and_extreme_decays(b: int, t: int, d: int, seed: int, rates: float | None) -> None:
    inputs = draw(b, t, d, 16, seed)
    if rates is not None:
        inputs["A"] = torch.full_like(inputs["A"], -rates)
    check(inputs, dt_softplus=True)


def test_128_states_with_every_gradient() -> None:
    check(draw(2, 70, 50, 128, dtype=torch.bfloat16), dt_softplus=True)


def test_every_optional_argument_may_be_absent() -> None:
    inputs = draw(2, 50, 40, 5)
    inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    check(inputs | {"dt": inputs["dt"].abs()})


def test_half_precision_and_one_token() -> None:
    inputs = draw(3, 40, 70, 16, dtype=torch.float16)
    expected, final = selective_scan_recurrence(**{name: v.double() for name, v in inputs.items()}, dt_softplus=True)
    with use_backend("triton"):
        y, state = scan(**inputs)
        assert error(y, expected) < 2 ** -11
        assert error(state, final) < FLOOR
        state = inputs["initial_state"]
        for i in range(40):
            token = {name: v[:, i] if name in SEQUENCES else v for name, v in inputs.items()}
            y, state = selective_scan_step(**token | {"initial_state": state}, dt_softplus=True)
    assert error(y, expected[:, -1]) < 2 ** -11
    assert error(state, final) < FLOOR


def test_step_sizes_keep_their_relative_precision() -> None:
    """The outputs are the steps themselves: one token, a state of zero, and ones."""
    dt = torch.linspace(-80, 30, 4096, device="cuda")[None]
    one = torch.ones(1, 1, device="cuda")
    with use_backend("triton"):
        y, _ = selective_scan_step(torch.ones_like(dt), dt, -torch.ones(4096, 1, device="cuda"), one, one,
                                   dt_softplus=True)
    right = torch.nn.functional.softplus(dt.double(), threshold=1000)
    assert ((y - right).abs() / right).max() < 2 ** -20


def test_pieces_of_the_backward_equal_the_whole() -> None:
    """16 tokens a piece, states' gradients carried on, beside everything at once; and spans walked at once."""
    inputs, ids = draw(2, 200, 40, 16, dtype=torch.bfloat16), documents(2, 200, [70, 31])
    device = inputs["x"].device
    walk, back = (launches.find(launches.generation(device), name, n=16) for name in ("scan_walk", "scan_gradients"))
    back |= {"EDGE_BYTES": 16 * 40 * 16 // 2, "CHUNKS": 2, "PROGRAMS": 1}
    with use_backend("triton"):
        whole = gradients(partial(scan, segments=ids), inputs)
        for change in ({"ENOUGH": 0}, {"SHORTEST": 16}):
            with launches.trial({"scan_walk": walk | change, "scan_gradients": back}):
                found = gradients(partial(scan, segments=ids), inputs)
            for name, v in whole.items():
                # sums in another order, rounded to bfloat16 or kept
                assert error(found[name], v.double()) < (2 ** -9 if v.dtype == torch.bfloat16 else 1e-5), name


@contextmanager
def fast(processors: int = 132, **change: int) -> Iterator[None]:
    """Inside, the kernels for Hopper GPUs take however few programs, and have to be launched, and no others."""
    device = torch.empty(0, device="cuda").device
    if not hopper.runs_on(device):
        pytest.skip("these kernels are for Hopper GPUs and one version of Triton")
    use = launches.find("sm90", "scan_fast_gradients") | {"ENOUGH": 1} | change
    with use_backend("triton"), launches.trial({"scan_fast_gradients": use}) as seen, pytest.MonkeyPatch.context() as m:
        m.setattr(scan_fast, "processors", lambda device: processors)
        yield
    names = {kernel for kernel, _ in seen}
    assert {"scan_fast_walk", "scan_fast_gradients"} <= names
    assert not names & {"scan_walk", "scan_walk_back", "scan_gradients"}


def check_fast(inputs: dict[str, Tensor], warps: int = 8, **options: Any) -> None:
    """`check` of the kernels for Hopper GPUs; `use_backend` of the torch form is the inner one there."""
    with fast(num_warps=warps):
        check(inputs, 3 * FLOOR, dt_softplus=True, **options)


@settings(max_examples=16, deadline=None)
@given(b=st.integers(1, 3), t=st.integers(1, 140), d=st.sampled_from([16, 64, 80, 144]),
       n=st.sampled_from([34, 64, 100, 128]), seed=st.integers(0, 9), warps=st.sampled_from([4, 8]),
       lengths=st.one_of(st.none(), st.lists(st.integers(1, 50), min_size=1, max_size=4)))
def test_hopper_kernels_give_every_gradient_with_and_without_documents(
    b: int, t: int, d: int, n: int, seed: int, warps: int, lengths: list[int] | None
) -> None:
    segments = None if lengths is None else documents(b, t, lengths)
    check_fast(draw(b, t, d, n, seed, torch.bfloat16), warps, segments=segments)


@pytest.mark.parametrize("absent", [
    ("z",), ("D",), ("dt_bias",), ("initial_state",), ("z", "D", "dt_bias", "initial_state")])
@pytest.mark.parametrize(("n", "t", "warps"), [(128, 67, 8), (50, 41, 8), (128, 67, 4)])
def test_hopper_kernels_may_leave_out_every_optional_argument(
    n: int, t: int, warps: int, absent: tuple[str, ...]
) -> None:
    inputs = draw(2, t, 80, n, dtype=torch.bfloat16)
    check_fast({name: v for name, v in inputs.items() if name not in absent}, warps)


def test_hopper_kernels_take_steps_as_they_are_and_extreme_decays() -> None:
    inputs = draw(2, 45, 64, 40, dtype=torch.bfloat16)
    del inputs["dt_bias"]
    inputs["dt"] = inputs["dt"].abs()
    for rate in (50.0, 1e-8):
        with fast():
            check(inputs | {"A": torch.full_like(inputs["A"], -rate)}, 3 * FLOOR, segments=documents(2, 45, [20, 3]))


def test_hopper_kernels_in_pieces_of_rows_and_tokens_equal_the_whole_and_the_other_kernels() -> None:
    """Of five rows two at a time, 64 tokens and then 36, beside all at once; shapes that are odd and even to lanes."""
    inputs, ids = draw(5, 100, 112, 96, dtype=torch.bfloat16), documents(5, 100, [70, 21])
    run = partial(scan, segments=ids)
    with use_backend("triton"):
        others = gradients(run, inputs)
    with fast():
        whole = gradients(run, inputs)
    with fast(EDGE_BYTES=2 * 64 * 112 * 96 // 2, processors=5):
        pieces = gradients(run, inputs)
    with fast(EDGE_BYTES=2 * 64 * 112 * 96 // 2, processors=5, num_warps=4):
        halves = gradients(run, inputs)
    for name, v in whole.items():
        # sums in another order, rounded to bfloat16 or kept
        bound = 2 ** -9 if v.dtype == torch.bfloat16 else 1e-5
        assert error(pieces[name], v.double()) < bound, name
        assert error(halves[name], v.double()) < bound, name
        assert error(others[name], v.double()) < 2 * bound, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when its compiler is first imported
def test_hopper_kernels_compile_into_one_graph_and_are_checkpointed() -> None:
    inputs, ids = draw(2, 100, 64, 64, dtype=torch.bfloat16), documents(2, 100, [33, 20])
    run = partial(scan, segments=ids)
    for change in ({}, {"EDGE_BYTES": 32 * 64 * 64, "processors": 1}):
        with fast(**change):
            expected = gradients(run, inputs)
            compiled = gradients(torch.compile(run, backend="aot_eager", fullgraph=True), inputs)
            again = gradients(lambda **v: checkpoint(run, **v, use_reentrant=False), inputs)
            torch.compiler.reset()
        for name, v in expected.items():
            assert torch.equal(compiled[name], v), name
            assert torch.equal(again[name], v), name


def test_the_hopper_kernels_are_chosen_where_they_fill_the_gpu() -> None:
    """And give what the others give, at the shape of a training step's share."""
    inputs = draw(2, 1000, 2048, 128, dtype=torch.bfloat16)
    with use_backend("triton"), launches.trial() as seen:
        found = gradients(scan, inputs)
    chosen = {kernel for kernel, _ in seen}
    assert ("scan_fast_walk" in chosen) == hopper.runs_on(inputs["x"].device)
    with use_backend("triton"):
        others = [gradients(scan, {name: v[i:i + 1] if name in (*SEQUENCES, "initial_state") else v
                                   for name, v in inputs.items()}) for i in range(2)]
    for name in ("y", "final"):
        both = torch.cat([v[name] for v in others]).double()
        assert error(found[name], both) < (2 ** -8 if name == "y" else 1e-5), name


def test_it_compiles_into_one_graph_and_is_checkpointed() -> None:
    inputs, ids = draw(2, 100, 40, 16, dtype=torch.bfloat16), documents(2, 100, [33, 20])
    run = partial(scan, segments=ids)
    with use_backend("triton"):
        expected = gradients(run, inputs)
        compiled = gradients(torch.compile(run, backend="aot_eager", fullgraph=True), inputs)
        again = gradients(lambda **v: checkpoint(run, **v, use_reentrant=False), inputs)
    for name, v in expected.items():
        assert torch.equal(compiled[name], v), name
        assert torch.equal(again[name], v), name


def test_512k_tokens_and_more_than_2_to_the_31_elements() -> None:
    """The end of it, with gradients, equals the end alone from the state before it."""
    t, d, tail = 2 ** 19, 4096 + 32, 1000
    inputs = {name: v.to(torch.bfloat16) if name in SEQUENCES else v for name, v in draw(1, 1, d, 16).items()}
    random = torch.Generator("cuda").manual_seed(1)
    for name in SEQUENCES:
        width = 16 if name in ("B", "C") else d
        inputs[name] = torch.randn(1, t, width, device="cuda", dtype=torch.bfloat16, generator=random)
    inputs["dt"] -= 1
    assert inputs["x"].numel() > 2 ** 31
    ids = torch.zeros(1, t, dtype=torch.int64, device="cuda")
    ids[:, t - tail // 2:] = 1

    def end(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: w[:, -tail:] if name in SEQUENCES else w for name, w in v.items()}

    with use_backend("triton"):
        with torch.no_grad():
            _, before = scan(**{name: v[:, :-tail] if name in SEQUENCES else v for name, v in inputs.items()},
                             segments=ids[:, :-tail])
            dy = torch.zeros_like(inputs["x"])
            dy[:, -tail:] = torch.randn(tail, d, device="cuda")
        found = []
        for given_, gradient, segments in ((inputs, dy, ids), (end(inputs) | {"initial_state": before}, dy[:, -tail:],
                                                                ids[:, -tail:])):
            leaves = {name: given_[name].detach().requires_grad_() for name in ("x", "dt", "B", "C", "z")}
            y, final = scan(**given_ | leaves, segments=segments)
            grads = torch.autograd.grad(y, list(leaves.values()), gradient)
            found.append([y[:, -tail:].detach(), final.detach(), *(grad[:, -tail:] for grad in grads)])
            del y, grads
    for a, b in zip(*found, strict=True):
        assert error(a, b.double()) < 2 ** -8
