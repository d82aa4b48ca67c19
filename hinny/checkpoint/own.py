"""A run of ours as a source: the weights of its newest checkpoint, without the optimiser."""

from __future__ import annotations

from hinny.checkpoint.formats.files import tokenizer_files
from hinny.checkpoint.formats.foreign import LONGEST, Foreign
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.store import differences, read_meta, read_weights
from hinny.errors import CheckpointError
from hinny.run import Run


def open_run(run: Run) -> Foreign:
    """The newest checkpoint of `run`, verified. Raises CheckpointError if it is damaged or of another model."""
    recipe, meta = run.recipe, read_meta(run)
    if changed := differences(meta["recipe"]["model"], recipe.model.model_dump(mode="json")):
        raise CheckpointError(f"{run.path}: [model] in recipe.toml is not that of the checkpoint, for instance in "
                              f"{next(iter(changed))}. Restore recipe.toml.")
    tensors = read_weights(run)
    facts = {"step": str(meta["step"]), LONGEST: str(recipe.train.seq_len)}
    rows = [Row(name, (name,)) for name in tensors.infos]
    return Foreign("hinny", recipe.model, tensors, rows, tokenizer=tokenizer_files(run.path), facts=facts)
