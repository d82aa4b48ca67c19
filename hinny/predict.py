"""Time and memory of a model on named hardware: arithmetic from counts, not measurements. No torch. The memory of
training is in hinny.memory.

A decode step moves T = W + B c L + 2 B S bytes: weights W once, the head's among them, and for each of B sequences its
keys and values (c bytes for each of L tokens) and its state, S bytes read and written. Left out are an untied
embedding's B rows, the new token's keys, as many as each of the L tokens has, and what layers hand to each other, which
caches hold. That is our arithmetic for the paper's prediction of "up to 8x faster", whose own formula is not known. Its
time is the larger of T over the bandwidth and the FLOPs over the peak rate. Prefill and training run at an assumed
share of the peak (`mfu`): of training, the share at which all runs that is executed. The MFU that a training reports
counts the model's FLOPs alone, so where it computes again what it has not kept, it is lower than that share, by as much
as the model's FLOPs are fewer than the executed ones.

No program reaches the data sheet. Where a kind of device was timed (`CALIBRATED`), two constants fitted to decoding
stand for what it reaches: the share a of the bandwidth, and the seconds b that a layer of one sequence costs beside its
bytes, as its kernels start and end. With more sequences that grows, but slower than they: a step of B takes
max(T / (a bandwidth), FLOPs / peak) + b sqrt(B) layers. The root was found in what was timed, not derived: of b alone,
b B and b sqrt(B) it leaves the smallest errors. Over n GPUs of tensor parallelism each moves T / n, and a third
constant is added for each layer, whose results are summed over the GPUs once.
Every result says whether it fits the device's memory (`fits`); one that does not is the time it would take if it did.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from hinny import counts
from hinny.config import ModelConfig
from hinny.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One device by its vendor's public data sheet: peaks that no program reaches."""

    name: str
    flops: float
    """Dense bfloat16 matrix FLOP/s, without structured sparsity."""
    bandwidth: float
    """Memory bytes/s."""
    memory: float
    """Memory bytes."""
    flops_fp32: float | None
    """Dense float32 FLOP/s without TF32; None where the data sheets do not agree."""
    devices: tuple[str, ...]
    """What PyTorch calls the devices that have these rates. Others of the family, smaller or cut in parts, have not."""


HARDWARE = {h.name: h for h in (
    Hardware("A100", 312e12, 2.039e12, 80e9, 19.5e12, ("NVIDIA A100-SXM4-80GB",)),
    Hardware("H100", 989.4e12, 3.35e12, 80e9, 66.9e12, ("NVIDIA H100 80GB HBM3",)),  # SXM5
    Hardware("H200", 989.4e12, 4.8e12, 141e9, 66.9e12, ("NVIDIA H200",)),  # SXM
    Hardware("B200", 2250e12, 8.0e12, 180e9, None, ("NVIDIA B200",)),  # DGX/HGX B200, a GPU
    Hardware("L40S", 362.05e12, 0.864e12, 48e9, 91.6e12, ("NVIDIA L40S",)),
    Hardware("RTX4090", 165.2e12, 1.008e12, 24e9, 82.6e12, ("NVIDIA GeForce RTX 4090",)),  # float32 accumulation
    Hardware("MI300X", 1307.4e12, 5.3e12, 192e9, 163.4e12, ("AMD Instinct MI300X",)),
)}
"""Name → device. Figures are those of the vendors' public data sheets (NVIDIA, AMD)."""

@dataclass(frozen=True)
class Calibration:
    """What decoding reaches on one kind of device: `hinny bench generate --calibrate` fits it to measured rows."""

    share: float
    """Of the data sheet's bandwidth."""
    layer: float
    """Seconds that a layer costs beside its bytes, for one sequence; for B of them sqrt(B) times that."""
    sum: float | None
    """Seconds of a layer's sum over GPUs; None where tensor parallelism was not timed."""
    source: str
    """Machine and commit of the rows that it was fitted to."""


CALIBRATED: dict[str, Calibration] = {
    "H100": Calibration(0.834, 1.69e-06, None,
        "NVIDIA H100 80GB HBM3, Python 3.12.3, torch 2.11.0, commit 84d922ab89a0"),
    "H200": Calibration(0.832, 2.93e-06, 7.52e-06,
        "NVIDIA H200, Python 3.12.3, torch 2.11.0, commit ec1be08e407e; "
        "NVIDIA H200, Python 3.12.3, torch 2.11.0, commit 6f65514e9a0d"),
}
"""Name of a device → its constants; a device that is not here was not timed."""

USABLE = 0.9
"""Assumed share of the memory that is left to the model by runtime, buffers and fragmentation."""


def find_hardware(name: str) -> Hardware:
    """The device called `name`; ConfigError with the known names."""
    if name in HARDWARE:
        return HARDWARE[name]
    near = difflib.get_close_matches(name.upper(), HARDWARE, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(HARDWARE)}."
    raise ConfigError(f"hardware {name!r} is not known. {hint}")


def device_called(name: str) -> Hardware | None:
    """The device that PyTorch calls `name`, or None where the table has no such."""
    return next((hardware for hardware in HARDWARE.values() if name in hardware.devices), None)


def constants_of(hardware: Hardware, tensor: int) -> Calibration | None:
    """What decoding reaches on the device, where it was timed with one GPU or, as `tensor` asks, with several."""
    found = CALIBRATED.get(hardware.name)
    return None if found is None or (tensor > 1 and found.sum is None) else found


def decode_bytes(model: ModelConfig, batch: int, context: int, *, dtype_bytes: int = 2, state_dtype_bytes: int = 4,
                 conv_dtype_bytes: int = 4, weight_bytes: int | None = None) -> int:
    """Bytes moved by one decode step: T = W + B c L + 2 B S. weight_bytes: W, where weights are not all of the width of
    keys and values.
    """
    return ((counts.decode_weight_bytes(model, dtype_bytes=dtype_bytes) if weight_bytes is None else weight_bytes)
            + batch * context * counts.kv_bytes_per_token(model, dtype_bytes=dtype_bytes)
            + 2 * batch * counts.state_bytes(model, dtype_bytes=state_dtype_bytes, conv_dtype_bytes=conv_dtype_bytes))


def step_seconds(model: ModelConfig, hardware: Hardware, *, moved: int, batch: int, context: int, tensor: int,
                 calibration: Calibration | None) -> tuple[float, str]:
    """Seconds of a decode step of which each of `tensor` GPUs moves `moved` bytes, and what they are bound by.

    ConfigError where more than one GPU is asked for and their sums were never timed.
    """
    compute = batch * counts.decode_flops(model, context) / tensor / hardware.flops
    transfer = moved / (hardware.bandwidth * (1.0 if calibration is None else calibration.share))
    seconds, limit = (compute, "compute") if compute > transfer else (transfer, "bandwidth")
    if calibration is not None:
        if tensor > 1 and calibration.sum is None:
            raise ConfigError(f"tensor is {tensor}, but the calibration of {hardware.name} has no sums over GPUs: time "
                              "them (hinny bench generate --tensor 2), or predict by the data sheet.")
        seconds += model.depth * (calibration.layer * math.sqrt(batch) + (calibration.sum or 0.0) * (tensor > 1))
    return seconds, limit


def decode(model: ModelConfig, hardware: Hardware, *, batch: int, context: int, dtype_bytes: int = 2,
           state_dtype_bytes: int = 4, tensor: int = 1, calibration: Calibration | None = None) -> dict[str, Any]:
    """One decode step of `batch` sequences with `context` tokens each: seconds, tokens/s of all together, memory.

    `limit` says what the time is bound by, bandwidth or compute; bytes and memory are a GPU's. dtype_bytes: weights,
    keys and values; tensor: GPUs that the model is cut over; calibration: what the device reaches, None for its data
    sheet. ConfigError where more than one GPU is asked for and their sums were never timed.
    """
    _check(batch=batch, context=context, tensor=tensor)
    moved = decode_bytes(model, batch, context, dtype_bytes=dtype_bytes, state_dtype_bytes=state_dtype_bytes) // tensor
    memory = inference_memory(model, hardware, batch=batch, context=context, dtype_bytes=dtype_bytes,
                              state_dtype_bytes=state_dtype_bytes, tensor=tensor)
    seconds, limit = step_seconds(model, hardware, moved=moved, batch=batch, context=context, tensor=tensor,
                                  calibration=calibration)
    return {"hardware": hardware.name, "batch": batch, "context": context, "tensor": tensor, "seconds": seconds,
            "tokens_per_s": batch / seconds, "bytes_moved": moved, "limit": limit, **memory}


def prefill(model: ModelConfig, hardware: Hardware, *, batch: int, context: int, mfu: float, dtype_bytes: int = 2,
            state_dtype_bytes: int = 4, tensor: int = 1) -> dict[str, Any]:
    """Reading `batch` prompts of `context` tokens up to the first new token, at share `mfu` of the peak rate of
    `tensor` GPUs, whose sums are left out; memory is a GPU's.
    """
    _check(batch=batch, context=context, tensor=tensor)
    _check_share(mfu)
    per_prompt = (context * (counts.forward_flops(model, context) - counts.head_flops(model))
                  + counts.head_flops(model))
    memory = inference_memory(model, hardware, batch=batch, context=context, dtype_bytes=dtype_bytes,
                              state_dtype_bytes=state_dtype_bytes, tensor=tensor)
    compute = batch * per_prompt / tensor / (mfu * hardware.flops)
    transfer = memory["memory_bytes"] / hardware.bandwidth
    seconds, limit = max(compute, transfer), "compute" if compute > transfer else "bandwidth"
    return {"hardware": hardware.name, "batch": batch, "context": context, "tensor": tensor, "mfu": mfu,
            "seconds": seconds, "tokens_per_s": batch * context / seconds, "limit": limit, **memory}


def training_speed(model: ModelConfig, hardware: Hardware, *, seq_len: int, mfu: float, recomputed: int = 0) -> float:
    """Tokens/s of one device that executes at share `mfu` of its peak rate: the model's FLOPs, and for each token the
    `recomputed` ones (counts.recomputed_flops). What processes send each other is left out.
    """
    _check_share(mfu)
    return mfu * hardware.flops / (counts.training_flops(model, seq_len) + recomputed)


def inference_memory(model: ModelConfig, hardware: Hardware, *, batch: int, context: int, dtype_bytes: int = 2,
                     state_dtype_bytes: int = 4, tensor: int = 1) -> dict[str, Any]:
    """Weights and what the sequences hold, whether they fit, and the largest batch that does (0: not even one).

    Bytes are those of each of `tensor` GPUs, rounded up.
    """
    _check(batch=batch, context=context, tensor=tensor)
    weights = -(-counts.weight_bytes(model, dtype_bytes=dtype_bytes) // tensor)
    sequence = -(-(context * counts.kv_bytes_per_token(model, dtype_bytes=dtype_bytes)
                   + counts.state_bytes(model, dtype_bytes=state_dtype_bytes)) // tensor)
    usable = int(USABLE * hardware.memory)
    # a pure MLP stack holds nothing per sequence: its batch is not bound by memory
    largest = max(0, (usable - weights) // sequence) if sequence else None
    total = weights + batch * sequence
    return {"memory_bytes": total, "weight_bytes": weights, "bytes_per_sequence": sequence,
            "usable_bytes": usable, "fits": total <= usable, "max_batch": largest}


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")


def _check_share(mfu: float) -> None:
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; it is a share of the hardware's peak rate, above 0 and at most 1.")
