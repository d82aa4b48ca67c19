"""The constants of `hinny.predict.Calibration`, fitted to decode rows of `hinny bench generate`.

A step's seconds are t = x0 T / bandwidth + x1 layers + x2 layers [more than one GPU]: linear in the constants, so that
those of the least squares of the relative error follow from one small system. Share of the bandwidth: 1 / x0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hinny import counts
from hinny.bench.generation_rows import DECODE, Point, point_of
from hinny.bench.kernel_table import Row, read_rows
from hinny.errors import ConfigError
from hinny.predict import Calibration, Hardware
from hinny.run import row


@dataclass(frozen=True)
class Fit:
    """Constants, and how far they are off: |predicted / measured - 1| at each point of tokens/s."""

    hardware: Hardware
    calibration: Calibration
    errors: tuple[float, ...]


def calibrate(files: Sequence[Path]) -> list[Row]:
    """Rows of the constants of every device in the files, and of the error that they leave."""
    made = [one for file in files for one in read_rows(file)]
    found = fit_all(made)
    if not found:
        raise ConfigError(f"{', '.join(map(str, files))}: no decode rows of a device that hinny.predict has a data "
                          "sheet of; make some with hinny bench generate --recipe on a GPU.")
    rows = []
    for fit in found:
        c, name = fit.calibration, fit.hardware.name
        shape = f"points={len(fit.errors)}"
        rows += [row("calibration.share", name, c.share, "of bandwidth", shape=shape),
                 row("calibration.layer", name, c.layer * 1e6, "us", shape=shape),
                 *([] if c.sum is None else [row("calibration.sum", name, c.sum * 1e6, "us", shape=shape)]),
                 row("calibration.error", name, statistics.median(fit.errors), "of measured", shape=shape,
                     low=min(fit.errors), high=max(fit.errors))]
    return rows


def fit_all(rows: Sequence[Row]) -> list[Fit]:
    """A fit for every device that decode rows are of."""
    points: dict[str, list[tuple[Point, Row]]] = {}
    for one in rows:
        if one["what"] == DECODE:
            point = point_of(one)
            if point.hardware is not None:
                points.setdefault(point.hardware.name, []).append((point, one))
    return [_fit(found) for found in points.values()]


def errors_of(rows: Sequence[Row]) -> list[tuple[str, list[float], Calibration | None]]:
    """Of each device, with one GPU or more: |predicted / measured - 1| of its decode rows by the constants that
    hinny.predict has now, and these.
    """
    found: dict[tuple[str, Calibration | None], list[float]] = {}
    for one in rows:
        if one["what"] == DECODE:
            point = point_of(one)
            predicted = point.predicted(point.calibration)
            if point.hardware is not None and predicted is not None:
                found.setdefault((point.hardware.name, point.calibration), []).append(abs(predicted / one["value"] - 1))
    return [(name, errors, calibration) for (name, calibration), errors in found.items()]


def _fit(found: list[tuple[Point, Row]]) -> Fit:
    hardware = found[0][0].hardware
    assert hardware is not None
    timed = [(point, point.batch / made["value"]) for point, made in found if not _computes(point, hardware)]
    several = {point.tensor > 1 for point, _ in timed}
    unknown = 2 + (len(several) == 2)
    terms = np.array([[point.bytes / hardware.bandwidth, point.model.depth, point.model.depth * (point.tensor > 1)]
                      for point, _ in timed])[:, :unknown] if timed else np.empty((0, unknown))
    seconds = np.array([t for _, t in timed])
    weighted = terms / seconds[:, None]
    if several == {True} or np.linalg.matrix_rank(weighted) < unknown:
        raise ConfigError(f"{len(timed)} points of {hardware.name} cannot tell its {unknown} constants apart: time "
                          "more batches and contexts, on one GPU too.")
    x = np.linalg.lstsq(weighted, np.ones(len(timed)), rcond=None)[0]
    if min(x[0], x[1]) <= 0:
        raise ConfigError(f"the points of {hardware.name} fit no constants: seconds a byte would be "
                          f"{x[0] / hardware.bandwidth:.3g} and a layer {x[1]:.3g}, and both must be positive; time "
                          "more batches and contexts.")
    sources = dict.fromkeys(f"{made['machine']}, commit {made['commit']}" for _, made in found)
    errors = np.abs(seconds / (terms @ x) - 1)  # of speeds: the inverse of times
    return Fit(hardware, Calibration(float(1 / x[0]), float(x[1]), float(x[2]) if unknown == 3 else None,
                                     "; ".join(sources)), tuple(errors.tolist()))


def _computes(point: Point, hardware: Hardware) -> bool:
    """Whether arithmetic takes longer than memory: such a point tells nothing of the bandwidth."""
    flops = point.batch * counts.decode_flops(point.model, point.context) / point.tensor
    return flops / hardware.flops > point.bytes / hardware.bandwidth
