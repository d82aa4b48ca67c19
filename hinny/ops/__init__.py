"""Pure functions on tensors: mixers of a sequence, norms, activations, linear layers and the loss; the mixers and the
loss with their definitions beside them."""

from hinny.ops.activations import relu2, swiglu
from hinny.ops.attention import attention, attention_reference
from hinny.ops.backend import use_backend
from hinny.ops.conv import causal_conv, causal_conv_reference, causal_conv_step
from hinny.ops.decode import conv_update, mamba2_update, ssd_update
from hinny.ops.likeliest import likeliest
from hinny.ops.linear import linear, split_linear
from hinny.ops.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_z,
    linear_cross_entropy_z_reference,
)
from hinny.ops.mamba2 import mamba2
from hinny.ops.norm import gated_rms_norm, layer_norm_1p, rms_norm
from hinny.ops.paged import paged_attention, paged_attention_reference, write_pages
from hinny.ops.replay import Replay, flush_replay, make_replay
from hinny.ops.rope import Stretch, rope
from hinny.ops.scan import selective_scan, selective_scan_recurrence, selective_scan_step
from hinny.ops.ssd import ssd, ssd_recurrence, ssd_step
from hinny.ops.thin import add_norm, thin_linear

__all__ = [
    "Replay",
    "Stretch",
    "add_norm",
    "attention",
    "attention_reference",
    "causal_conv",
    "causal_conv_reference",
    "causal_conv_step",
    "conv_update",
    "flush_replay",
    "gated_rms_norm",
    "layer_norm_1p",
    "likeliest",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_z",
    "linear_cross_entropy_z_reference",
    "make_replay",
    "mamba2",
    "mamba2_update",
    "paged_attention",
    "paged_attention_reference",
    "relu2",
    "rms_norm",
    "rope",
    "selective_scan",
    "selective_scan_recurrence",
    "selective_scan_step",
    "split_linear",
    "ssd",
    "ssd_recurrence",
    "ssd_step",
    "ssd_update",
    "swiglu",
    "thin_linear",
    "use_backend",
    "write_pages",
]
