"""Rotary positions as Hugging Face's settings tell them: plain, interpolated ("linear") and YaRN, in and out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hinny.config import AttentionConfig
from hinny.errors import CheckpointError

if TYPE_CHECKING:
    from hinny.checkpoint.formats.hf_folder import Settings

PLAIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
KNOWN = {"default": PLAIN, "linear": PLAIN | {"factor", "original_max_position_embeddings"},
         "yarn": PLAIN | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                          "truncate"}}
"""rope_type → the keys beside it that hinny computes."""
METHODS = {"linear": "interpolation", "yarn": "yarn"}


def rope(settings: Settings, head_dim: int, fraction: float) -> dict[str, Any]:
    """[model.attention]'s keys for rotary positions; `fraction` of a head is rotated where the settings say none.

    rope_parameters, as of transformers 5, or rope_theta and partial_rotary_factor beside rope_scaling. The length
    before scaling is original_max_position_embeddings or, where that is absent, max_position_embeddings, which
    transformers leaves as it was. Raises CheckpointError for positions that are scaled in another way.
    """
    tables = [settings.need(key, dict) for key in ("rope_parameters", "rope_scaling") if key in settings]
    base, share = settings.get("rope_theta", float, 0.0), settings.get("partial_rotary_factor", float, 0.0)
    scalings: list[dict[str, Any] | None] = []
    for table in tables:
        kind = table.get("rope_type", table.get("type", "default"))
        known = KNOWN.get(kind, PLAIN) if isinstance(kind, str) else PLAIN
        if odd := [key for key in table if key not in known and table[key] is not None]:
            raise CheckpointError(f"{settings.file}: the rotary positions are scaled or changed by "
                                  f"{', '.join(odd)} (rope_type {kind!r}); hinny has {', '.join(KNOWN)} without them.")
        if kind not in KNOWN:
            raise CheckpointError(f"{settings.file}: rope_type is {kind!r}; hinny has {', '.join(KNOWN)}.")
        for key, value in (("rope_theta", base), ("partial_rotary_factor", share)):
            if table.get(key) is not None and value and table[key] != value:
                raise CheckpointError(f"{settings.file}: {key} is {value} and, among the rope parameters, "
                                      f"{table[key]}; it is not clear which is meant. Make them agree.")
        base, share = table.get("rope_theta") or base, table.get("partial_rotary_factor") or share
        scalings.append(_scaling(settings, table, METHODS[kind]) if kind in METHODS else None)
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        told = (", ".join(f"{key} {value}" for key, value in one.items()) if one else "none" for one in scalings)
        raise CheckpointError(f"{settings.file}: rope_parameters and rope_scaling tell scalings that differ "
                              f"({' and '.join(told)}); it is not clear which is meant. Make them agree.")
    return {"positions": "rope", "rope_fraction": float(share or fraction), "rope_base": float(base or 10000.0),
            **({"rope_scaling": scalings[0]} if any(scalings) else {})}


def _scaling(settings: Settings, table: dict[str, Any], method: str) -> dict[str, Any]:
    """[model.attention.rope_scaling] from one of the tables."""
    factor, trained = table.get("factor"), table.get("original_max_position_embeddings")
    if trained is None:
        trained = settings.get("max_position_embeddings", int, 0)
    numbers = {"factor": factor, "original_max_position_embeddings": trained}
    numbers |= {key: table[key] for key in ("attention_factor", "beta_fast", "beta_slow") if table.get(key) is not None}
    for key, value in numbers.items():
        kind = int if key == "original_max_position_embeddings" else (int, float)
        # a NaN is above nothing
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise CheckpointError(f"{settings.file}: the rotary positions are scaled, and {key} is {value!r}; it must "
                                  "be a positive number.")
    assert isinstance(factor, (int, float))
    found = {"method": method, "factor": float(factor), "trained_len": trained}
    if method == "yarn":
        given = table.get("attention_factor")
        if given is not None and not math.isclose(given, 0.1 * math.log(factor) + 1.0, rel_tol=1e-6):
            raise CheckpointError(f"{settings.file}: attention_factor is {given}; hinny has YaRN's own, 0.1 ln(factor) "
                                  f"+ 1 = {0.1 * math.log(factor) + 1.0:.6g}.")
        if table.get("truncate") not in (None, True):
            raise CheckpointError(f"{settings.file}: truncate is {table['truncate']!r}; hinny rounds the range of "
                                  "pairs outwards, as true does.")
        found |= {key: float(table[key]) for key in ("beta_fast", "beta_slow") if table.get(key) is not None}
    return found


def written(attention: AttentionConfig, max_len: int, **more: Any) -> dict[str, Any]:
    """config.json's keys for rotary positions, under their names before transformers 5 and since; `more` stands beside
    rope_theta in both. max_len: the longest sequence that servers should take.
    """
    plain = {"rope_theta": attention.rope_base, **more}
    scaling = attention.rope_scaling
    if scaling is None:
        return {**plain, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **plain},
                "max_position_embeddings": max_len}
    kind = next(name for name, method in METHODS.items() if method == scaling.method)
    told: dict[str, Any] = {"rope_type": kind, "factor": scaling.factor}
    if scaling.method == "yarn":
        told |= {"original_max_position_embeddings": scaling.trained_len, "beta_fast": scaling.fast,
                 "beta_slow": scaling.slow}
    # servers multiply this length by the factor where positions are interpolated
    longest = scaling.trained_len if kind == "linear" else scaling.reach
    return {**plain, "rope_scaling": {**told, "type": kind}, "rope_parameters": {**told, **plain},
            "max_position_embeddings": longest}
