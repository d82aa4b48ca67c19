"""The constants of the prediction, fitted to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hinny import predict
from hinny.bench.generation_fit import calibrate, errors_of, fit_all
from hinny.bench.generation_rows import point_of
from hinny.config import load_recipe
from hinny.errors import ConfigError
from hinny.run import row
from hinny.show import show

TRUE = predict.Calibration(0.85, 7e-6, 11e-6, "")


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CALIBRATED", {})


def made(variant: str, batch: int, context: int, tensor: int = 1, wrong: float = 1.0, machine: str = "x, NVIDIA H200",
         ) -> dict[str, Any]:
    """A decode row as fast as the constants say, or as many times so."""
    cut = f" tensor={tensor}" if tensor > 1 else ""
    found = row("decode", variant, 1.0, "tokens/s",
                shape=f"context={context} batch={batch} precision=bf16 state=fp32{cut}") | {
                    "machine": machine, "commit": "0123abc"}
    point = point_of(found)
    bytes_ = predict.decode_bytes(point.model, batch, context) / tensor
    layers = point.model.depth
    seconds = bytes_ / (0.85 * 4.8e12) + layers * 7e-6 * batch ** 0.5 + (layers * 11e-6 if tensor > 1 else 0)
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


def test_the_prediction_by_fitted_constants_is_the_speed_that_they_were_fitted_to(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(predict.CALIBRATED, "H200", TRUE)
    for one in POINTS:
        assert point_of(one).predicted() == pytest.approx(one["value"], rel=1e-6)
        assert _shown(one) == pytest.approx(one["value"], rel=1e-6)
    (errors,) = errors_of([*POINTS, made("8b-hybrid", 4, 4096, wrong=0.8)])
    assert errors.calibration == TRUE
    assert errors.worst == (pytest.approx(0.25), made("8b-hybrid", 4, 4096, wrong=0.8))


def _shown(one: dict[str, Any]) -> float:
    """What hinny show says of a row's point."""
    name, *changes = one["variant"].split()
    point = point_of(one)
    recipe = load_recipe(name, [*changes, f"parallel.tensor={point.tensor}"])
    figures = show(recipe, hardware="H200", batch=point.batch, contexts=[point.context])
    return figures["predictions"]["decode"][0]["tokens_per_s"]


def test_errors_say_how_far_the_prediction_is_from_each_point() -> None:
    (fit,) = fit_all([*POINTS, made("8b-hybrid", 4, 4096, wrong=0.8)])
    # one point is 20 % slow: the largest error is halved by going half of the way to it
    assert 0.09 < max(fit.errors) < 0.13
    assert len(fit.errors) == len(POINTS) + 1


def test_points_that_arithmetic_bounds_or_of_other_kernels_have_no_part() -> None:
    slow = [made("8b-transformer", 16384, 16, wrong=0.01)]
    short = [one | {"shape": one["shape"].replace("bf16", "int8"), "value": 1.0} for one in POINTS]
    assert fit_all([*POINTS, *slow, *short])[0].calibration.share == pytest.approx(0.85)
    assert fit_all(short) == []


def test_a_layer_never_takes_negative_time() -> None:
    # the smaller the step, the slower than its bytes, but for what a layer costs
    rows = [made("8b-hybrid", batch, context, wrong=0.9 if batch == 1 else 1.3) for batch in (1, 32)
            for context in (1024, 65536)]
    (fit,) = fit_all(rows)
    assert fit.calibration.layer == 0
    bytes_ = [point_of(one).bytes for one in rows]
    seconds = [point_of(one).batch / one["value"] for one in rows]
    reached = [size / time / 4.8e12 for size, time in zip(bytes_, seconds, strict=True)]
    assert min(reached) < fit.calibration.share < max(reached)


@pytest.mark.parametrize("rows", [POINTS[:1], [one for one in POINTS if "tensor" in one["shape"]]])
def test_too_few_kinds_of_points_are_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="cannot tell its 2 constants apart"):
        fit_all(rows)


def test_the_command_prints_constants_and_their_error_and_an_entry_of_the_table(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*POINTS, made("8b-hybrid", 1, 64, machine="a CPU")]))
    found = {one["what"]: one for one in calibrate([file])}
    assert found["calibration.share"]["value"] == pytest.approx(0.85)
    assert found["calibration.layer"]["value"] == pytest.approx(7.0)
    assert found["calibration.sum"]["value"] == pytest.approx(11.0)
    assert found["calibration.error"]["high"] < 1e-6
    said = caplog.messages[0].split(":\n")[1]
    entry = eval("{" + said + "}", {"Calibration": predict.Calibration})
    assert entry == {"H200": predict.Calibration(0.85, 7e-6, 1.1e-5, "NVIDIA H200, commit 0123abc")}
    file.write_text("[]")
    with pytest.raises(ConfigError, match="no decode rows"):
        calibrate([file])


def test_a_row_of_another_bench_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no row of hinny bench generate --recipe"):
        point_of(row("decode", "8b-hybrid", 1.0, "tokens/s", shape="context=8 batch=1"))
