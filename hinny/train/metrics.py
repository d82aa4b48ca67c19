"""How fast training goes: tokens a second since the last record, their share of the device's peak, the time left."""

from __future__ import annotations

import logging
from collections import deque

import torch

from hinny import counts, predict
from hinny.config import Recipe

RECENT = 20
"""Steps whose mean time gives the time left: enough to be steady, few enough to follow a change."""

log = logging.getLogger(__name__)


class Meter:
    """Adds up the seconds of training steps; saving and held-out losses are not counted."""

    def __init__(self, *, tokens_per_step: int, steps: int, seconds: float = 0.0,
                 seconds_at_peak: float | None = None) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps = steps
        self.seconds = seconds
        """Seconds in steps since the run's first, over all its sessions."""
        self._seconds_at_peak = seconds_at_peak
        """What a token would take at the device's peak rate; None where that is not known, and then nor is `mfu`."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._since_record: list[float] = []
        self._waited = 0.0

    def add(self, seconds: float, waited: float = 0.0) -> None:
        """Count one step that took `seconds`, `waited` of them for its data."""
        self.seconds += seconds
        self._recent.append(seconds)
        self._since_record.append(seconds)
        self._waited += waited

    def speed(self) -> dict[str, float]:
        """tokens_per_s and mfu of the recent steps."""
        return self._speed(self.tokens_per_step * len(self._recent) / sum(self._recent))

    def seconds_left(self, step: int) -> float:
        """Estimate when `step` steps are done."""
        return (self.steps - step) * sum(self._recent) / len(self._recent)

    def record(self) -> dict[str, float]:
        """tokens_per_s and mfu since the last record, data_seconds that a step waited for its batch on average, and
        seconds in all; begins a new window.
        """
        window, self._since_record = self._since_record, []
        waited, self._waited = self._waited, 0.0
        return {**self._speed(self.tokens_per_step * len(window) / sum(window)), "data_seconds": waited / len(window),
                "seconds": self.seconds}

    def _speed(self, tokens_per_s: float) -> dict[str, float]:
        if self._seconds_at_peak is None:
            return {"tokens_per_s": tokens_per_s}
        return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * self._seconds_at_peak}


def seconds_at_peak(recipe: Recipe, accelerator: str | None) -> float | None:
    """Seconds that the model's arithmetic for one trained token takes at the peak rate of the GPU `accelerator`.

    The arithmetic is that of counts.training_flops, without any recomputation; the rate is the dense one of the run's
    precision in predict.HARDWARE. None, and the log says why, where that table has no rate: there is no mfu then.
    """
    precision = recipe.train.precision
    hardware = None if accelerator is None else predict.device_called(accelerator)
    rate = None if hardware is None else hardware.flops if precision == "bf16" else hardware.flops_fp32
    if rate is None:
        device = "a CPU" if accelerator is None else accelerator
        log.info("no MFU in the records: hinny knows no peak rate of %s in %s.", device, precision)
        return None
    if precision == "fp32" and (rounded := torch.get_float32_matmul_precision()) != "highest":
        log.info('no MFU in the records: float32 products have precision "%s" here, and the peak rate known is that of '
                 '"highest".', rounded)
        return None
    return counts.training_flops(recipe.model, recipe.train.pass_len) / rate


def peak_memory(device: torch.device) -> dict[str, int]:
    """peak_memory_bytes that PyTorch's allocator held on a GPU since the session began; nothing on a CPU."""
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
