"""The constants of `hinny.predict.Calibration`, fitted to decode rows of `hinny bench generate`.

A step's seconds are t = x0 T / bandwidth + x1 sqrt(B) layers + x2 layers [more than one GPU]: linear in the constants.
Those are taken whose largest relative error is smallest, by Lawson's weights: least squares again and again, in which a
point counts the more the further it was off. Share of the bandwidth: 1 / x0. Points that arithmetic bounds, and weights
in 8 or 4 bits, whose kernels are others, are left out.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hinny import counts, predict
from hinny.bench.generation_rows import DECODE, WIDTHS, Point, point_of
from hinny.bench.kernel_table import Row, read_rows
from hinny.errors import ConfigError
from hinny.predict import Calibration, Hardware
from hinny.run import row

ROUNDS = 2000
"""Of Lawson's weights; the largest error of 50 points is within a hundredth of itself after some hundred."""


@dataclass(frozen=True)
class Fit:
    """Constants, and how far they are off: |predicted / measured - 1| at each point of tokens/s."""

    hardware: Hardware
    calibration: Calibration
    errors: tuple[float, ...]


def calibrate(files: Sequence[Path]) -> list[Row]:
    """Rows of the constants of every device in the files, and of the error that they leave. Said besides as an entry
    of `predict.CALIBRATED`.
    """
    made = [one for file in files for one in read_rows(file)]
    found = fit_all(made)
    if not found:
        raise ConfigError(f"{', '.join(map(str, files))}: no decode rows of a device that hinny.predict has a data "
                          "sheet of; make some with hinny bench generate --recipe on a GPU.")
    rows = []
    for fit in found:
        c, name = fit.calibration, fit.hardware.name
        shape = f"points={len(fit.errors)}"
        logging.getLogger(__name__).warning("for hinny.predict.CALIBRATED, %d points off by %.1f %% at most:\n%s",
                                            len(fit.errors), 100 * max(fit.errors), entry(fit))
        rows += [row("calibration.share", name, c.share, "of bandwidth", shape=shape),
                 row("calibration.layer", name, c.layer * 1e6, "us", shape=shape),
                 *([] if c.sum is None else [row("calibration.sum", name, c.sum * 1e6, "us", shape=shape)]),
                 row("calibration.error", name, statistics.median(fit.errors), "of measured", shape=shape,
                     low=min(fit.errors), high=max(fit.errors))]
    return rows


def entry(fit: Fit) -> str:
    """The fit as lines of Python for `predict.CALIBRATED`, to three digits."""
    c = fit.calibration
    numbers = (repr(None if value is None else float(f"{value:.3g}")) for value in (c.share, c.layer, c.sum))
    sources = c.source.split("; ")
    texts = [f'        "{one}{"; " if one != sources[-1] else ""}"' for one in sources]
    return f'    "{fit.hardware.name}": Calibration({", ".join(numbers)},\n' + "\n".join(texts) + "),"


def fit_all(rows: Sequence[Row]) -> list[Fit]:
    """A fit for every device that decode rows are of."""
    points: dict[str, list[tuple[Point, Row]]] = {}
    for one in rows:
        if one["what"] == DECODE:
            point = point_of(one)
            if point.hardware is not None and point.precision in WIDTHS:
                points.setdefault(point.hardware.name, []).append((point, one))
    return [_fit(found) for found in points.values()]


@dataclass(frozen=True)
class Errors:
    """How far the prediction is off on one device, by the same constants."""

    hardware: str
    calibration: Calibration | None
    """The constants that hinny.predict has now; None: its data sheet."""
    points: list[tuple[float, Row]]
    """predicted / measured - 1 of each decode row's tokens/s."""

    @property
    def worst(self) -> tuple[float, Row]:
        """The point that is off the most, either way."""
        return max(self.points, key=lambda found: abs(found[0]))


def errors_of(rows: Sequence[Row], *, narrow: bool = False) -> list[Errors]:
    """Of each device, with one GPU or more; rows of devices without a data sheet have no prediction.

    narrow: of weights in 8 or 4 bits instead of all others: their kernels are others, for which nothing was fitted.
    """
    found: dict[tuple[str, Calibration | None], list[tuple[float, Row]]] = {}
    for one in rows:
        if one["what"] == DECODE:
            point = point_of(one)
            predicted = point.predicted()
            if point.hardware is not None and predicted is not None and narrow == (point.precision not in WIDTHS):
                found.setdefault((point.hardware.name, point.calibration), []).append(
                    (predicted / one["value"] - 1, one))
    return [Errors(name, calibration, points) for (name, calibration), points in found.items()]


def _fit(found: list[tuple[Point, Row]]) -> Fit:
    hardware = found[0][0].hardware
    assert hardware is not None
    timed = [(point, point.batch / made["value"]) for point, made in found if not _computes(point, hardware)]
    several = {point.tensor > 1 for point, _ in timed}
    unknown = 2 + (len(several) == 2)
    terms = np.array([[point.bytes / hardware.bandwidth, point.model.depth * math.sqrt(point.batch),
                       point.model.depth * (point.tensor > 1)]
                      for point, _ in timed])[:, :unknown] if timed else np.empty((0, unknown))
    seconds = np.array([t for _, t in timed])
    weighted = terms / seconds[:, None]
    if several == {True} or np.linalg.matrix_rank(weighted) < unknown:
        raise ConfigError(f"{len(timed)} points of {hardware.name} cannot tell its {unknown} constants apart: time "
                          "more batches and contexts, on one GPU too.")
    x = _least(weighted)
    if x[0] <= 0:
        raise ConfigError(f"the points of {hardware.name} fit no constants: seconds a byte would be "
                          f"{x[0] / hardware.bandwidth:.3g}, and must be positive; time more batches and contexts.")
    sources = dict.fromkeys(_source(made) for _, made in found)
    errors = np.abs(seconds / (terms @ x) - 1)  # of speeds: the inverse of times
    return Fit(hardware, Calibration(float(1 / x[0]), float(x[1]), float(x[2]) if unknown == 3 else None,
                                     "; ".join(sources)), tuple(errors.tolist()))


def _least(weighted: np.ndarray) -> np.ndarray:
    """Constants with the smallest of largest |1 - weighted x|. A layer or a sum that would take negative time takes
    none."""
    x, kept = np.zeros(weighted.shape[1]), list(range(weighted.shape[1]))
    while True:
        x[kept] = _lawson(weighted[:, kept])
        negative = [i for i in kept if i and x[i] < 0]
        if not negative:
            return x
        kept.remove(min(negative, key=lambda i: x[i]))
        x[:] = 0


def _lawson(a: np.ndarray) -> np.ndarray:
    """x of the smallest largest |1 - a x|."""
    best, weights = np.linalg.lstsq(a, np.ones(len(a)), rcond=None)[0], np.full(len(a), 1 / len(a))
    least = np.abs(1 - a @ best).max()
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        x = np.linalg.lstsq(a * root[:, None], root, rcond=None)[0]
        off = np.abs(1 - a @ x)
        if off.max() < least:
            best, least = x, off.max()
        if not (weights @ off) > 0:
            break
        weights = weights * off / (weights @ off)
    return best


def _source(made: Row) -> str:
    """The machine from its GPU on, and the commit."""
    parts = made["machine"].split(", ")
    first = next(i for i, part in enumerate(parts) if predict.device_called(part))
    return f"{', '.join(parts[first:])}, commit {made['commit']}"


def _computes(point: Point, hardware: Hardware) -> bool:
    """Whether arithmetic takes longer than memory: such a point tells nothing of the bandwidth."""
    flops = point.batch * counts.decode_flops(point.model, point.context) / point.tensor
    return flops / hardware.flops > point.bytes / hardware.bandwidth
