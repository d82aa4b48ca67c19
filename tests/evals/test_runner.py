"""Running tasks on a run: what is missing is said first, results are complete and do not depend on the way."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from readers import TextReader, constant, oracle

from hinny import tokenizer as tokenizers
from hinny.errors import ConfigError
from hinny.evals import EvalOptions, evaluate
from hinny.evals.asking import Question, answers, questions
from hinny.evals.task import Chosen, Written
from hinny.evals.truncation import Limit
from hinny.infer.engine import Engine
from hinny.infer.reading.requests import Generated
from hinny.run import Run
from hinny.study.collect import parse_shape

TASKS = ["mqar-4", "choice-text", "phonebook-standard"]
OPTIONS = EvalOptions(samples=3, lengths=(400,))


@pytest.fixture
def run(trained_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def weightless(run: Run) -> Run:
    """A run whose weights cannot be loaded: what raises ConfigError on it did so before."""
    shutil.rmtree(run.checkpoints)
    return run


def _record(run: Run, task: str) -> dict:
    return json.loads((run.path / "evals" / f"{task}.json").read_text())


def _values(rows: list[dict]) -> dict[tuple[str, str], float]:
    return {(row["what"], row["shape"]): row["value"] for row in rows}


def test_a_record_has_all_that_a_figure_depends_on(run: Run) -> None:
    rows = evaluate(run.path, ["mqar-4"], EvalOptions(samples=3, lengths=(400, 100), seed=5))
    assert run.rows("mqar-4") == rows
    assert [parse_shape(row["shape"]) for row in rows] == [
        {"length": length, "n": "3", "shots": "0", "version": "1"} for length in ("100", "100", "400", "400")]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {row["variant"] for row in rows} == {"tiny-hybrid"}
    record = _record(run, "mqar-4")
    assert record["key"]["seed"] == 5
    assert record["key"]["step"] == 6
    assert len(record["key"]["weights"]) == len(record["key"]["tokenizer"]) == 64
    assert record["key"]["samples"] == 3
    assert record["trained_length"] == 64
    first, second = record["units"]
    assert [first["length"], second["length"]] == [100, 400]
    assert second["facts"]["prompt_tokens"]["max"] <= 400
    assert second["facts"]["usage"]["asked"] == sum([400] * 3)
    assert second["facts"]["truncated"] == 0
    assert first["rows"] + second["rows"] == rows
    assert {"seconds", "device", "hinny", "commit", "command", "machine", "finished"} <= set(first)


def test_what_is_missing_is_listed_before_anything_is_loaded(weightless: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError) as found:
        evaluate(weightless.path, ["hellaswag", "mqar-4", "trec", "ruler-qa-squad", "narrativeqa"],
                 EvalOptions(data=tmp_path / "data"))
    message = str(found.value)
    assert message.startswith("4 of 5 tasks cannot run")
    fetch = "hf download --repo-type dataset"
    for command in (f"{fetch} Rowan/hellaswag", f"{fetch} THUDM/LongBench", "dev-v2.0.json", "narrative_qa.zip"):
        assert command in message
    assert "--missing skip" in message


def test_what_is_missing_is_skipped_aloud_if_that_is_asked(run: Run, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    options = EvalOptions(data=tmp_path / "data", samples=2, lengths=(400,), missing="skip")
    with caplog.at_level(logging.WARNING):
        rows = evaluate(run.path, ["trec", "mqar-4"], options)
    assert {row["what"] for row in rows} == {"mqar-4.tokens", "mqar-4.exact"}
    assert "skipped: trec: " in caplog.text
    assert "hf download" in _record(run, "mqar-4")["skipped"]["trec"][0]
    with pytest.raises(ConfigError, match="all 1 tasks were skipped"):
        evaluate(run.path, ["trec"], EvalOptions(data=tmp_path / "data", missing="skip"))


def test_a_suite_that_runs_anywhere_leaves_out_what_cannot(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    recipe = run.recipe
    run.write_recipe(recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": None})}))
    (run.path / "data.json").unlink()
    tokenizer = Engine(run.path).tokenizer
    with caplog.at_level(logging.WARNING):
        evaluate(run.path, ["mqar-4"], EvalOptions(samples=1, lengths=(8, 64), seed=1), reader=constant(tokenizer))
        assert "at 8 tokens: its shortest samples take" in caplog.text
        with pytest.raises(ConfigError, match=r"heldout: .*no held-out text"):
            evaluate(run.path, ["heldout"])
        rows = evaluate(run.path, suite="synthetic", options=EvalOptions(samples=1, lengths=(64,)),
                        reader=constant(tokenizer))
    assert {"parity.exact", "choice-text.acc", "chain_loss"} <= {row["what"] for row in rows}
    assert "skipped: heldout: " in caplog.text
    assert "skipped: ruler-cwe: " in caplog.text


@pytest.mark.parametrize(("tasks", "chosen", "message"), [
    (["heldout"], {"lengths": (64,)}, "--lengths has no effect on heldout"),
    (["mqar", "copy"], {"windows": 3}, "--windows has no effect on mqar, copy"),
    (["ruler-vt"], {"haystack": Path(__file__)}, "--haystack has no effect on ruler-vt"),
    (["mqar-4"], {"ruler_version": "head"}, "--ruler-version has no effect"),
    (["mqar-4"], {"data": Path(__file__).parent}, "--data has no effect on mqar-4"),
    (["mqar-4"], {"shots": 3}, "--shots has no effect"),
    (["trec"], {"seed": 3}, "--seed has no effect"),
    (["mqar"], {"save_samples": True}, "--save-samples has no effect"),
])
def test_an_option_without_effect_is_refused(weightless: Run, tasks: list[str], chosen: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(weightless.path, tasks, EvalOptions(**chosen))


@pytest.mark.parametrize("chosen", [dict(seed=-1), dict(truncate="right"), dict(missing="ask"), dict(max_length=0),
                                    dict(ruler_version="2023"), dict(precision="fp8"), dict(data=Path("no-such"))])
def test_choices_are_checked(chosen: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(chosen))):
        EvalOptions(**chosen)


def test_scores_depend_neither_on_the_company_nor_on_the_batch(run: Run) -> None:
    together = _values(evaluate(run.path, TASKS, EvalOptions(samples=3, lengths=(700,))))
    alone = {}
    for task in reversed(TASKS):
        lengths = None if task == "choice-text" else (700,)
        alone |= _values(evaluate(run.path, [task], EvalOptions(samples=3, lengths=lengths, batch_tokens=64,
                                                                again=True)))
    assert alone == together


def test_the_first_samples_of_a_longer_run_are_those_of_a_shorter_one(run: Run) -> None:
    lines = {}
    for samples in (2, 4):
        evaluate(run.path, ["choice-text"], EvalOptions(samples=samples, save_samples=True))
        found = (run.path / "evals" / "choice-text.samples.jsonl").read_text().splitlines()
        lines[samples] = [json.loads(line) for line in found]
    assert [line["prompt"] for line in lines[4][:2]] == [line["prompt"] for line in lines[2]]
    for short, long in zip(lines[2], lines[4], strict=False):
        assert short["log_probabilities"] == pytest.approx(long["log_probabilities"], abs=1e-4)


def test_saved_samples_are_what_the_model_says_of_their_text(run: Run) -> None:
    (row, _) = evaluate(run.path, ["choice-text"], EvalOptions(samples=4, save_samples=True))
    samples = [json.loads(line) for line in
               (run.path / "evals" / "choice-text.samples.jsonl").read_text().splitlines()]
    engine = Engine(run.path)
    for sample in samples:
        for choice, said in zip(sample["choices"], sample["log_probabilities"], strict=True):
            # the tokens are bytes
            ids = torch.tensor([list((sample["prompt"] + choice).encode())])
            start = len(sample["prompt"].encode())
            p = engine.model(ids)[0].double().log_softmax(-1)
            truth = sum(float(p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
            assert said == pytest.approx(truth, abs=1e-3)
    assert row["value"] == sum(sample["scores"]["acc"] for sample in samples) / 4


@pytest.mark.parametrize(("task", "chosen", "message"), [
    ("mqar-4", {"lengths": (64, 200), "max_length": 100}, "samples of 200 tokens are longer than the 100"),
    ("choice-text", {"samples": 3, "max_length": 40}, "3 of 3 samples take more than 40 tokens, the longest"),
    ("mqar-4", {"lengths": (64, 200), "max_length": 100, "truncate": "left"}, "takes 200 tokens.*nothing of it may be"),
    ("choice-text", {"samples": 3, "max_length": 40, "truncate": "middle"}, "nothing of it may be cut"),
    ("mqar-4", {"truncate": "middle"}, "--truncate middle has no effect"),
])
def test_samples_that_are_too_long_are_refused_before_anything_is_loaded(weightless: Run, task: str, chosen: dict,
                                                                        message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(weightless.path, [task], EvalOptions(**chosen))


def test_a_model_with_positions_takes_its_trained_length_unless_told(run: Run) -> None:
    recipe = run.recipe
    attention = recipe.model.attention.model_copy(update={"positions": "rope", "rope_fraction": 1.0,
                                                          "rope_base": 10000.0})
    run.write_recipe(recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": attention})}))
    reader = constant(tokenizers.load(run.path))
    with pytest.raises(ConfigError, match="longer than the 64 that a sample may take"):
        evaluate(run.path, ["mqar-4"], EvalOptions(samples=1, lengths=(65,)), reader=reader)
    evaluate(run.path, ["mqar-4"], EvalOptions(samples=1, lengths=(65,), max_length=65), reader=reader)
    assert _record(run, "mqar-4")["longest_allowed"] == 65


def test_the_suite_that_is_to_run_anywhere_leaves_out_what_is_too_long(run: Run) -> None:
    options = EvalOptions(samples=1, lengths=(40, 65), windows=1, max_length=64)
    rows = evaluate(run.path, options=options, suite="synthetic", reader=constant(tokenizers.load(run.path)))
    sized = {row["shape"].partition(" ")[0] for row in rows if row["what"].startswith(("mqar", "parity", "copying"))}
    assert sized == {"length=40"}
    skipped = _record(run, "mqar-4")["skipped"]
    assert skipped["mqar-4"] == ["mqar-4 at 65 tokens: a sample may take 64"]
    assert "samples take more than 64 tokens" in skipped["choice-text"][0]


class _Mixed:
    """Every third sample is a choice."""

    name, version, shots, metrics, sized = "mixed", "1", 0, ("right",), False

    def settled(self, sample: Written, text: str) -> bool:
        return False


def _asked(text: str) -> list[Question]:
    samples = [Written(str(i), f"{text} {i}", (), 9) if i % 3 else Chosen(str(i), f"{text} {i}", (" no", " yes"), 1)
               for i in range(7)]
    return list(questions("mixed", samples, tokenizers.load("bytes"), Limit(None)))


@pytest.mark.parametrize(("at_once", "calls"), [(2**23, [4, 6]), (40, [1, 1, 1, 1, 2, 2, 2])])
def test_a_task_of_both_kinds_gets_each_answer_to_its_question(monkeypatch: pytest.MonkeyPatch, at_once: int,
                                                               calls: list[int]) -> None:
    monkeypatch.setattr("hinny.evals.asking.ASKED_AT_ONCE", at_once)
    reader = TextReader(tokenizers.load("bytes"), lambda prompt: " yes", lambda prefix: 0)
    reader.text = lambda prompt: prompt[-1] if int(prompt[-1]) % 3 else " yes"
    asked = _asked("one text, many questions")
    found = list(answers(reader, _Mixed(), asked, len(asked)))
    assert [question for question, _ in found] == asked
    for i, (_, answer) in enumerate(found):
        if i % 3:
            assert isinstance(answer, Generated)
            assert answer.text == str(i)
        else:
            assert isinstance(answer, list)
            assert [scored.total > -2 for scored in answer] == [False, True]
    assert sorted(reader.calls) == sorted(calls)


def test_no_more_than_a_group_of_a_task_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("ENCODED_AT_ONCE", 2), ("ASKED_AT_ONCE", 60)):
        monkeypatch.setattr(f"hinny.evals.asking.{name}", size)
    drawn: list[int] = []

    def samples() -> Iterator[Written]:
        for i in range(40):
            drawn.append(i)
            yield Written(str(i), f"{i:11}", (), 9)

    reader = constant(tokenizers.load("bytes"))
    found = answers(reader, _Mixed(), questions("mixed", samples(), reader.tokenizer, Limit(None)), 40)
    first, _ = next(found)
    assert first.sample.id == "0"
    # a group of three, what is too much for it, and those that are encoded with that
    assert len(drawn) <= 6
    assert [question.sample.id for question, _ in found] == [str(i) for i in range(1, 40)]
    assert len(reader.calls) == 14


@pytest.mark.parametrize("letters", [1, 25, 2**23])
def test_what_is_encoded_together_changes_no_token(monkeypatch: pytest.MonkeyPatch, letters: int) -> None:
    together = [question.prompt.tolist() for question in _asked("one text")]
    monkeypatch.setattr("hinny.evals.asking.LETTERS_AT_ONCE", letters)
    assert [question.prompt.tolist() for question in _asked("one text")] == together


def test_loading_the_model_is_not_the_first_tasks_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Engine.__init__

    def slowly(*given: Any) -> None:
        time.sleep(2)
        load(*given)

    monkeypatch.setattr(Engine, "__init__", slowly)
    evaluate(run.path, ["mqar-4"], EvalOptions(samples=1, lengths=(64,)))
    assert _record(run, "mqar-4")["units"][0]["seconds"] < 2


def test_questions_about_one_text_count_as_one_in_the_interval(run: Run) -> None:
    """Phone books are asked ten questions each: all right or all wrong is known less well than of ten books."""
    reader = oracle("phonebook-standard", tokenizers.load(run.path))
    rows = evaluate(run.path, ["phonebook-standard"], EvalOptions(samples=10, lengths=(1500,)), reader=reader)
    books = {line.prompt[:40] for line in reader.asked}
    exact = next(row for row in rows if row["what"] == "phonebook-standard.exact")
    assert exact["value"] == 1.0
    assert len(books) < 10
    # Wilson's lower bound of k of k is k / (k + 1.96²)
    assert exact["low"] == pytest.approx(len(books) / (len(books) + 1.96 ** 2))
