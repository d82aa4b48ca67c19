"""The constants of the prediction, fitted to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hinny import predict
from hinny.bench.generation_fit import calibrate, fit_all
from hinny.bench.generation_rows import point_of
from hinny.errors import ConfigError
from hinny.run import row

TRUE = predict.Calibration(0.85, 7e-6, 11e-6, "")


def made(variant: str, batch: int, context: int, tensor: int = 1, wrong: float = 1.0, machine: str = "x, NVIDIA H200",
         ) -> dict[str, Any]:
    """A decode row as fast as the constants say, or as many times so."""
    cut = f" tensor={tensor}" if tensor > 1 else ""
    found = row("decode", variant, 1.0, "tokens/s",
                shape=f"context={context} batch={batch} precision=bf16 state=fp32{cut}") | {"machine": machine}
    point = point_of(found)
    bytes_ = predict.decode_bytes(point.model, batch, context) / tensor
    layers = point.model.depth
    seconds = bytes_ / (0.85 * 4.8e12) + layers * 7e-6 + (layers * 11e-6 if tensor > 1 else 0)
    return found | {"value": wrong * batch / seconds}


POINTS = [made(name, batch, context, tensor) for name in ("8b-hybrid", "8b-transformer model.attention.n_kv_heads=8")
          for batch in (1, 8) for context in (1024, 16384) for tensor in (1, 2)]


def test_the_fit_finds_the_constants_that_made_the_rows() -> None:
    (fit,) = fit_all(POINTS)
    assert fit.hardware.name == "H200"
    assert (fit.calibration.share, fit.calibration.layer, fit.calibration.sum) == pytest.approx((0.85, 7e-6, 11e-6))
    assert max(fit.errors) < 1e-6
    (alone,) = fit_all([one for one in POINTS if "tensor" not in one["shape"]])
    assert (alone.calibration.share, alone.calibration.layer) == pytest.approx((0.85, 7e-6))
    assert alone.calibration.sum is None


def test_the_prediction_by_fitted_constants_is_the_speed_that_they_were_fitted_to() -> None:
    for one in POINTS:
        assert point_of(one).predicted(TRUE) == pytest.approx(one["value"], rel=1e-6)


def test_errors_say_how_far_the_prediction_is_from_each_point() -> None:
    (fit,) = fit_all([*POINTS, made("8b-hybrid", 4, 4096, wrong=0.8)])
    assert max(fit.errors) > 0.1
    assert len(fit.errors) == len(POINTS) + 1


def test_points_that_arithmetic_bounds_have_no_part() -> None:
    slow = [made("8b-transformer", 16384, 16, wrong=0.01)]
    assert fit_all(POINTS + slow)[0].calibration.share == pytest.approx(0.85)


@pytest.mark.parametrize("rows", [POINTS[:1], [one for one in POINTS if "tensor" in one["shape"]]])
def test_too_few_kinds_of_points_are_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="cannot tell its 2 constants apart"):
        fit_all(rows)


def test_the_command_prints_constants_and_their_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*POINTS, made("8b-hybrid", 1, 64, machine="a CPU")]))
    found = {one["what"]: one for one in calibrate([file])}
    assert found["calibration.share"]["value"] == pytest.approx(0.85)
    assert found["calibration.layer"]["value"] == pytest.approx(7.0)
    assert found["calibration.sum"]["value"] == pytest.approx(11.0)
    assert found["calibration.error"]["high"] < 1e-6
    file.write_text("[]")
    with pytest.raises(ConfigError, match="no decode rows"):
        calibrate([file])


def test_a_row_of_another_bench_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no row of hinny bench generate --recipe"):
        point_of(row("decode", "8b-hybrid", 1.0, "tokens/s", shape="context=8 batch=1"))
