"""Runs tasks on a run: says first what is missing, then does what is not done, a unit (task and length) at a time.

Nothing is computed before everything is known to be there: tasks, options, data, lengths. Each unit is written when it
is finished (`hinny.evals.record`), so a command that was stopped goes on where it was when it is given again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hinny import __version__
from hinny import tokenizer as tokenizers
from hinny.errors import ConfigError, DataError
from hinny.evals.entry import Entry, Length, Report, Rows, Subject
from hinny.evals.extension import Fixed, Lengths, extension
from hinny.evals.options import EvalOptions
from hinny.evals.record import Record, Unit
from hinny.evals.studied import StudiedTask
from hinny.evals.suites import Chosen, choose
from hinny.infer.reading.requests import Reader
from hinny.run import Run, command_line, commit, machine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """One task, to be run at its lengths."""

    chosen: Chosen
    lengths: list[Length]


def evaluate(run: str | Path, tasks: Iterable[str] = (), options: EvalOptions | None = None, *,
             suite: str | None = None, reader: Reader | None = None, progress: Report | None = None) -> Rows:
    """Evaluate the latest checkpoint of `run` on `tasks` and those of `suite`; returns the rows that were asked for.

    Rows go to RUN/results/TASK.json, all that they depend on to RUN/evals/TASK.json. What is finished there under the
    same options and weights is not run again.
    The suite "extension" asks the run that this one began with as well (hinny.evals.extension).
    reader: who answers in place of the run's model, in tests. progress: told what is under way and its share.
    ConfigError, before the model is loaded, for unknown tasks, options without effect, samples that are too long, and
    for what is missing, with what fetches it; RunError and CheckpointError for the run.
    """
    options, chosen = options or EvalOptions(), choose(tasks, suite)
    if suite != "extension":
        return _evaluate(Run(run), chosen, options, reader, progress)
    if reader is not None:
        raise ConfigError("the suite extension asks two models, and no reader can answer in their place.")

    def ask(one: Run, lengths: Lengths, options: EvalOptions) -> Rows:
        of = lengths.table()
        fixed = [replace(c, entry=Fixed(c.entry, of[c.entry.name])) if c.entry.name in of else c for c in chosen]
        return _evaluate(one, fixed, options, None, progress)

    return extension(run, options, ask)


def _evaluate(opened: Run, chosen: list[Chosen], options: EvalOptions, reader: Reader | None,
              progress: Report | None) -> Rows:
    """As `evaluate`, on tasks that were found."""
    options.check_used({one.entry.name: one.entry.uses for one in chosen})
    opened.recipe  # noqa: B018  (RunError where there is no run)
    tokenizer = tokenizers.load(opened.path) if reader is None else reader.tokenizer
    subject = Subject(opened, options, tokenizer, reader)
    if subject.limit.tokens is None and subject.limit.policy != "error":
        raise ConfigError(f"--truncate {subject.limit.policy} has no effect: {opened.path} has no positions and takes "
                          "any length. Give --max-length, or drop it.")
    works, skipped = _available(chosen, subject)
    records = [_record(subject, work, skipped) for work in works]
    rows: Rows = []
    for place, (work, record) in enumerate(zip(works, records, strict=True), 1):
        rows += _run(subject, work, record, f"{place}/{len(works)}", progress or (lambda stage, share: None))
    if skipped:
        logger.warning("eval: skipped, wholly or in part, for the reasons above: %s", ", ".join(skipped))
    return rows


def _available(chosen: list[Chosen], subject: Subject) -> tuple[list[_Work], dict[str, list[str]]]:
    """What can run, and what is skipped with the reasons. ConfigError if something cannot run that is not skipped."""
    works: list[_Work] = []
    missing: dict[str, list[str]] = {}
    skipped: dict[str, list[str]] = {}
    for one in chosen:
        entry, skip = one.entry, one.lenient or subject.options.missing == "skip"
        if lines := entry.missing(subject):
            (skipped if skip else missing)[entry.name] = lines
            continue
        try:
            lengths, left_out = entry.lengths(subject)
        except (ConfigError, DataError) as fault:
            if not skip:
                raise
            skipped[entry.name] = [str(fault)]
            continue
        if one.lenient:
            longer = [n for n in lengths if n is not None and subject.limit.exceeded(n)]
            lengths = [n for n in lengths if n not in longer]
            left_out = [*left_out, *(f"{entry.name} at {n} tokens: a sample may take {subject.limit.tokens:,}"
                                     for n in longer)]
        if left_out:
            skipped[entry.name] = left_out
        if lengths:
            works.append(_Work(one, lengths))
    if missing:
        lines = list(dict.fromkeys(line for some in missing.values() for line in some))
        says = f"{len(missing)} of {len(chosen)} tasks cannot run, for this is missing:"
        raise ConfigError("\n  ".join([says, *lines]) + "\nFetch it, or give --missing skip to leave these tasks out.")
    for work in list(works):
        try:
            work.chosen.entry.check(subject, work.lengths)
        except ConfigError as fault:
            if not work.chosen.lenient:
                raise
            works.remove(work)
            skipped[work.chosen.entry.name] = [str(fault)]
    for name, lines in skipped.items():
        logger.warning("eval: skipped: %s: %s", name, "; ".join(line.removeprefix(name).lstrip(": ") for line in lines))
    if not works:
        raise ConfigError(f"all {len(chosen)} tasks were skipped, for they cannot run; see above.")
    return works, skipped


def _weights(subject: Subject, entry: Entry) -> dict[str, Any]:
    """Which weights answer: the checkpoint's step and the fingerprint of its files; of a reader its kind."""
    if subject.given is not None and not isinstance(entry, StudiedTask):
        return {"reader": type(subject.given).__name__}
    # torch: the table of tasks is shown without it
    from hinny.checkpoint.store import read_meta

    meta = read_meta(subject.run)
    return {"step": meta["step"], "weights": hashlib.sha256(json.dumps(meta["files"], sort_keys=True).encode())
            .hexdigest()}


def _record(subject: Subject, work: _Work, skipped: dict[str, list[str]]) -> Record:
    """The record of a task: what is finished of it under this command's options."""
    entry, options, attention = work.chosen.entry, subject.options, subject.recipe.model.attention
    key = {**entry.key(subject), "tokenizer": subject.tokenizer.fingerprint,
           **_weights(subject, entry), "precision": subject.precision}
    positions = "none" if attention is None else attention.positions
    given = {name: _plain(value) for name, value in options.given().items()}
    about = {"metrics": list(entry.metrics), "options": given, "longest_allowed": subject.limit.tokens,
             "trained_length": subject.recipe.train.seq_len, "positions": positions, "skipped": skipped}
    return Record.open(subject.run, entry.name, key, about)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _run(subject: Subject, work: _Work, record: Record, place: str, progress: Report) -> Rows:
    """Do what is not done of one task; returns the rows of its lengths."""
    entry, options = work.chosen.entry, subject.options
    if changes := record.changes():
        logger.info("eval: %s: the results of before (%s) move to evals/earlier", entry.name, ", ".join(changes))
    rows: Rows = []
    for length in work.lengths:
        title = entry.name if length is None else f"{entry.name} length={length}"
        progress(f"{place} {title}", 0.0)
        fingerprint = entry.fingerprint(subject, length)
        unit = None if options.again else record.finished(length, fingerprint, with_samples=options.save_samples)
        if unit is not None:
            logger.info("eval: %s %s: finished before", place, title)
            record.publish()
        else:
            try:
                unit = _measure(subject, work, record, length, fingerprint, lambda done, of, title=title: progress(
                    f"{place} {title}", done / max(of, 1)))
            except ConfigError as fault:
                # what only the model or the text can tell
                if not work.chosen.lenient:
                    raise
                logger.warning("eval: skipped: %s: %s", title, fault)
                continue
            logger.info("eval: %s %s: %s", place, title, _said(unit))
        rows += unit["rows"]
    return rows


def _measure(subject: Subject, work: _Work, record: Record, length: Length, fingerprint: str, progress: Any) -> Unit:
    """Run one unit and write it."""
    begun, loaded = time.monotonic(), subject.loading
    outcome = work.chosen.entry.measure(subject, length, progress)
    # the first unit is no slower than the others for having had to load the model
    seconds = time.monotonic() - begun - (subject.loading - loaded)
    unit = {"length": length, "fingerprint": fingerprint, "facts": outcome.facts,
            "saved_samples": subject.options.save_samples, "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "device": subject.device,
            "hinny": __version__, "commit": commit(), "command": command_line(),
            "machine": machine(subject.accelerator), "rows": outcome.rows}
    record.add(unit, outcome.samples)
    return unit


def _said(unit: Unit) -> str:
    """A finished unit in a few words: its headline, what was cut, how long it took."""
    head = unit["rows"][0]
    metric = head["what"].rpartition(".")[2]
    cut = f", {unit['facts']['truncated']:,} truncated" if unit["facts"].get("truncated") else ""
    return f"{metric} {head['value']:.4g}{cut}, {unit['seconds']:.1f} s"
