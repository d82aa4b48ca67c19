"""Recipes that go on from a run."""

from __future__ import annotations

from hinny.config import Recipe, validate

ROPE = {"n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "positions": "rope", "rope_fraction": 0.5, "rope_base": 100.0}


def changed(recipe: Recipe, **sections) -> Recipe:
    """The recipe with keys of its sections changed, checked anew; a section that is None is left out."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    for name, keys in sections.items():
        table[name] = {**table.get(name, {}), **keys}
    return validate(Recipe, table, "test")


def extended(recipe: Recipe, base, length: int = 64, init=None, **sections) -> Recipe:
    batch = {"seq_len": length, "batch_size": 2, "micro_batch_size": 2, "steps": 4, "seed": 5}
    return changed(recipe, init={"from": str(base), **(init or {})}, train={**batch, **sections.pop("train", {})},
                   **sections)
