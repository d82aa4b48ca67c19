"""NarrativeQA, Qasper and QuALITY on hand-made files in SCROLLS's format, against lm-eval's own handling of them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval_files import scrolls_tasks

from hinny.errors import ConfigError, DataError
from hinny.evals import scrolls
from hinny.evals.task import Chosen, Sample, Setting, Task, Written
from hinny.infer.reading.requests import Generated, Scored
from hinny.tokenizer import ByteTokenizer

STORY = "Once upon a time.\n\nAda wrote a book\u2028about engines.\n\nThe end."
OPTIONS = " (A) A cat \n (B) Two  dogs\n (C) An engine\n (D) None of (the) above\n\n\n"
ROWS = {
    "narrative_qa": [
        ("n1", f"Who wrote a book?\n\n{STORY}", "Ada"), ("n2", "Who slept?\n\nAnother story.", "Bob"),
        ("n1", f"Who wrote a book?\n\n{STORY}", "Ada the writer"), ("n3", f"What was it about?\n\n{STORY}", "Engines")],
    "qasper": [
        ("q1", "Is it open?\n\nA paper.", "Yes"), ("q1", "Is it open?\n\nA paper.", "yes."),
        ("q2", "Which data?\n\nA paper.", "the Pile"), ("q3", "Why?\n\nA paper.", "Unanswerable")],
    "quality": [
        ("l1", f"What is it about?\n\n{OPTIONS}{STORY}", "An engine"),
        ("l2", f"How many dogs?\n\n{OPTIONS}{STORY}", "Two dogs")]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the zips as they are downloaded."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "tau/scrolls"
    folder.mkdir(parents=True)
    for name, rows in ROWS.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for split in ("train", "validation", "test"):
                lines = [dict(id=i, pid=f"{i}_0", input=text, output=None if split == "test" else output)
                         for i, text, output in rows]
                archive.writestr(f"{name}/{split}.jsonl",
                                 "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return root


def by_name(name: str) -> Task:
    return next(task for task in scrolls.TASKS if task.name == name)


def samples(name: str, root: Path, n: int = 99) -> list[Sample]:
    return list(by_name(name).samples(Setting(ByteTokenizer(), n, data=root)))


def said(text: str) -> Generated:
    return Generated((), text, "eod")


def liked(*totals: float) -> list[Scored]:
    return [Scored(np.array([total]), np.array([0]), False) for total in totals]


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The rows as lm-eval gives them to a task: one for each id, with all outputs."""
    found: dict[str, dict[str, Any]] = {}
    for i, text, output in ROWS[name]:
        found.setdefault(i, {"id": i, "pid": i, "input": text, "outputs": []})["outputs"].append(output)
    return found


@pytest.mark.parametrize(("name", "their_class"), [("narrativeqa", "NarrativeQA"), ("qasper", "Qasper"),
                                                   ("quality", "QuALITY")])
def test_requests_are_lm_evals(name: str, their_class: str, root: Path) -> None:
    task = getattr(scrolls_tasks(), their_class)
    theirs = object.__new__(task)
    docs = {i: theirs._process_doc(doc)[0] for i, doc in documents(task.DATASET_NAME).items()}
    found = samples(name, root)
    assert {sample.id for sample in found} == set(docs)
    for sample in found:
        doc = docs[sample.id]
        prompt = theirs.doc_to_text(doc)
        asked = theirs.construct_requests(doc, prompt)
        assert not isinstance(asked, list) or isinstance(sample, Chosen)
        if isinstance(sample, Chosen):
            assert [(sample.prompt, choice) for choice in sample.choices] == [request.arguments for request in asked]
            assert sample.right == doc.get("gold", 0)
        else:
            assert isinstance(sample, Written)
            assert sample.prompt == prompt
            assert sample.references == tuple(doc["outputs"])
        assert sample.document is not None
        assert sample.prompt[slice(*sample.document)] == doc["text"]


def test_quality_scores_are_lm_evals(root: Path) -> None:
    module = scrolls_tasks()
    theirs = object.__new__(module.QuALITY)
    doc = theirs._process_doc(documents("quality")["l1"])[0]
    sample = samples("quality", root)[0]
    for totals in ([-9.0, -5.0, -5.5, -30.0], [-9.0, -9.0, -1.0, -9.0], [-1.0, -9.0, -9.0, -9.0]):
        expected = theirs.process_results(doc, [(total, False) for total in totals])
        assert by_name("quality").score(sample, liked(*totals)) == {
            "em": expected["em"] / 100, "acc": expected["acc"]}
    assert by_name("quality").score(sample, liked(-9, -5, -5.5, -30)) == {"em": 1, "acc": 0}, "per character or not"


def test_questions_on_one_text_stand_together_and_ids_gather_their_references(root: Path) -> None:
    found = samples("narrativeqa", root)
    assert [sample.id for sample in found] == ["n1", "n3", "n2"]
    assert [sample.id for sample in samples("narrativeqa", root, 2)] == ["n1", "n3"]
    assert isinstance(found[0], Written)
    assert found[0].references == ("Ada", "Ada the writer")
    assert all(sample.prompt.startswith(STORY) for sample in found[:2] if isinstance(sample, Written))


def test_a_yes_no_question_of_qasper_is_chosen_and_the_others_are_written(root: Path) -> None:
    asked = samples("qasper", root)
    assert [type(sample) for sample in asked] == [Chosen, Written, Written]
    task = by_name("qasper")
    assert task.score(asked[0], liked(-1, -2)) == {"f1": 1, "f1_first_line": 1}
    assert task.score(asked[0], liked(-2, -1)) == {"f1": 0, "f1_first_line": 0}
    assert task.score(asked[2], said(" \n")) == {"f1": 1, "f1_first_line": 1}, "nothing said is unanswerable"
    assert {type(sample) for sample in samples("qasper-written", root)} == {Written}


def test_a_leading_newline_empties_lm_evals_answer_but_not_the_first_line(root: Path) -> None:
    sample, task = samples("narrativeqa", root)[1], by_name("narrativeqa")
    assert isinstance(sample, Written)
    assert task.score(sample, said("\n engines\nand")) == {"f1": 0, "f1_first_line": 1}
    assert task.score(sample, said(" the engines\nand more")) == {"f1": 1, "f1_first_line": 1}
    assert not task.settled(sample, "\n engines")
    assert task.settled(sample, "\n engines\n")


@pytest.mark.parametrize("name", ["narrativeqa", "qasper-written"])
def test_the_right_answer_scores_one_and_another_none(name: str, root: Path) -> None:
    for sample in samples(name, root):
        assert isinstance(sample, Written)
        assert set(by_name(name).score(sample, said(f" {sample.references[0]}\n")).values()) == {1.0}
        assert set(by_name(name).score(sample, said(" I do not know\n")).values()) == {0.0}


def test_extracted_files_are_read(root: Path, tmp_path: Path) -> None:
    for name in ROWS:
        with zipfile.ZipFile(root / f"tau/scrolls/{name}.zip") as archive:
            archive.extractall(tmp_path / "tau/scrolls")
    for task in scrolls.TASKS:
        assert samples(task.name, tmp_path) == samples(task.name, root)
        assert task.missing(Setting(ByteTokenizer(), 1, data=tmp_path)) == []


@pytest.mark.parametrize("task", scrolls.TASKS, ids=lambda task: task.name)
def test_what_is_missing_is_named_with_its_command(task: Task, tmp_path: Path) -> None:
    (line,) = task.missing(Setting(ByteTokenizer(), 1, data=tmp_path))
    assert "hf download --repo-type dataset tau/scrolls " in line
    assert line.endswith(f"--local-dir {tmp_path}/tau/scrolls")
    assert "--data ROOT" in task.missing(Setting(ByteTokenizer(), 1))[0]
    with pytest.raises(ConfigError, match="data is missing"):
        list(task.samples(Setting(ByteTokenizer(), 1, data=tmp_path)))


@pytest.mark.parametrize(("row", "message"), [
    (("l1", "no gap", "x"), "no empty line"), (("l1", "q\n\ntext without choices\n\ntext", "x"), "no choices"),
    (("l1", f"q\n\n{OPTIONS}{STORY}", "A dragon"), "the answer 'A dragon' is none of A cat"),
    (("l1", f"q\n\n{OPTIONS}{STORY}", None), "field 'output' is None")])
def test_rows_of_another_form_are_refused(row: tuple[str, str, str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "tau/scrolls/quality"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text(json.dumps(dict(zip(("id", "input", "output"), row, strict=True))) + "\n")
    with pytest.raises(DataError, match=message):
        samples("quality", tmp_path)
