"""The sections of a recipe: every key, its type and what it must agree with.

A key that could not take effect is an error, not a warning; what must be chosen has no default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hinny import pattern as patterns
from hinny.config.attention import AttentionConfig
from hinny.config.data import DataConfig
from hinny.config.init import InitConfig
from hinny.config.parallel import ParallelConfig
from hinny.config.section import Positive, Section, Share
from hinny.config.segments import check_segments


class TimeSteps(Section):
    """Range of the time steps that a Mamba layer starts from, log-uniform; the defaults of both Mamba papers."""

    dt_min: Annotated[float, Field(gt=0.0)] = 0.001
    dt_max: Annotated[float, Field(gt=0.0)] = 0.1

    @model_validator(mode="after")
    def _check_range(self) -> TimeSteps:
        if self.dt_min >= self.dt_max:
            raise ValueError(f"dt_min ({self.dt_min}) must be below dt_max ({self.dt_max}).")
        return self


class Mamba1Config(TimeSteps):
    """Selective state space layer, pattern symbol `1` (Mamba, arXiv 2312.00752)."""

    d_state: Positive
    expand: Positive
    d_conv: Positive
    dt_rank: Positive
    chunk_len: Positive
    """Tokens whose states are kept at once; it changes speed and memory, not the result."""


class Mamba2Config(TimeSteps):
    """State-space-duality layer, pattern symbol `M` (Mamba-2, arXiv 2405.21060)."""

    d_state: Positive
    head_dim: Positive
    n_groups: Positive
    """Heads that share B and C; also the number of groups of the gated norm."""
    expand: Positive | None = None
    """d_inner is expand * d_model. Give this or n_heads."""
    n_heads: Positive | None = None
    """d_inner is n_heads * head_dim: for widths that no whole `expand` gives."""
    d_conv: Positive
    chunk_len: Positive
    """Length of the quadratic blocks of the SSD algorithm; it changes speed, not the result."""

    @model_validator(mode="after")
    def _check_width(self) -> Mamba2Config:
        if (self.expand is None) == (self.n_heads is None):
            found = "neither" if self.expand is None else f"expand ({self.expand}) and n_heads ({self.n_heads})"
            raise ValueError(f"give one of expand and n_heads, which both set d_inner; found {found}.")
        return self

    def d_inner(self, d_model: int) -> int:
        """Channels of x and z, in a model of width d_model."""
        if self.n_heads is not None:
            return self.n_heads * self.head_dim
        assert self.expand is not None
        return self.expand * d_model


class MLPConfig(Section):
    """Feed-forward layer, pattern symbol `-`."""

    d_ff: Positive
    activation: Literal["gelu", "relu2", "swiglu"]
    """Exact (erf) GELU, squared ReLU, or the gated SiLU that has a third matrix."""


LAYER_SECTIONS = {"1": "mamba1", "M": "mamba2", "*": "attention", "-": "mlp"}
"""Pattern symbol → the section of [model] that its layer reads."""


class ModelConfig(Section):
    """An architecture: the pattern string and the sizes of the layer kinds in it."""

    pattern: str
    """One symbol a layer (hinny.pattern). Given as such, or allocated from n_layers and the two ratios."""
    n_layers: Positive | None = None
    attention_ratio: Share | None = None
    mlp_ratio: Share | None = None
    d_model: Positive
    vocab_size: Positive
    norm: Literal["rmsnorm", "layernorm1p"]
    norm_eps: Annotated[float, Field(gt=0.0)]
    tie_embeddings: bool
    init_std: Annotated[float, Field(gt=0.0)]
    """Standard deviation of the weights of embeddings, head, attention and MLP."""
    output_init_std: Annotated[float, Field(gt=0.0)] | None = None
    """The same for attention's and the MLP's output projections; init_std / sqrt(2 * layers) without it."""
    mamba1: Mamba1Config | None = None
    mamba2: Mamba2Config | None = None
    attention: AttentionConfig | None = None
    mlp: MLPConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _allocate(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        n_layers, override = data.get("n_layers"), data.get("pattern")
        ratios = [data.get("attention_ratio"), data.get("mlp_ratio")]
        if n_layers is None:
            if any(r is not None for r in ratios):
                raise ValueError("attention_ratio and mlp_ratio need n_layers.")
            return data
        numbers = isinstance(n_layers, int) and all(r is None or isinstance(r, (int, float)) for r in ratios)
        if numbers and isinstance(override, str | None):
            symbols = patterns.resolve(n_layers, ratios[0] or 0.0, ratios[1] or 0.0, override)
            return {**data, "pattern": symbols}
        return data

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        symbols = patterns.parse(self.pattern)
        for symbol, section in LAYER_SECTIONS.items():
            if symbol in symbols and getattr(self, section) is None:
                raise ValueError(f"pattern has '{symbol}' layers but there is no section [model.{section}]; add it.")
            if symbol not in symbols and getattr(self, section) is not None:
                raise ValueError(f"section [model.{section}] has no effect: pattern has no '{symbol}'; remove it.")
        if self.output_init_std is not None and not {"*", "-"} & set(symbols):
            raise ValueError("output_init_std has no effect: pattern has no attention and no MLP; remove it.")
        if m := self.mamba2:
            d_inner = m.d_inner(self.d_model)
            if d_inner % m.head_dim:
                raise ValueError(
                    f"mamba2.head_dim ({m.head_dim}) must divide d_inner = expand * d_model = {d_inner}.")
            if (d_inner // m.head_dim) % m.n_groups:
                heads = "mamba2.n_heads" if m.n_heads else "expand * d_model / head_dim"
                raise ValueError(f"mamba2.n_groups ({m.n_groups}) must divide the number of heads, "
                                 f"{heads} = {d_inner // m.head_dim}.")
        return self

    @property
    def depth(self) -> int:
        """Number of layers, each one sublayer."""
        return len(patterns.parse(self.pattern))


class OptimConfig(Section):
    """AdamW and its schedule; lengths in samples (sequences), as in the paper's settings."""

    lr: Annotated[float, Field(gt=0.0)]
    schedule: Literal["cosine", "wsd", "constant"]
    min_lr: Annotated[float, Field(ge=0.0)] | None = None
    """End of the decay; for cosine and wsd."""
    warmup_samples: Annotated[int, Field(ge=0)]
    decay_samples: Positive | None = None
    """wsd: length of the final linear decay. cosine: the whole run."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)]
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)]
    eps: Annotated[float, Field(gt=0.0)]
    clip: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of the whole gradient; no clipping without it."""
    z_loss: Annotated[float, Field(gt=0.0)] | None = None
    """Coefficient of the squared log-sum-exp of the logits, added to each target's loss; none without it."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.schedule == "constant" and self.min_lr is not None:
            raise ValueError('min_lr has no effect with schedule = "constant"; remove it.')
        if self.schedule != "constant" and self.min_lr is None:
            raise ValueError(f'schedule = "{self.schedule}" needs min_lr.')
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr}).")
        if self.schedule != "wsd" and self.decay_samples is not None:
            raise ValueError(f'decay_samples has no effect with schedule = "{self.schedule}"; remove it.')
        if self.schedule == "wsd" and self.decay_samples is None:
            raise ValueError('schedule = "wsd" needs decay_samples.')
        return self


class TrainConfig(Section):
    """Length, batch, precision and cadence of a run."""

    seq_len: Positive
    batch_size: Positive
    """Sequences in one optimiser step."""
    micro_batch_size: Positive
    """Sequences in one forward pass; gradients of batch_size / micro_batch_size passes are accumulated."""
    steps: Positive
    seed: Annotated[int, Field(ge=0)]
    precision: Literal["fp32", "bf16"]
    """bf16: matrix products and the residual stream in bf16, weights and optimiser in fp32."""
    segment_len: Positive | None = None
    """Tokens of a pass: a sequence is trained in segments of so many, each from the SSM states that the one before it
    left, without gradients between them. Attention sees its own segment. Whole sequences without it."""
    cuda_graphs: bool = False
    """Records the passes of a micro-batch once and replays them; on one GPU alone."""
    log_every: Positive
    save_every: Positive
    eval_every: Positive | None = None
    """Steps between held-out losses during training; none without it."""
    keep_every: Positive | None = None
    """The checkpoints of every so many steps stay for ever, beside the last two; none without it."""
    log_seconds: Annotated[float, Field(gt=0.0)] | None = None
    """A record also when so many seconds have passed since the last one; by steps alone without it."""
    loggers: list[Literal["tensorboard", "wandb"]] | None = None
    """Where the records go besides metrics.jsonl; each needs the package of its name."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.keep_every is not None and (self.keep_every % self.save_every or self.keep_every > self.steps):
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of save_every ({self.save_every}) and "
                             f"at most steps ({self.steps}): only a checkpoint that is saved can be kept.")
        if len(set(self.loggers or ())) < len(self.loggers or ()):
            raise ValueError(f"loggers ({', '.join(self.loggers or ())}) names one twice; name each once.")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide batch_size ({self.batch_size}).")
        return self

    @property
    def pass_len(self) -> int:
        """Tokens of a sequence that one forward pass sees."""
        return self.segment_len or self.seq_len

    @property
    def pass_key(self) -> str:
        """The key that says `pass_len`."""
        return "seq_len" if self.segment_len is None else "segment_len"


class Recipe(Section):
    """All that defines a run. `name` is the recipe file's name."""

    name: str
    description: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    init: InitConfig | None = None
    """Without it a run begins with weights drawn from its seed."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        scaling = self.model.attention.rope_scaling if self.model.attention else None
        key, length = self.train.pass_key, self.train.pass_len
        if scaling is not None and length > scaling.reach:
            raise ValueError(
                f"train.{key} ({length}) is past what model.attention.rope_scaling allows: factor "
                f"({scaling.factor}) x trained_len ({scaling.trained_len}) = {scaling.reach} tokens. Raise factor to "
                f"{math.ceil(100 * length / scaling.trained_len) / 100:.10g}, or shorten the sequences.")
        kinds = self.parallel.recompute
        if isinstance(kinds, list) and (absent := [s for s in kinds if s not in self.model.pattern]):
            raise ValueError(f"parallel.recompute names '{absent[0]}', but model.pattern has no such layer; remove it.")
        check_segments(self)
        return self
