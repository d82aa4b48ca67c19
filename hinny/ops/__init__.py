"""Pure functions on tensors: the sequence mixers, norms and the loss, each with its definition beside it."""

from hinny.ops.attention import attention, attention_reference, rope
from hinny.ops.backend import use_backend
from hinny.ops.conv import causal_conv, causal_conv_reference, causal_conv_step
from hinny.ops.decode import conv_update, mamba2_update, ssd_update
from hinny.ops.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_z,
    linear_cross_entropy_z_reference,
)
from hinny.ops.mamba2 import mamba2
from hinny.ops.norm import gated_rms_norm, layer_norm_1p, rms_norm
from hinny.ops.replay import Replay, flush_replay, make_replay
from hinny.ops.scan import selective_scan, selective_scan_recurrence, selective_scan_step
from hinny.ops.ssd import ssd, ssd_recurrence, ssd_step

__all__ = [
    "Replay",
    "attention",
    "attention_reference",
    "causal_conv",
    "causal_conv_reference",
    "causal_conv_step",
    "conv_update",
    "flush_replay",
    "gated_rms_norm",
    "layer_norm_1p",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_z",
    "linear_cross_entropy_z_reference",
    "make_replay",
    "mamba2",
    "mamba2_update",
    "rms_norm",
    "rope",
    "selective_scan",
    "selective_scan_recurrence",
    "selective_scan_step",
    "ssd",
    "ssd_recurrence",
    "ssd_step",
    "ssd_update",
    "use_backend",
]
