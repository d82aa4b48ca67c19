"""Recipes: one TOML file is one run. Strict, frozen, free of torch."""

from hinny.config.attention import AttentionConfig, RopeScaling
from hinny.config.data import DataConfig, LongConfig, SyntheticConfig
from hinny.config.init import InitConfig
from hinny.config.load import (
    apply_override,
    find,
    known_keys,
    load_recipe,
    read_toml,
    shipped_names,
    to_toml,
    validate,
)
from hinny.config.parallel import DIMENSIONS, ParallelConfig
from hinny.config.section import Section
from hinny.config.sections import (
    LAYER_SECTIONS,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
)

__all__ = [
    "DIMENSIONS", "LAYER_SECTIONS", "AttentionConfig", "DataConfig", "InitConfig", "LongConfig", "MLPConfig",
    "Mamba1Config", "Mamba2Config", "ModelConfig", "OptimConfig", "ParallelConfig", "Recipe", "RopeScaling", "Section",
    "SyntheticConfig", "TrainConfig", "apply_override", "find", "known_keys", "load_recipe", "read_toml",
    "shipped_names", "to_toml", "validate",
]
