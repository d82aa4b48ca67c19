"""LongBench's tasks on hand-made files in the data set's two formats."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from lm_eval_files import longbench_prompt

from hinny.errors import ConfigError, DataError
from hinny.evals import longbench
from hinny.evals.task import Setting, Task, Written
from hinny.infer.reading.requests import Generated
from hinny.tokenizer import ByteTokenizer

FILES = {task.name: task.file for task in longbench.TASKS if isinstance(task, longbench.LongBench)}
CLASSES = ["Food", "Date", "Other location", "Definition of something"]
# a line separator inside a text is no end of a row; a brace is no field of a template
ROW = {"input": "Who wrote {it}?", "context": "Passage 1:\nA book\u2028by {Ada} Lovelace.\n\nPassage 2:\nNothing.",
       "answers": ["Ada Lovelace", "Lovelace"], "length": 8, "dataset": "x", "language": "en", "all_classes": None,
       "_id": "77"}
FEWSHOT = {
    "trec": ROW | {"input": "Question: Where is it ?\nType:", "answers": ["Other location"], "all_classes": CLASSES,
                   "context": "Question: What is rye ?\nType: Food\nQuestion: When ?\nType: Date"},
    "triviaqa": ROW | {"input": "Passage:\nIt is Ada.\nQuestion:\nWho?\nAnswer:", "answers": ["Ada", "A. Lovelace"]}}


def row(file: str) -> dict[str, Any]:
    return FEWSHOT.get(file, ROW)


def setting(root: Path | None, samples: int = 9) -> Setting:
    return Setting(ByteTokenizer(), samples, data=root)


def said(text: str) -> Generated:
    return Generated((), text, "eod")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with data.zip as it is downloaded; two rows a task."""
    root = tmp_path_factory.mktemp("root")
    (root / "THUDM/LongBench").mkdir(parents=True)
    with zipfile.ZipFile(root / "THUDM/LongBench/data.zip", "w") as archive:
        for file in FILES.values():
            rows = [row(file), row(file) | {"_id": "78"}]
            archive.writestr(f"data/{file}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return root


def first(task: Task, root: Path) -> Written:
    sample = next(iter(task.samples(setting(root))))
    assert isinstance(sample, Written)
    return sample


@pytest.mark.parametrize("task", longbench.TASKS, ids=lambda task: task.name)
def test_prompts_are_lm_evals_except_the_empty_line_of_triviaqa(task: Task, original: Path) -> None:
    file, sample = FILES[task.name], first(task, original)
    theirs = longbench_prompt(file, {"context": row(file)["context"], "question": row(file)["input"]})
    if file == "triviaqa":
        theirs = theirs.replace("Nothing.\nPassage:", "Nothing.\n\nPassage:")
    assert sample.prompt == theirs


@pytest.mark.parametrize("task", longbench.TASKS, ids=lambda task: task.name)
def test_a_sample_has_the_rows_answers_and_marks_its_document(task: Task, original: Path) -> None:
    samples = list(task.samples(setting(original)))
    assert [sample.id for sample in samples] == ["77", "78"]
    assert [sample.id for sample in task.samples(setting(original, samples=1))] == ["77"]
    sample = first(task, original)
    assert sample.document is not None
    assert sample.prompt[slice(*sample.document)] == row(FILES[task.name])["context"]
    assert sample.references == tuple(row(FILES[task.name])["answers"])
    assert task.missing(setting(original)) == []
    assert task.least(setting(original)) == 0


def test_answers_have_the_lengths_of_the_benchmark() -> None:
    assert {task.name: task.max_tokens for task in longbench.TASKS if isinstance(task, longbench.LongBench)} == {
        "multifieldqa-en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32, "trec": 64, "triviaqa": 32,
        "narrativeqa-longbench": 128, "qasper-longbench": 128}


@pytest.mark.parametrize("task", longbench.TASKS, ids=lambda task: task.name)
def test_the_right_answer_scores_one_and_another_none(task: Task, original: Path) -> None:
    sample = first(task, original)
    assert task.score(sample, said(f" {sample.references[-1]}")) == dict.fromkeys(task.metrics, 1.0)
    assert task.score(sample, said(" I do not know")) == dict.fromkeys(task.metrics, 0.0)


def by_name(name: str) -> Task:
    return next(task for task in longbench.TASKS if task.name == name)


def test_rambling_lowers_f1_but_not_that_of_the_first_line(original: Path) -> None:
    task = by_name("hotpotqa")
    sample = first(task, original)
    scores = task.score(sample, said("\n Ada Lovelace\n\nQuestion: What else?"))
    assert scores == {"f1": pytest.approx(2 * 2 / (5 + 2)), "f1_first_line": 1}
    assert not task.settled(sample, " Ada Lovelace\n\nQuestion"), "every further word counts"


@pytest.mark.parametrize(("name", "answer"), [("trec", "Other location"), ("triviaqa", "Ada")])
def test_few_shot_answers_end_with_their_first_line_that_is_not_empty(name: str, answer: str, original: Path) -> None:
    task = by_name(name)
    sample = first(task, original)
    text = f"\n\n {answer}\n"
    assert list(task.score(sample, said(text + "Question: Food Date Bob")).values()) == [1.0]
    assert not task.settled(sample, text[:-1])
    assert task.settled(sample, text)


def pieces(file: str) -> dict[str, Any]:
    """The row as in the tables, whose context is the prompt up to the question."""
    task = next(t for t in longbench.TASKS if FILES[t.name] == file)
    assert isinstance(task, longbench.LongBench)
    source = row(file)
    prefix = "Type:" if file == "trec" else "Answer:"
    asked = task.between + source["input"] + task.tail
    cut = len(task.between.removesuffix("Question: "))
    return {name: source[name] for name in ("answers", "length", "all_classes", "_id")} | {
        "context": task.head + source["context"] + asked[:cut], "question": asked[cut:].removesuffix(prefix),
        "answer_prefix": prefix, "task": file, "max_new_tokens": 52}


def test_the_tables_give_the_same_samples(original: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for file in FILES.values():
        folder = tmp_path / longbench.TABLES / file
        folder.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist([pieces(file)]), folder / "test-00000-of-00001.parquet")
    for task in longbench.TASKS:
        assert first(task, tmp_path) == first(task, original), task.name


def test_a_table_of_another_make_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / longbench.TABLES / "hotpotqa"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([pieces("hotpotqa") | {"context": "bare"}]), folder / "0.parquet")
    with pytest.raises(DataError, match="does not begin and end with hotpotqa's instructions"):
        first(by_name("hotpotqa"), tmp_path)


def test_tables_without_pyarrow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / longbench.TABLES / "hotpotqa"
    folder.mkdir(parents=True)
    (folder / "0.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'hinny\[eval\]'"):
        first(by_name("hotpotqa"), tmp_path)


def test_extracted_files_are_read_also_under_the_new_name_of_the_repository(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zai-org/LongBench"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(original / "THUDM/LongBench/data.zip") as archive:
        archive.extractall(folder)
    assert first(by_name("musique"), tmp_path) == first(by_name("musique"), original)


@pytest.mark.parametrize("task", longbench.TASKS, ids=lambda task: task.name)
def test_what_is_missing_is_named_with_its_command(task: Task, tmp_path: Path) -> None:
    (line,) = task.missing(setting(tmp_path))
    assert line.endswith("hf download --repo-type dataset THUDM/LongBench data.zip --local-dir "
                         f"{tmp_path}/THUDM/LongBench")
    assert "--data ROOT" in task.missing(setting(None))[0]
    with pytest.raises(ConfigError, match="data is missing"):
        list(task.samples(setting(tmp_path)))


@pytest.mark.parametrize(("content", "message"), [
    (b'{"input": "q"}\n', "field 'context' is None"), (b"{\n", "line 1: not JSON"), (b"[]\n", "line 1: not an object"),
    (b'{"input": "q", "context": "c", "answers": []}\n', "row 1: field 'answers' is empty")])
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "THUDM/LongBench/data"
    folder.mkdir(parents=True)
    (folder / "hotpotqa.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        first(by_name("hotpotqa"), tmp_path)


def test_a_pointer_in_place_of_the_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "THUDM/LongBench").mkdir(parents=True)
    (tmp_path / "THUDM/LongBench/data.zip").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git-lfs"):
        by_name("trec").missing(setting(tmp_path))
