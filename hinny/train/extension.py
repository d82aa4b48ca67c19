"""What a run with [init] begins with: the weights of another run, and whether they may serve this recipe.

An extension changes how long sequences are, what they are made of, the schedule, and how attention knows positions. The
rest of the architecture, and the tokenizer, are the base's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hinny.checkpoint import differences, read_meta, uncut
from hinny.config import Recipe, TrainConfig
from hinny.errors import CheckpointError, ConfigError
from hinny.run import Run, weights_print

log = logging.getLogger("hinny.train")

POSITIONS = ("positions", "rope_base", "rope_fraction", "rope_scaling", "score_scale")
"""Keys of [model.attention] that say how positions are told."""
MAY_DIFFER = (*(f"attention.{key}" for key in POSITIONS), "mamba1.chunk_len", "mamba2.chunk_len")
"""Keys of [model], or sections of it, that change no weight's shape or meaning: how positions are told, how sums are
cut."""
NO_EFFECT = ("n_layers", "attention_ratio", "mlp_ratio", "init_std", "output_init_std",
             *(f"{section}.{key}" for section in ("mamba1", "mamba2") for key in ("dt_min", "dt_max")))
"""Keys of [model] that say where a pattern and first weights come from; here both are the base's."""


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run begins with, and what the run keeps of it: meta.json of all its checkpoints has
    `record` as "init".
    """

    run: Run
    step: int
    record: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens of the sequences that the base was trained on."""
        return int(self.record["seq_len"])


def open_base(recipe: Recipe, out: Run) -> Base | None:
    """The base that `recipe` names in [init], found to fit; None for a recipe without [init].

    Raises ConfigError where it is not named, or is the run directory `out` itself, and where positions do not fit its
    length; CheckpointError where it has no such checkpoint or is of another architecture; RunError where there is no
    run.
    """
    if recipe.init is None:
        return None
    if recipe.init.source is None:
        raise ConfigError("init.from is not set: the recipe goes on from another run. Name it, init.from=RUN; for a "
                          "training from its own first weights, take a recipe without [init].")
    run = Run(recipe.init.source)
    if run.path.resolve() == out.path.resolve():
        raise ConfigError(f"init.from ({run.path}) is the run directory that is to be written; name another with "
                          "--out.")
    name, meta = run.recipe.name, read_meta(run, recipe.init.step)
    _check_model(run, meta["recipe"]["model"], recipe)
    record = {"from": str(run.path), "step": meta["step"], "name": name, "seq_len": meta["recipe"]["train"]["seq_len"],
              "weights": weights_print(meta)}
    base = Base(run, int(meta["step"]), record)
    _check_positions(base, meta, recipe)
    return base


def converted(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint is of converted weights: training begins with them, at step 0, with a new optimiser."""
    return "source" in meta


def check_tokenizer(run: Run, data: Path) -> None:
    """The data of a run that began elsewhere must be in the words of its model."""
    theirs, ours = ({f.name: f.read_bytes() for f in folder.glob("tokenizer.*")} for folder in (data, run.path))
    if ours and theirs != ours:
        raise CheckpointError(f"the tokenizer of {data} is not that of {run.path}, whose weights know no other. "
                              f"Prepare the data with it: hinny prepare DIR --tokenizer {run.path / next(iter(ours))}.")


def check_same(recipe: Recipe, out: Run, meta: dict[str, Any]) -> None:
    """Refuses to go on in `out` from checkpoint `meta` if the recipe's [init] is not what the run began with.

    The base may have moved, and is looked at only where the recipe names another place or step than the run did.
    """
    saved, wanted = meta["recipe"].get("init"), recipe.model_dump(mode="json")["init"]
    if saved == wanted:
        return
    if converted(meta) and wanted is not None:
        raise ConfigError(f"{out.path} holds converted weights, and init.from names those of {wanted['from']}: a "
                          "training begins with one of them. Leave out [init], or use another run directory.")
    if (saved is None) != (wanted is None):
        began, now = ("from its own first weights" if one is None else f"with the weights of {one['from']}"
                      for one in (saved, wanted))
        raise CheckpointError(f"{out.path} began {began}, and the recipe now begins {now}. Use another run directory, "
                              "or restore [init].")
    base = open_base(recipe, out)
    assert base is not None
    if base.record["weights"] != meta["init"]["weights"]:
        raise CheckpointError(
            f"{out.path} began with step {meta['init']['step']} of {meta['init']['from']}, and step {base.step} of "
            f"{base.run.path} has other weights. Use another run directory, or restore init.from and init.step.")


def _check_model(run: Run, saved: dict[str, Any], recipe: Recipe) -> None:
    changed = differences(uncut(saved), uncut(recipe.model.model_dump(mode="json")))
    refused = {key: values for key, values in changed.items()
               if key not in NO_EFFECT and not any(key == may or key.startswith(f"{may}.") for may in MAY_DIFFER)}
    if refused:
        lines = "\n".join(f"  model.{key}: {old} → {new}" for key, (old, new) in refused.items())
        raise CheckpointError(f"the weights of {run.path} are of another architecture than {recipe.name}:\n{lines}\n"
                              f"Take a recipe of the same sizes; what may differ: {', '.join(MAY_DIFFER)}.")


def _check_positions(base: Base, meta: dict[str, Any], recipe: Recipe) -> None:
    """Says what another scheme of positions, or a length past what positions were trained for, means; refuses a scaling
    made for another length.
    """
    attention, was = recipe.model.attention, meta["recipe"]["model"]["attention"]
    if attention is None:
        return
    before = TrainConfig.model_validate(meta["recipe"]["train"]).pass_len
    longer = recipe.train.pass_len > before
    now = attention.model_dump(mode="json")
    changed = {key: (was.get(key), now[key]) for key in POSITIONS if was.get(key) != now[key]}
    scaling = attention.rope_scaling
    if scaling is not None:
        trained = (was.get("rope_scaling") or {"trained_len": before})["trained_len"]
        if scaling.trained_len != trained:
            told = (f"model.attention.rope_scaling.trained_len is {scaling.trained_len}, and {base.run.path} was "
                    f"trained on {trained} tokens before any scaling")
            if not converted(meta):
                raise ConfigError(f"{told}. Set it to {trained}.")
            log.warning("%s, as far as its recipe knows.", told)
    if changed:
        lines = "; ".join(f"model.attention.{key}: {_told(old)} → {_told(new)}" for key, (old, new) in changed.items())
        # an extension changes them to reach further; anything else may be a recipe that forgot what its base has
        forgotten = [key for key, (_, new) in changed.items() if new is None
                     and (key == "score_scale" or (key == "rope_scaling" and attention.positions == "rope"))]
        meant = longer and not forgotten
        log.log(logging.INFO if meant else logging.WARNING, "attention tells positions otherwise than in %s: %s.",
                base.run.path, lines)
    if attention.positions == "rope" and was["positions"] == "none":
        log.warning("model.attention.positions is rope, and %s was trained without positions on %d tokens: its "
                    "attention has to learn them.", base.run.path, before)
    elif attention.positions == "rope" and longer and scaling is None and not changed:
        log.warning("%s is %d, %.3g times the %d tokens that %s was trained on, and its rotary positions stay as they "
                    "are (base %g): attention meets angles that it has not seen. Raise model.attention.rope_base, set "
                    "model.attention.rope_scaling, or drop positions.",
                    f"train.{recipe.train.pass_key}", recipe.train.pass_len, recipe.train.pass_len / before, before,
                    base.run.path, attention.rope_base)


def _told(value: Any) -> str:
    """A key's value for a line: a section's keys, and "none" where it is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    return "none" if value is None else str(value)
