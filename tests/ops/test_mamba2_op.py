"""A Mamba-2 layer's convolutions and its SSD as one op: against the definitions of both, in float64."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_same, normal, packed
from torch import Tensor

from hinny.ops import causal_conv_reference, mamba2, ssd_recurrence

B_, T, H, P, G, N, W = 2, 9, 4, 3, 2, 5, 4
SIZES = (H * P, G * N, G * N)


def given(biased: bool = True, states: bool = True) -> dict[str, Tensor]:
    inputs = {"x": normal(B_, T, H, P, seed=0), "dt": normal(B_, T, H, seed=1), "A": -normal(H, seed=2).exp(),
              "B": normal(B_, T, G, N, seed=3), "C": normal(B_, T, G, N, seed=4), "D": normal(H, seed=5),
              "dt_bias": normal(H, seed=6)}
    inputs |= {f"w{i}": normal(ch, W, seed=10 + i) for i, ch in enumerate(SIZES)}
    if biased:
        inputs |= {f"b{i}": normal(ch, seed=20 + i) for i, ch in enumerate(SIZES)}
    if states:
        inputs |= {"initial_state": normal(B_, H, P, N, seed=30), "conv_state": normal(B_, sum(SIZES), W - 1, seed=31)}
    return inputs


def named(v: dict[str, Tensor]) -> dict[str, object]:
    """Weights and biases as the op takes them."""
    rest = {name: t for name, t in v.items() if name[0] not in "wb"}
    biases = tuple(v[f"b{i}"] for i in range(3)) if "b0" in v else None
    return rest | {"weights": tuple(v[f"w{i}"] for i in range(3)), "biases": biases}


def definition(segments: Tensor | None = None, activation: str | None = "silu", **v: Tensor) -> tuple[Tensor, ...]:
    befores = v.pop("conv_state").split(SIZES, 1) if "conv_state" in v else (None,) * 3
    weights, biases = [v.pop(f"w{i}") for i in range(3)], [v.pop(f"b{i}", None) for i in range(3)]
    parts, afters = [], []
    for name, weight, bias, before in zip("xBC", weights, biases, befores, strict=True):
        y, after = causal_conv_reference(v[name].flatten(2), weight, bias, activation=activation,
                                         initial_state=before, segments=segments)
        parts.append(y.view(v[name].shape))
        afters.append(after)
    x, B, C = parts
    y, state = ssd_recurrence(**v | {"x": x, "B": B, "C": C}, dt_softplus=True, segments=segments)
    return y, state, torch.cat(afters, 1)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_convolutions_and_then_the_recurrence_with_every_gradient(biased: bool, states: bool) -> None:
    assert_same(lambda **v: mamba2(**named(v), dt_softplus=True), definition, given(biased, states))


def test_documents_are_kept_apart_in_both() -> None:
    segments = packed([4, 2, 3], B_)
    assert_same(lambda **v: mamba2(**named(v), dt_softplus=True, segments=segments),
                lambda **v: definition(segments, **v), given())


def test_a_gate_and_no_activation_are_passed_on() -> None:
    assert_same(lambda z, **v: mamba2(**named(v), z=z, activation=None, dt_softplus=True),
                lambda z, **v: definition(activation=None, z=z, **v), given() | {"z": normal(B_, T, H, P, seed=7)})


def test_a_sequence_goes_on_where_its_states_end() -> None:
    inputs = given(states=False)
    whole, state, conv = mamba2(**named(inputs), dt_softplus=True)
    first, rest = ({name: v[:, part] if name in ("x", "dt", "B", "C") else v for name, v in inputs.items()}
                   for part in (slice(2), slice(2, None)))  # fewer tokens than the convolution remembers
    y, between, held = mamba2(**named(first), dt_softplus=True)
    after, end, last = mamba2(**named(rest), dt_softplus=True, initial_state=between, conv_state=held)
    for a, b in ((torch.cat((y, after), 1), whole), (end, state), (last, conv)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("changed", "message"), [
    ({"x": torch.zeros(B_, T, H * P)}, r"x has shape .* must be \(b t h p\)"),
    ({"B": torch.zeros(B_, T, G * N)}, r"B has shape .* must be \(b t g n\)"),
    ({"conv_state": torch.zeros(B_, SIZES[0], W - 1)}, "conv_state has shape"),
    ({"dt": torch.zeros(B_, T, H - 1)}, "dt has shape"), ({"w1": torch.zeros(SIZES[1], W + 1)}, "weight has"),
    ({"w0": torch.zeros(3, W)}, "weight has shape"), ({"b2": torch.zeros(3)}, "bias has shape"),
])
def test_arguments_that_do_not_fit_are_refused(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba2(**named(given() | changed), dt_softplus=True)
