"""docs/results/generation.md as it lies in the repository, with the constants as they are now."""

from __future__ import annotations

import json
from pathlib import Path

from hinny import predict
from hinny.bench.generation_fit import errors_of, fit_all
from hinny.bench.generation_report import render

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROWS = [one for file in sorted(RESULTS.glob("generation-*.json")) for one in json.loads(file.read_text())]


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    page, pictures = render(ROWS)
    assert (RESULTS / "generation.md").read_text() == page
    assert {name: (RESULTS / name).read_text() for name in pictures} == pictures


def test_the_constants_are_those_that_the_committed_rows_give() -> None:
    for fit in fit_all(ROWS):
        found, kept = fit.calibration, predict.CALIBRATED[fit.hardware.name]
        assert (kept.share, kept.layer, kept.sum) == tuple(
            None if value is None else float(f"{value:.3g}") for value in (found.share, found.layer, found.sum))
        assert kept.source == found.source


def test_every_committed_point_is_predicted_within_15_percent() -> None:
    for errors in errors_of(ROWS):
        assert abs(errors.worst[0]) < 0.15, errors.worst
