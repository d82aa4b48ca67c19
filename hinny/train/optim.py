"""AdamW with the paper's decay groups, and learning rates by samples seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from hinny.config import OptimConfig
from hinny.errors import ConfigError


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to every matrix, the embedding, the head and the convolution's taps included.

    As in Megatron nothing one-dimensional decays (norms, D, dt_bias, Mamba-2's A_log) and no bias. Mamba-1's A_log
    has two dimensions and is exempt by name, as its authors have it: decay would pull every state's rate to one.
    """
    return parameter.ndim > 1 and not name.endswith((".bias", "A_log"))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`, in two groups: decayed, and not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": config.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, samples: int, total_samples: int) -> float:
    """The rate of the step that ends when `samples` of `total_samples` sequences are seen.

    Linear from 0 to lr over warmup_samples; then cosine: half a cosine to min_lr at the end of the run; wsd: lr, and
    linear to min_lr over the last decay_samples; constant: lr. The first step is not spent at rate 0, as in Megatron,
    which counts the samples before the step; the last step is at min_lr exactly.
    """
    if samples < config.warmup_samples:
        return config.lr * samples / config.warmup_samples
    if config.schedule == "constant":
        return config.lr
    assert config.min_lr is not None
    if config.schedule == "cosine":
        share = (samples - config.warmup_samples) / (total_samples - config.warmup_samples)
        height = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    else:
        assert config.decay_samples is not None
        height = min(max(total_samples - samples, 0) / config.decay_samples, 1.0)
    return config.lr * height + config.min_lr * (1 - height)


def check_schedule(config: OptimConfig, total_samples: int) -> None:
    """ConfigError if warm-up, and decay where it is separate, do not fit into the run."""
    decay = config.decay_samples or 0
    if config.warmup_samples + decay >= total_samples + (config.schedule == "wsd"):
        parts = f"optim.warmup_samples ({config.warmup_samples})" + (
            f" + optim.decay_samples ({decay})" if decay else "")
        raise ConfigError(f"{parts} must be less than the run, train.steps * train.batch_size = {total_samples} "
                          "samples. Shorten them, or train for more steps.")
