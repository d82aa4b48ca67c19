"""Linear layer and cross-entropy over the paper's vocabulary. mamba_ssm has none."""

from __future__ import annotations

from functools import partial

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text


def cases() -> list[Case]:
    """8192 tokens of the 8B models, and a step of the small study's."""
    return [*(loss_case(rows=8192, d=4096, v=256000, training=training) for training in (False, True)),
            loss_case(rows=32768, d=768, v=8192, training=True)]


def loss_case(*, rows: int, d: int, v: int, training: bool) -> Case:
    """The mean loss alone, or with the gradients of x and weight: in one, as an op may make those in its forward."""
    inputs, product = 2 * (rows * d + v * d), 2 * rows * d * v
    # training: x, weight in, their gradients out; the logits and two products from their gradient
    return Case("loss.training" if training else "loss.forward", shape_text(rows=rows, d=d, v=v),
                partial(_inputs, rows=rows, d=d, v=v), ops.linear_cross_entropy,
                moved=2 * inputs if training else inputs, flops=3 * product if training else product,
                wanted=("x", "weight") if training else (), whole=training)


def _inputs(draw: Draw, *, rows: int, d: int, v: int) -> Inputs:
    return {"x": draw.normal(rows, d), "weight": draw.normal(v, d).mul_(d ** -0.5), "targets": draw.whole(v, rows)}
