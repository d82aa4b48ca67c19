"""Whether a recipe's sequences can be trained in segments that carry states (train.segment_len)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hinny import pattern
from hinny.errors import ConfigError

if TYPE_CHECKING:
    from hinny.config.sections import Recipe


def check_segments(recipe: Recipe) -> None:
    """ConfigError where train.segment_len is given and does not fit the sequences, the model or the parallelism."""
    train, parallel, length = recipe.train, recipe.parallel, recipe.train.segment_len
    if length is None:
        return
    key = f"train.segment_len ({length})"
    if length >= train.seq_len:
        raise ConfigError(f"{key} must be below train.seq_len ({train.seq_len}), which it cuts; remove it to train on "
                          "whole sequences.")
    if train.seq_len % length:
        raise ConfigError(f"{key} must divide train.seq_len ({train.seq_len}): segments are of one length. The next "
                          f"train.seq_len that it divides is {-(-train.seq_len // length) * length}.")
    if not set(pattern.CARRYING) & set(pattern.parse(recipe.model.pattern)):
        raise ConfigError(f"{key}: model.pattern ({recipe.model.pattern}) has no layer with a state to carry "
                          f"({', '.join(pattern.CARRYING)}), and segments without carried state would be just shorter "
                          f"sequences. Remove it and give train.seq_len={length}, or add such layers.")
    if parallel.context > 1:
        raise ConfigError(f"{key} and parallel.context ({parallel.context}) both cut sequences: the ranks of `context` "
                          "share the tokens of a sequence, segments follow each other. Give parallel.context=1, or "
                          "remove train.segment_len.")
    if parallel.pipeline > 1:
        raise ConfigError(f"{key}: a segment needs the states that the one before it left in every layer, and the "
                          f"stages of parallel.pipeline ({parallel.pipeline}) do not hand them on. Give "
                          "parallel.pipeline=1, or remove train.segment_len.")
    if train.cuda_graphs:
        raise ConfigError(f"{key}: train.cuda_graphs records one pass that begins without states, and segments begin "
                          "with carried ones. Give train.cuda_graphs=false, or remove train.segment_len.")
