"""Runs as a conversion leaves them, made without the verb."""

from __future__ import annotations

from small import small_config

from hinny.checkpoint import fingerprint, weights
from hinny.checkpoint.formats.foreign import Info
from hinny.config import Recipe, validate
from hinny.model import Model
from hinny.run import Run, environment
from hinny.tokenizer import ByteTokenizer

SETTINGS = {
    "description": "x", "data": {"boundaries": "reset"},
    "optim": {"lr": 1e-2, "schedule": "constant", "warmup_samples": 0, "weight_decay": 0.1, "beta1": 0.9,
              "beta2": 0.95, "eps": 1e-8},
    "train": {"seq_len": 32, "batch_size": 2, "micro_batch_size": 2, "steps": 4, "seed": 0, "precision": "fp32",
              "log_every": 1, "save_every": 2}}
CONFIG = small_config("M-*1", vocab_size=257)


def values_of(config, seed=0):
    """Weights as a release has them: bfloat16, but for the exponents."""
    model = Model(config)
    model.init_weights(seed)
    wide = ("A_log", "D", "dt_bias")
    return {name: value if name.endswith(wide) else value.bfloat16() for name, value in model.state_dict().items()}


def infos_of(values):
    return {name: Info(tuple(value.shape), value.dtype) for name, value in values.items()}


def converted(path, values, shard_bytes=3000, config=CONFIG):
    """A run as a conversion leaves it."""
    recipe = validate(Recipe, {"name": "small", "model": config.model_dump(exclude_none=True), **SETTINGS}, "test")
    run = Run(path)
    path.mkdir(exist_ok=True)
    meta = {"recipe_fingerprint": fingerprint(recipe), "recipe": recipe.model_dump(mode="json"),
            "source": {"format": "test", "source": "nowhere", "facts": {}}}
    weights.save(run, infos_of(values), values.__getitem__, meta, shard_bytes=shard_bytes)
    ByteTokenizer().save(path)
    run.write_env(environment(device="cpu", seed=0, threads=1, data_fingerprint="none"), resumed=False)
    run.write_recipe(recipe)
    return run
