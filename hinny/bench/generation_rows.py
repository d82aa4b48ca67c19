"""Rows of `hinny bench generate --recipe`: what makes two the same figure, and the point that a row was measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hinny import counts, predict
from hinny.bench.kernel_table import Row
from hinny.config import ModelConfig, load_recipe
from hinny.errors import ConfigError
from hinny.infer.limits import PAGE
from hinny.memory.serving import pool_sizes

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number."""

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
    state: str
    tensor: int
    hardware: predict.Hardware | None
    """None where the data sheets in hinny.predict have no such device: a CPU."""

    @property
    def bytes(self) -> int:
        """Bytes that a step moves on each GPU."""
        return predict.decode_bytes(self.model, self.batch, self.context, dtype_bytes=WIDTHS[self.precision],
                                    state_dtype_bytes=WIDTHS[self.state]) // self.tensor

    def memory(self, more: int) -> int:
        """Bytes of weights, and of pools with room for `more` tokens of each sequence, on each GPU."""
        width = WIDTHS[self.precision]
        pools = pool_sizes(self.model, sequences=self.batch, context=self.context + more, snapshots=0, drafts=False,
                           page=PAGE, width=width, state_width=WIDTHS[self.state], ranks=self.tensor)
        return counts.weight_bytes(self.model, dtype_bytes=width) // self.tensor + pools.bytes

    def predicted(self, calibration: predict.Calibration | None) -> float | None:
        """Tokens/s of all sequences by `hinny show`'s arithmetic; None without a data sheet."""
        if self.hardware is None:
            return None
        return predict.decode(self.model, self.hardware, batch=self.batch, context=self.context, tensor=self.tensor,
                              dtype_bytes=WIDTHS[self.precision], state_dtype_bytes=WIDTHS[self.state],
                              calibration=calibration)["tokens_per_s"]

    @property
    def calibration(self) -> predict.Calibration | None:
        """The constants of the device, where they were fitted to as many GPUs."""
        found = None if self.hardware is None else predict.CALIBRATED.get(self.hardware.name)
        return None if found is None or (self.tensor > 1 and found.sum is None) else found


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
