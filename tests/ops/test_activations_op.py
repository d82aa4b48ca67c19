"""Activations against their formulas, in float64 unless said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_same, normal
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hinny.ops import relu2, swiglu


def test_activations_equal_their_formulas_with_every_gradient() -> None:
    assert_same(relu2, lambda x: F.relu(x) ** 2, {"x": normal(3, 5, 7, seed=0)})
    assert_same(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up,
                {"gate": normal(3, 5, 7, seed=0), "up": normal(3, 5, 7, seed=1)})


def test_squared_relu_is_flat_at_zero_and_keeps_nan() -> None:
    x = torch.tensor([0.0, -0.0, -1.0, torch.nan], requires_grad=True)
    y = relu2(x)
    assert y[:3].tolist() == [0, 0, 0]
    assert y[3].isnan()
    assert torch.autograd.grad(y[:3].sum(), x)[0][:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_inputs_type_stays_under_autocast_and_is_rounded_to_once(dtype: torch.dtype) -> None:
    gate, up = (normal(40, 50, seed=i).to(dtype).requires_grad_() for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = relu2(gate), swiglu(gate, up)
    found = (*outputs, *torch.autograd.grad(outputs[0].sum(), gate),
             *torch.autograd.grad(outputs[1].sum(), (gate, up)))
    assert {v.dtype for v in found} == {dtype}
    exact_gate, exact_up = (v.detach().double().requires_grad_() for v in (gate, up))
    outputs = F.relu(exact_gate) ** 2, F.silu(exact_gate) * exact_up
    exact = (*outputs, *torch.autograd.grad(outputs[0].sum(), exact_gate),
             *torch.autograd.grad(outputs[1].sum(), (exact_gate, exact_up)))
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-6)


def test_no_more_is_kept_than_what_was_given() -> None:
    kept: list[Tensor] = []
    gate, up = (normal(4, seed=i).bfloat16().requires_grad_() for i in range(2))
    with saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        relu2(gate)
        swiglu(gate, up)
    assert [v.data_ptr() for v in kept] == [gate.data_ptr(), gate.data_ptr(), up.data_ptr()]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"swiglu: up has shape \(1, 3\); it must be \(2, 3\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(1, 3))
