"""Whether a run behaves as the released model that it was converted from: what others saw it do, item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hinny.checkpoint import read_meta, releases
from hinny.errors import DataError
from hinny.infer.engine import Engine
from hinny.run import Run

Items = list[dict[str, Any]]


def verify(run: str | Path, name: str, *, piqa: str | Path | None = None, device: str | None = None,
           progress: Callable[[str, float], None] | None = None) -> Items:
    """Items of the release `name`: what, expected, found, passed. The weights are used in the types they are stored in.

    The checksum and the counts are those that the conversion noted; then the greedy continuations and, with `piqa`,
    a file of JSON lines with goal, sol1, sol2 and label, its accuracy. device: the GPU where there is one.
    Raises ConfigError for an unknown release and DataError for a file that cannot be scored.
    """
    release = releases.find(name)
    report = progress or (lambda stage, share: None)
    questions = None if piqa is None else _read_piqa(Path(piqa))
    items = _noted(Run(run), name)
    engine = Engine(run, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype="stored")
    for i, (prompt, expected) in enumerate(release.greedy):
        report("continue", i / len(release.greedy))
        items.append(releases.item(f"continuation of {prompt!r}", expected, _continue(engine, prompt)))
    if questions is not None:
        items += _score(engine, release, questions, lambda share: report("piqa", share))
    return items


def _noted(run: Run, name: str) -> Items:
    """What the conversion compared, if it was told the release."""
    source = read_meta(run).get("source") or {}
    if source.get("release") == name:
        return list(source["checks"])
    return [releases.item("checksum and counts at conversion", f"compared with {name}", "not compared; convert the "
                          f"source again with --verify {name}")]


def _continue(engine: Engine, prompt: str) -> str:
    ids = engine.tokenizer.encode(prompt)
    before = len(engine.tokenizer.decode(ids))
    return engine.tokenizer.decode([*ids, *engine.tokens(ids, releases.TOKENS)])[before:]


def _read_piqa(file: Path) -> list[tuple[str, tuple[str, str], int]]:
    """Prompt, the two solutions, and which is right."""
    questions = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{file} cannot be read: {fault}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            label = int(row["label"])
            if label not in (0, 1):
                raise ValueError(f"label is {label}")
            questions.append((f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), label))
        except (ValueError, KeyError, TypeError) as fault:
            raise DataError(f"{file}, line {number}: not a question with goal, sol1, sol2 and label 0 or 1: "
                            f"{fault!r}.") from None
    if not questions:
        raise DataError(f"{file} has no questions.")
    return questions


def _score(engine: Engine, release: releases.Release, questions: list[tuple[str, tuple[str, str], int]],
           report: Callable[[float], None]) -> Items:
    right = 0
    for i, (prompt, solutions, label) in enumerate(questions):
        report(i / len(questions))
        likelihoods = [log_likelihood(engine, prompt, solution) for solution in solutions]
        right += likelihoods[label] > likelihoods[1 - label]
    accuracy = right / len(questions)
    count = releases.item("PIQA questions", releases.PIQA_EXAMPLES, len(questions))
    if release.piqa is None:
        return [count, releases.item("PIQA accuracy", "not known", round(accuracy, 4), passed=False)]
    near = math.isclose(accuracy, release.piqa, rel_tol=0, abs_tol=releases.PIQA_NEAR)
    return [count, releases.item("PIQA accuracy", f"{release.piqa} within {releases.PIQA_NEAR}", round(accuracy, 4),
                                 passed=near)]


@torch.no_grad()
def log_likelihood(engine: Engine, prompt: str, continuation: str) -> float:
    """Summed log-probability of `continuation` after `prompt`, in nats, in one pass.

    The two are encoded together, and the tokens behind the prompt's own number of tokens count, as lm-eval does it.
    """
    whole = engine.tokenizer.encode(prompt + continuation)
    start = len(engine.tokenizer.encode(prompt))
    logits: Tensor = engine.logits(torch.tensor([whole]))[0, start - 1:-1].float()
    targets = torch.tensor(whole[start:], device=logits.device)
    # a vocabulary padded for speed has words that no text has, and they have a share of the probability all the same
    return -float(F.cross_entropy(logits, targets, reduction="sum"))
