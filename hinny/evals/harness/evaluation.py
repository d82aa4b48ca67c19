"""Running one standard task on a `Reader`, and what is missing before any can run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hinny.errors import ConfigError, DataError
from hinny.evals.harness.outcome import Figure, Outcome, mean
from hinny.evals.harness.sources import absent, changed, reading_from
from hinny.evals.harness.tasks import SEED, Standard, standard
from hinny.infer.reading.requests import Progress, Reader

if TYPE_CHECKING:
    from hinny.evals.harness.model import Truncate

Documents = list[dict[str, Any]]
"""What lm-eval logs of each document of a task: the document, requests, answers, target and scores."""


def missing(root: Path | None, names: Iterable[str]) -> list[str]:
    """What the tasks `names` need that is not in the folder `root`, each with size, licence and a command to fetch it.

    Without `root` the data sets come from the Hub, and only what is not on it is listed. ConfigError for an unknown
    task. Reads no file's content and needs no extra.
    """
    return absent([standard(name).dataset for name in names], root)


def run(reader: Reader, name: str, *, root: Path | None, samples: int | None = None, shots: int | None = None,
        seed: int = SEED, save: bool = False, max_length: int | None = None, truncate: Truncate = "error",
        progress: Progress | None = None) -> Outcome:
    """Evaluate `reader` on the standard task `name`.

    root: the folder of data sets, from which alone documents are then read; None: the Hub.
    samples: the first so many documents, of each subject where a task has subjects; None: all.
    shots: worked examples, drawn with `seed`; None: as the task's name says.
    save: whether the outcome holds every prompt and answer.
    max_length, truncate: as in `ReaderLM`.
    progress: told of the texts written, then, from 0 again, of the continuations scored; most tasks have one kind.
    ConfigError for an unknown task, missing data or the missing extra; DataError for data that are not the task's.
    """
    task = standard(name)
    shots = task.shots if shots is None else shots
    if samples is not None and samples < 1:
        raise ConfigError(f"samples is {samples}; it must be 1 or more, or none for all documents.")
    if shots < 0:
        raise ConfigError(f"shots is {shots}; it must be 0 or more.")
    if lines := missing(root, [name]):
        raise ConfigError("\n  ".join([f"{name} needs data that are not there:", *lines]))
    _need_extra()
    from datasets.exceptions import DatasetGenerationError
    from lm_eval import evaluate

    from hinny.evals.harness.build import build, version
    from hinny.evals.harness.model import ReaderLM

    model = ReaderLM(reader, max_length, truncate, progress)
    with reading_from(root), _lean():
        try:
            tasks = build(task, root, shots, seed)
        # of `datasets`: an unknown part of a data set, a file that cannot be read, a network that cannot be reached
        except (ValueError, OSError, KeyError, DatasetGenerationError) as fault:
            # which says no more than that there was one
            reason = fault.__cause__ if isinstance(fault, DatasetGenerationError) else fault
            raise DataError(f"{name}: {task.dataset.id} cannot be loaded: {reason}") from fault
        results = evaluate(lm=model, task_dict={"tasks": tasks}, limit=samples, bootstrap_iters=0, log_samples=True)
    assert results is not None
    logged = {part: results["samples"][part] for part in tasks}
    documents = [document for part in logged.values() for document in part]
    aggregates = results["results"][next(iter(tasks))] if len(tasks) == 1 else {}
    return Outcome(
        task=name, version=version(task, tasks), shots=shots, seed=seed, headline=task.headline,
        metrics=_figures(documents, aggregates),
        parts={part: _figures(of, {}) for part, of in logged.items()} if task.subjects else {},
        documents=len(documents), requests=model.requests, truncated=model.truncated,
        fingerprint=_fingerprint(documents),
        samples=tuple(_saved(task, part, document) for part, of in logged.items() for document in of) if save else None)


def _need_extra() -> None:
    """ConfigError if the extra is not installed."""
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as fault:
        raise ConfigError(f"standard tasks need lm-eval and datasets: pip install 'hinny[eval]' ({fault}).") from None


@contextmanager
def _lean() -> Iterator[None]:
    """Within it lm-eval shows no bar while it writes prompts (MMLU would show 57), and compiles each template once.

    By itself it compiles the template of every question and worked example anew, for MMLU a minute.
    """
    from lm_eval import utils
    from lm_eval.api import task

    compiled = cache(utils.env.from_string)

    def rendered(template: str, document: Mapping[str, Any]) -> str:
        return compiled(template).render(**document)

    with changed([(task, "tqdm", partial(task.tqdm, disable=True)), (utils, "apply_template", rendered)]):
        yield


def _figures(documents: Documents, aggregates: Mapping[str, Any]) -> dict[str, Figure]:
    """metric → figure over the documents to which it applies; of a metric that is no mean, lm-eval's aggregate."""
    scores: dict[str, list[Any]] = {}
    for document in documents:
        for metric in document["metrics"]:
            if document[metric] is not None:
                scores.setdefault(metric, []).append(document[metric])
    return {metric: Figure(float(aggregates[f"{metric},none"]), len(values), None, None, None)
            if isinstance(values[0], tuple) else mean([float(value) for value in values])
            for metric, values in scores.items()}


def _fingerprint(documents: Documents) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document["doc_hash"].encode())
    return digest.hexdigest()


def _saved(task: Standard, part: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """One document as it is written out: each prompt with all that was asked after it."""
    asked: Sequence[Any] = document["arguments"]
    given = [answer for answers in document["resps"] for answer in answers]
    prompts: dict[str, list[dict[str, Any]]] = {}
    for (prompt, what), answer in zip(asked, given, strict=True):
        prompts.setdefault(prompt, []).append(_answered(what, answer))
    scores = {metric: float(document[metric]) for metric in document["metrics"]
              if document[metric] is not None and not isinstance(document[metric], tuple)}
    return {**({"subject": part} if task.subjects else {}), "index": document["doc_id"],
            "prompts": [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()],
            "target": document["target"], "scores": scores}


def _answered(asked: Any, answer: Any) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"generation": dict(asked), "answer": answer}
    return {"continuation": asked, "log_probability": float(answer[0]), "greedy": bool(answer[1])}
