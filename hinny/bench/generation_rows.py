"""Rows of `hinny bench generate --recipe`: what makes two the same figure, and the point that a row was measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from hinny import counts, predict
from hinny.bench.kernel_table import Row
from hinny.config import ModelConfig, load_recipe
from hinny.errors import ConfigError
from hinny.infer.limits import PAGE
from hinny.memory.quantised import KINDS, Kind, quantised_bytes
from hinny.memory.serving import CONV_WIDTH, pool_sizes

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number."""

BESIDE_SHORT = "bf16"
"""Type of keys, embedding and head where the other matrices are in one of `KINDS`."""

DECODE, SKIPPED = "decode", "decode.skipped"


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows the same figure, of which the newer one stays."""
    return row["what"], row["variant"], row["shape"]


def read_shape(row: Row) -> dict[str, str]:
    """The sizes of a row by name: "context=4096 batch=1" → {"context": "4096", "batch": "1"}."""
    return dict(part.split("=", 1) for part in row["shape"].split() if "=" in part)


@dataclass(frozen=True)
class Point:
    """A decode step's model, sizes and machine, as far as its bytes and its prediction follow from them."""

    model: ModelConfig
    batch: int
    context: int
    precision: str
    """Of the weights: of `WIDTHS`, also that of keys and values, or of `KINDS`."""
    state: str
    tensor: int
    hardware: predict.Hardware | None
    """None where the data sheets in hinny.predict have no such device: a CPU."""

    @property
    def width(self) -> int:
        """Bytes of a key's number."""
        return WIDTHS[BESIDE_SHORT if self.precision in KINDS else self.precision]

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights."""
        if self.precision in KINDS:
            return quantised_bytes(self.model, cast(Kind, self.precision), self.width)
        return counts.weight_bytes(self.model, dtype_bytes=self.width)

    @property
    def bytes(self) -> int:
        """Bytes that a step moves on each GPU."""
        unread = (counts.weight_bytes(self.model, dtype_bytes=self.width)
                  - counts.decode_weight_bytes(self.model, dtype_bytes=self.width))
        return predict.decode_bytes(
            self.model, self.batch, self.context, dtype_bytes=self.width, state_dtype_bytes=WIDTHS[self.state],
            conv_dtype_bytes=CONV_WIDTH, weight_bytes=self.weights - unread) // self.tensor

    def memory(self, more: int) -> int:
        """Bytes of weights, and of pools with room for `more` tokens of each sequence, on each GPU."""
        pools = pool_sizes(self.model, sequences=self.batch, context=self.context + more, snapshots=0, drafts=False,
                           page=PAGE, width=self.width, state_width=WIDTHS[self.state], ranks=self.tensor)
        return self.weights // self.tensor + pools.bytes

    def predicted(self) -> float | None:
        """Tokens/s of all sequences by `hinny show`'s arithmetic; None without a data sheet."""
        if self.hardware is None:
            return None
        return self.batch / predict.step_seconds(
            self.model, self.hardware, moved=self.bytes, batch=self.batch, context=self.context, tensor=self.tensor,
            calibration=self.calibration)[0]

    @property
    def calibration(self) -> predict.Calibration | None:
        """The constants of the device, where they were fitted to as many GPUs."""
        return None if self.hardware is None else predict.constants_of(self.hardware, self.tensor)


def point_of(row: Row) -> Point:
    """The point of a row, whose variant is a shipped recipe's name and changes to it. ConfigError for another row."""
    name, *overrides = row["variant"].split()
    sizes = read_shape(row)
    try:
        return Point(load_recipe(name, overrides).model, int(sizes["batch"]), int(sizes["context"]),
                     sizes["precision"], sizes["state"], int(sizes.get("tensor", 1)), hardware_in(row["machine"]))
    except (KeyError, ValueError):
        raise ConfigError(f"the row {row['what']} of {row['variant']} at {row['shape']!r} is no row of "
                          "hinny bench generate --recipe.") from None


def hardware_in(machine: str) -> predict.Hardware | None:
    """The device that a row's machine names, or None."""
    parts = machine.split(", ")
    return next((h for h in predict.HARDWARE.values() if any(device in parts for device in h.devices)), None)


def done(rows: Sequence[Row], variant: str, shape: str, *, whats: Sequence[str], commit: str, machine: str) -> bool:
    """Whether one of the figures `whats` is there, of the same commit and machine. Code that was changed since its
    commit has no name, so that its rows never count.
    """
    if commit.endswith("+changes"):
        return False
    return any(row["what"] in whats and (row["variant"], row["shape"], row["commit"], row["machine"])
               == (variant, shape, commit, machine) for row in rows)
