"""What a study may ask of its models: the registry's tasks that need no data set, the options that act on them, and
which of them share a command of `hinny eval`.

The names are those of `hinny eval --list`, written here because a study imports no evaluation; a test compares them.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hinny.config import Recipe
from hinny.errors import ConfigError

if TYPE_CHECKING:
    from hinny.study.config import EvalConfig

Row = dict[str, Any]
STUDIED = ("heldout", "phonebook", "mqar", "copy", "window-loss", "position-joined")
"""Tasks that make their own requests: they are asked at any length."""
CHOICE = ("choice-letter", "choice-text", "choice-cloze")
"""One set of questions in three forms."""
RECALL = ("induction", "copying", "selective-copying", "mqar-4", "mqar-8", "mqar-16", "mqar-64", "ngram-suffix",
          "ngram-prefix", "parity", "parity-running", "permutations-3", "permutations-3-running", "permutations-5",
          "permutations-5-running", "variables", "common-words", "frequent-words", "phonebook-tokens",
          "phonebook-tokens-reversed", "fact-cards")
"""Recall, states and counts by made-up tokens, and cards, at eval.lengths."""
RULER = ("ruler-niah-single-1", "ruler-niah-single-2", "ruler-niah-single-3", "ruler-niah-multikey-1",
         "ruler-niah-multikey-2", "ruler-niah-multikey-3", "ruler-niah-multivalue", "ruler-niah-multiquery", "ruler-vt",
         "ruler-cwe", "ruler-fwe")
"""RULER's thirteen without the two that need documents, at eval.ruler_lengths."""
TASKS = (*STUDIED, *CHOICE, *RECALL, *RULER)

MADE = {*CHOICE, *RECALL, *RULER}
"""Tasks whose samples `hinny eval` holds against what a model may be given."""
ACTS_ON = {"--samples": {*TASKS} - {"heldout"},
           "--lengths": {"phonebook", "copy", "window-loss", "position-joined", *RECALL, *RULER},
           "--pairs": {"mqar"}, "--windows": {"heldout"}, "--max-length": MADE}
"""Option of `hinny eval` → the tasks on which it acts; given without any of them it is refused."""
NOT_ASKED = ("seed", "precision", "ruler_version", "haystack", "truncate")
"""Options on which figures depend and which a study never gives."""
MAY_CHANGE = ("tasks", "ruler_lengths", "max_length")
"""Keys of [eval] that may differ from those of an earlier start in the same folder, of `tasks` those in MADE."""
RULER_MEAN = "ruler.mean"


@dataclass(frozen=True)
class Asking:
    """One command of `hinny eval`: tasks that are asked at the same lengths."""

    part: str
    """What tells its name and log from the others of a run; empty for all but RULER."""
    tasks: tuple[str, ...]
    options: dict[str, str]


def known(tasks: list[str]) -> list[str]:
    """The tasks themselves; ValueError for one that no study asks, or that is named twice."""
    for name in tasks:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=3)
            tail = f"Did you mean {' or '.join(near)}?" if near else f"It may be one of: {', '.join(TASKS)}."
            raise ValueError(f"{name!r} is not a task that a study asks. {tail}")
        if tasks.count(name) > 1:
            raise ValueError(f"{name} is named twice; remove one.")
    return tasks


def check_keys(config: EvalConfig) -> None:
    """ValueError for a key that acts on none of the tasks, or is missing for one."""
    ruler = [name for name in config.tasks if name in RULER]
    if ruler and config.ruler_lengths is None:
        raise ValueError(f"ruler_lengths is missing: tasks names {ruler[0]}, which is made at lengths of its own. "
                         "Give some, such as ruler_lengths = [512, 1024].")
    if not ruler and config.ruler_lengths is not None:
        raise ValueError("ruler_lengths has no effect: tasks names no task of RULER. Remove it, or name one, such as "
                         f"{RULER[0]}.")
    if config.max_length is not None and not MADE & set(config.tasks):
        raise ValueError(f"max_length has no effect on {', '.join(config.tasks)}: these are asked at any length. "
                         "Remove it.")


def check_lengths(config: EvalConfig, recipe: Recipe) -> None:
    """ConfigError for a length that `hinny eval` would refuse for the recipe's model, before anything is trained.

    A sample may take max_length tokens; without it, of a model with rotary positions, those of its training.
    """
    attention = recipe.model.attention
    rotary = attention is not None and attention.positions == "rope"
    limit = config.max_length or (recipe.train.pass_len if rotary else None)
    for key, tasks, lengths in (("lengths", RECALL, config.lengths), ("ruler_lengths", RULER, config.ruler_lengths)):
        asked = [name for name in config.tasks if name in tasks]
        longer = [n for n in lengths or () if limit is not None and n > limit]
        if asked and longer:
            why = "eval.max_length allows" if config.max_length else \
                f"{recipe.name}, which has rotary positions, was trained on"
            raise ConfigError(f"eval.{key} has {max(longer)}, at which {asked[0]} is asked, and {why} {limit} tokens. "
                              f"Set eval.max_length = {max(longer)} to ask all the same, or remove that length.")


def askings(config: EvalConfig) -> Iterator[Asking]:
    """The commands that ask everything of one run: RULER, which has its own lengths, apart."""
    common = {"--samples": str(config.samples), "--max-length": config.max_length and str(config.max_length)}
    for part, tasks, options in (
            ("", [name for name in config.tasks if name not in RULER],
             {"--samples": common["--samples"], "--lengths": commas(config.lengths), "--pairs": commas(config.pairs),
              "--windows": str(config.windows), "--max-length": common["--max-length"]}),
            ("ruler", [name for name in config.tasks if name in RULER],
             {"--lengths": commas(config.ruler_lengths or []), **common})):
        if tasks:
            yield Asking(part, tuple(tasks), {name: value for name, value in options.items()
                                              if value and ACTS_ON[name] & set(tasks)})


def commas(numbers: list[int]) -> str:
    """Numbers as the command line takes them."""
    return ",".join(map(str, numbers))


def is_asked(config: EvalConfig, task: str, record: dict[str, Any]) -> bool:
    """Whether a record of `hinny eval` is what the study asks, not what was asked by hand since.

    A record's key has no lengths of tasks that are made at lengths, so they are compared with the options given.
    """
    sizes, key, given = config.model_dump(exclude={"tasks"}), record.get("key", {}), record.get("options", {})
    if not key or any(sizes[name] != key[name] for name in sizes.keys() & key.keys()):
        return False
    if any(given.get(name) is not None for name in NOT_ASKED):
        return False
    lengths = {**dict.fromkeys(RECALL, config.lengths), **dict.fromkeys(RULER, config.ruler_lengths)}
    return task not in lengths or given.get("lengths") == lengths[task]


def asked_anew(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old`, the section [eval] of an earlier start, with what `new` may change of it: no training depends on these.

    A run whose records are not what the study asks now is asked again (`is_asked`), without being trained again.
    """
    if [name for name in old["tasks"] if name not in MADE] != [name for name in new["tasks"] if name not in MADE]:
        return old
    return {name: value for name, value in old.items() if name not in MAY_CHANGE} | \
        {name: new[name] for name in MAY_CHANGE if name in new}


def study_rows(config: EvalConfig, rows: list[Row]) -> list[Row]:
    """The rows without those of made tasks that the study does not ask, or not at that length: asked by hand, or by an
    earlier start.
    """
    lengths = {**dict.fromkeys(RECALL, config.lengths), **dict.fromkeys(RULER, config.ruler_lengths or [])}

    def asked(row: Row) -> bool:
        task = row["what"].rpartition(".")[0]
        return task not in MADE or (task in config.tasks and (task in CHOICE or _length(row) in lengths[task]))

    return [row for row in rows if asked(row)]


def _length(row: Row) -> int:
    return int(dict(item.split("=", 1) for item in row["shape"].split())["length"])


def ruler_means(config: EvalConfig, rows: list[Row]) -> list[Row]:
    """`ruler.mean`: the mean over the study's RULER tasks at each of its lengths, of one run.

    Only at lengths at which all of them could be made: a mean over fewer tasks is no point of the same curve.
    """
    tasks = [name for name in config.tasks if name in RULER]
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["what"].rpartition(".")[0] in tasks:
            found[_length(row)].append(row)
    means = []
    for length in config.ruler_lengths or ():
        some = found[length]
        if tasks and len(some) == len(tasks):
            asked = sum(int(item.removeprefix("n=")) for row in some for item in row["shape"].split()
                        if item.startswith("n="))
            means.append({**some[0], "what": RULER_MEAN, "value": fmean(row["value"] for row in some),
                          "shape": f"length={length} tasks={len(tasks)} n={asked}", "low": None, "high": None,
                          "command": "\n".join(dict.fromkeys(row["command"] for row in some))})
    return means
