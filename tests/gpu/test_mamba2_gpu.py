"""A Mamba-2 layer's convolutions and SSD on a GPU: fused or not, they are the two ops one after the other, bit for bit.

Those are held to float64 by their own tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hinny.ops import causal_conv, mamba2, ssd, use_backend
from hinny.ops.kernels import hopper
from hinny.ops.kernels import mamba2 as kernels

pytestmark = pytest.mark.gpu
SHAPES = [(40, 64, 4, 128), (40, 128, 2, 64), (72, 64, 1, 64)]


def inputs(seed: int, b: int, t: int, h: int, p: int, g: int, n: int, *, width: int = 4, biased: bool = True,
           states: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda").to(dtype)

    sizes, half = (h * p, g * n, g * n), torch.bfloat16
    found = {"x": normal(b, t, h, p, dtype=half), "dt": normal(b, t, h, dtype=half), "A": -normal(h).abs() * 4 - 0.01,
             "B": normal(b, t, g, n, dtype=half), "C": normal(b, t, g, n, dtype=half), "D": normal(h),
             "dt_bias": normal(h) - 2}
    found |= {f"w{i}": normal(ch, width) / 2 for i, ch in enumerate(sizes)}
    found |= {f"b{i}": normal(ch) / 2 for i, ch in enumerate(sizes)} if biased else {}
    return found | ({"initial_state": normal(b, h, p, n), "conv_state": normal(b, sum(sizes), width - 1)}
                    if states else {})


def mixed(segments: Tensor | None = None, **v: Tensor) -> tuple[Tensor, ...]:
    weights, biases = tuple(v.pop(f"w{i}") for i in range(3)), tuple(v.pop(f"b{i}", None) for i in range(3))
    return mamba2(**v, weights=weights, biases=None if biases[0] is None else biases, dt_softplus=True,
                  segments=segments)


def fused(**v: Any) -> tuple[Tensor, ...]:
    with use_backend("triton"):
        return mixed(**v)


def apart(segments: Tensor | None = None, **v: Tensor) -> tuple[Tensor, ...]:
    sizes = [v[name].shape[2] * v[name].shape[3] for name in "xBC"]
    befores = v.pop("conv_state").split(sizes, 1) if "conv_state" in v else (None,) * 3
    parts, afters = {}, []
    with use_backend("triton"):
        for i, name in enumerate("xBC"):
            y, after = causal_conv(v[name].flatten(2), v.pop(f"w{i}"), v.pop(f"b{i}", None), activation="silu",
                                   initial_state=befores[i], segments=segments)
            parts[name] = y.view(v[name].shape)
            afters.append(after)
        y, state = ssd(**v | parts, dt_softplus=True, segments=segments)
    return y, state, torch.cat(afters, 1)


def results(run: Any, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    values = {name: v.detach().clone().requires_grad_() for name, v in given.items()}
    outputs = run(**values, **options)
    draw = torch.Generator("cuda").manual_seed(99)
    mixture = [torch.randn(v.shape, generator=draw, device="cuda").to(v.dtype) for v in outputs]
    grads = torch.autograd.grad(outputs, list(values.values()), mixture)
    names = [*("y", "state", "conv"), *(f"d{name}" for name in values)]
    return dict(zip(names, [*(v.detach() for v in outputs), *grads], strict=True))


def assert_equal(given: dict[str, Tensor], **options: Any) -> None:
    expected = results(apart, given, **options)
    for name, v in results(fused, given, **options).items():
        assert torch.equal(v, expected[name]), name
    with torch.no_grad():
        for v, name in zip(fused(**given, **options), ("y", "state", "conv"), strict=True):
            assert torch.equal(v, expected[name]), f"{name} without gradients"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every launch of the fused kernel."""
    counted: list[int] = []
    launch = kernels.hopper_convolved.forward
    monkeypatch.setattr(kernels.hopper_convolved, "forward", lambda *args: (counted.append(1), launch(*args))[1])
    return counted


def test_one_kernel_equals_the_two_with_every_gradient(calls: list[int]) -> None:
    if not hopper.takes(*(torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in "xB")):
        pytest.skip("the fused kernel is for Hopper GPUs")

    @settings(max_examples=14, deadline=None, derandomize=True)
    @given(shape=st.sampled_from(SHAPES), t=st.integers(2, 400), width=st.sampled_from([4, 4, 2, 3]),
           biased=st.booleans(), states=st.booleans(), seed=st.integers(0, 99))
    def check(shape: tuple[int, ...], t: int, width: int, biased: bool, states: bool, seed: int) -> None:
        calls.clear()
        assert_equal(inputs(seed, 2, t, *shape, width=width, biased=biased, states=states))
        assert len(calls) == 2

    check()
    for t in (2, 3, 64, 65):
        assert_equal(inputs(t, 2, t, *SHAPES[0]))


def test_what_the_fused_kernel_does_not_take_runs_on_the_two(calls: list[int]) -> None:
    given = inputs(1, 2, 200, *SHAPES[0])
    assert_equal(given, segments=(torch.arange(200, device="cuda") // 70).expand(2, -1))
    assert_equal(inputs(2, 1, 1500, 4, 64, 2, 128))  # few heads: a sequence is walked in parts
    assert not calls


def test_parts_of_one_wide_projection_are_read_where_they_are() -> None:
    given = inputs(3, 2, 130, *SHAPES[0], states=False)
    b, t, h, p = given["x"].shape
    wide = torch.randn(b, t, 2 * h * p + 64, device="cuda").to(torch.bfloat16)
    wide[..., 64:64 + h * p] = given["x"].flatten(2)
    with torch.no_grad():
        strided = fused(**given | {"x": wide[..., 64:64 + h * p].unflatten(2, (h, p))})
        for a, c in zip(strided, fused(**given), strict=True):
            assert torch.equal(a, c)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_traced_whole_and_checkpointed() -> None:
    given = {name: v.requires_grad_() for name, v in inputs(4, 2, 100, *SHAPES[0]).items()}
    names = list(given)

    def run(*tensors: Tensor) -> Tensor:
        y, state, conv = mixed(**dict(zip(names, tensors, strict=True)))
        return y.float().square().sum() + state.sum() + conv.sum()

    def checkpointed(*tensors: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False)

    values = list(given.values())
    with use_backend("triton"):
        plain, again, traced = (torch.autograd.grad(call(*values), values)
                                for call in (run, checkpointed, torch.compile(run, fullgraph=True)))
    for a, b, c in zip(plain, again, traced, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - c.double()).norm() <= 1e-2 * a.double().norm()
