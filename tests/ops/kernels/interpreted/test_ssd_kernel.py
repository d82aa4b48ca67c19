"""SSD's kernels against the recurrence in float64: outputs, final state, every gradient. Tiles are the shipped ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hinny.errors import BackendError
from hinny.ops import ssd, ssd_recurrence
from hinny.ops.backend import use_backend
from hinny.ops.kernels import ssd as ssd_kernels
from hinny.ops.kernels import ssd_call

EVERYTHING = ("D", "z", "dt_bias", "initial_state")
TOLERANCE = 5e-6
"""Of a relative error in float32, whose rounding is 6e-8; the longest sums have a few hundred parts."""


def given(b: int, t: int, h: int, p: int, g: int, n: int, *wanted: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * t + h)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = {"x": normal(b, t, h, p), "dt": normal(b, t, h), "A": -normal(h).abs() - 0.1, "B": normal(b, t, g, n),
              "C": normal(b, t, g, n), "D": normal(h), "z": normal(b, t, h, p), "dt_bias": normal(h),
              "initial_state": normal(b, h, p, n)}
    return {name: v.float().double() for name, v in values.items() if name in ("x", "dt", "A", "B", "C", *wanted)}


def results(op: Any, dtype: torch.dtype, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed random mixture of them."""
    inputs = {name: v.to(dtype).requires_grad_() for name, v in values.items()}
    y, state = op(**inputs, dt_softplus=True, **options)
    generator = torch.Generator().manual_seed(7)
    mixture = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in (y, state)]
    grads = torch.autograd.grad((y, state), list(inputs.values()), mixture)
    return {"y": y.detach(), "state": state.detach()} | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}


def expected(values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return results(ssd_recurrence, torch.float64, values, **options)


def relative(right: Tensor, found: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def assert_right(values: dict[str, Tensor], tolerance: float = TOLERANCE, **options: Any) -> None:
    with use_backend("triton"):
        found = results(ssd, torch.float32, values, **options)
    for name, right in expected(values, **options).items():
        error = relative(right, found[name])
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("t", [2, 31, 32, 33, 70])
def test_any_length(t: int) -> None:
    assert_right(given(1, t, 2, 16, 1, 16))


@pytest.mark.parametrize(("h", "p", "g", "n"), [(4, 32, 2, 16), (3, 8, 3, 20), (2, 16, 1, 64), (4, 24, 4, 16)])
def test_any_heads_groups_and_sizes(h: int, p: int, g: int, n: int) -> None:
    assert_right(given(2, 40, h, p, g, n, *EVERYTHING))


def test_documents_that_begin_anywhere() -> None:
    lengths = torch.tensor([1, 13, 18, 40, 3, 5])  # also at a chunk's edge, and one longer than a chunk
    segments = torch.repeat_interleave(torch.tensor([5, 2, 5, 2, 5, 2]), lengths).expand(2, -1).contiguous()
    assert_right(given(2, 80, 2, 16, 1, 16, *EVERYTHING), segments=segments)


def test_gaps_in_the_decays_keep_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that the Hopper kernels rely on, with kernels that run here."""
    monkeypatch.setattr(ssd_kernels, "_by_gaps", lambda x, B: True)
    lengths = torch.tensor([1, 13, 18, 40, 3, 5])
    segments = torch.repeat_interleave(torch.tensor([5, 2, 5, 2, 5, 2]), lengths).expand(2, -1).contiguous()
    # sums of decays reach 160 a document, so their differences are known to 1e-4 in a chunk of several
    assert_right(given(2, 80, 2, 16, 1, 16, *EVERYTHING), 1e-4, segments=segments)


def test_a_document_behind_a_gap_feels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_kernels, "_by_gaps", lambda x, B: True)
    segments = (torch.arange(70) // 35).expand(1, -1).contiguous()
    values = {name: v.float() for name, v in given(1, 70, 2, 16, 1, 16, "initial_state").items()}
    louder = values | {"x": torch.cat([values["x"][:, :35] * 1e6, values["x"][:, 35:]], 1)}
    with use_backend("triton"):
        quiet, loud = (ssd(**v, dt_softplus=True, segments=segments) for v in (values, louder))
    assert torch.equal(quiet[0][:, 35:], loud[0][:, 35:])
    assert torch.equal(quiet[1], loud[1])


@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_walked_in_parts(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = ssd_call.launch

    def in_parts(kernel: str, device: torch.device, **call: int) -> dict[str, int]:
        use = shipped(kernel, device, **call)
        return use | {"PROGRAMS": 1000, "SHORTEST": 1} if "SHORTEST" in use else use

    monkeypatch.setattr(ssd_call, "launch", in_parts)
    segments = (torch.arange(150) // 41).expand(1, -1).contiguous() if packed else None
    assert_right(given(1, 150, 2, 16, 1, 16, *EVERYTHING), segments=segments)


def test_flags_of_walks_are_lowered() -> None:
    """All of them, for heads that do not fill a program's last set, beside decays that do not change."""
    values = given(2, 150, 21, 16, 1, 16)
    call = ssd_call.Call("ssd_forward", values["x"].float(), values["B"].float())
    flags = torch.full((2, 21), 2 ** 40 + 1)
    decays = call.prepare(values["dt"].float(), None, values["A"].float(), True, None, flags)
    assert not flags.any()
    assert torch.equal(decays, call.prepare(values["dt"].float(), None, values["A"].float(), True, None))


def test_heads_of_a_group_shared_by_programs() -> None:
    assert_right(given(1, 33, 8, 16, 2, 16, "D"))


def test_extreme_steps_and_decays_are_as_right_as_the_torch_form() -> None:
    values = given(1, 70, 2, 16, 1, 16, "D", "initial_state")
    values["dt"] = values["dt"] * 20  # steps from e-20 to 60
    values["A"] = torch.tensor([-40.0, -1e-4], dtype=torch.float64)
    with use_backend("torch"):
        others = results(ssd, torch.float32, values)
    # sums of decays reach thousands, so their differences are known to 1e-4: in either form
    assert_right(values, 1.5 * max(relative(v, others[name]) for name, v in expected(values).items()))


def test_strided_parameters_and_a_batch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_kernels, "LARGEST_BATCH", 2)
    values = given(3, 33, 2, 16, 1, 16, *EVERYTHING)
    wide = {name: torch.stack([v, v + 9], -1) for name, v in values.items() if name in ("A", "D", "dt_bias")}

    def strided(**inputs: Any) -> tuple[Tensor, Tensor]:
        views = {name: torch.stack([inputs[name], inputs[name] + 9], -1)[:, 0] for name in wide}
        assert not any(v.is_contiguous() for v in views.values())
        return ssd(**{**inputs, **views})

    with use_backend("triton"):
        found = results(strided, torch.float32, values)
    for name, right in expected(values).items():
        assert relative(right, found[name]) < TOLERANCE, name


def test_heads_too_large_for_the_kernels_are_refused_by_name_and_left_to_torch_otherwise() -> None:
    values = {name: v.float() for name, v in given(1, 5, 1, 160, 1, 16).items()}
    with use_backend("triton"), pytest.raises(BackendError, match="head_dim 160"):
        ssd(**values)
    assert ssd(**values)[0].shape == (1, 5, 1, 160)


def test_gradients_have_the_types_of_the_inputs() -> None:
    values = {name: v.half() if name in ("x", "B", "C", "dt") else v.float()
              for name, v in given(1, 40, 2, 16, 1, 16, "D", "dt_bias").items()}
    inputs = {name: v.requires_grad_() for name, v in values.items()}
    with use_backend("triton"):
        y, state = ssd(**inputs, dt_softplus=True)
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    for value, grad in zip(inputs.values(), torch.autograd.grad(y.float().sum(), list(inputs.values())), strict=True):
        assert grad.dtype == value.dtype
