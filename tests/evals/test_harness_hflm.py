"""The standard tasks give what lm-eval gives: its own task files, its own HFLM over transformers' twin of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness_offline import offline_root  # noqa: F401
from small import small_model

from hinny.bench.peers import transformers_twin
from hinny.evals.harness import STANDARD, Outcome, run
from hinny.evals.harness.sources import reading_from
from hinny.infer.reading.reader import ModelReader
from hinny.tokenizer import EOD_TEXT, train_bpe

for package in ("lm_eval", "transformers", "accelerate"):
    pytest.importorskip(package)
# of lm-eval, accelerate and transformers
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = train_bpe(["Question: who wrote hamlet?\nAnswer: the people in London, 1945.\n\n" * 9,
                   "½ ∂x → größe 日本 🦔 " * 9,
                   "Which of the following choices about anatomy and foreign policy is right? A. B. C. D." * 9], 360)
SCORED_HERE = {"squad-v2": "squadv2"}
"""Tasks with the questions of a task of lm-eval and scores of hinny's own."""


def hflm(twin: Any, max_length: int, batch: int) -> Any:
    """lm-eval's model; `tokenizers` reads the same file as ours does."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Inner
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Inner.from_str(WORDS.content.decode()), eos_token=EOD_TEXT,
                                    pad_token=EOD_TEXT)
    return HFLM(pretrained=twin, tokenizer=words, backend="causal", batch_size=batch, max_length=max_length)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a task does not say how much is written both write the same; here less of it, to save time."""
    from lm_eval.models.huggingface import HFLM

    from hinny.evals.harness import model

    assert HFLM.max_gen_toks.fget(None) == model.MAX_GEN_TOKS  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "MAX_GEN_TOKS", 40)
    monkeypatch.setattr(HFLM, "max_gen_toks", 40)


@pytest.fixture(scope="module", name="pair")
def of_one_model() -> tuple[ModelReader, Any]:
    """Our reader of a small hybrid in float32, and transformers' twin of it."""
    config = dict(attention=dict(n_heads=4, n_kv_heads=2, head_dim=8, positions="none"), init_std=0.2)
    model = small_model("M*-M", vocab_size=WORDS.vocab_size, **config).float().eval()
    twin = transformers_twin(model).float().eval()
    # its class has another one by default
    twin.generation_config.eos_token_id = WORDS.eod
    return ModelReader(model, WORDS), twin


def stock(name: str, root: Path, shots: int) -> dict[str, Any]:
    """Tasks of lm-eval's files as they are: the data sets are found in the working directory."""
    from lm_eval.tasks import TaskManager

    from hinny.evals.harness.build import FOLDER, build, parts

    task = STANDARD[name]
    if task.changes or (task.source.startswith("hinny.") and name not in SCORED_HERE):
        # no such task there: its definition is held against the benchmark's in test_harness.py
        return build(task, root, shots, seed=1234)
    manager = TaskManager(include_path=str(FOLDER / task.folder), include_defaults=False)
    names = [SCORED_HERE[name]] if name in SCORED_HERE else list(parts(task, manager).values())
    tasks = manager.load(names)["tasks"]
    for of in tasks.values():
        of.set_config(key="num_fewshot", value=shots)
        of.set_fewshot_seed(1234)
    return tasks


def same(ours: Outcome, theirs: dict[str, Any]) -> set[type]:
    """Hold every prompt, answer and score of `ours` against lm-eval's; the kinds of answers that there were."""
    documents = [document for part in theirs["samples"].values() for document in part]
    assert ours.samples is not None
    assert len(ours.samples) == len(documents) > 0
    kinds = set()
    for sample, document in zip(ours.samples, documents, strict=True):
        asked = [(prompt["prompt"], answer.get("continuation", answer.get("generation")),
                  answer.get("log_probability", answer.get("answer")), answer.get("greedy"))
                 for prompt in sample["prompts"] for answer in prompt["answers"]]
        expected = [(*arguments, *((given, None) if isinstance(given, str) else given))
                    for arguments, (given,) in zip(document["arguments"], document["resps"], strict=True)]
        # ours are grouped by prompt; those of lm-eval are in the order of the choices
        for (prompt, what, answer, greedy), other in zip(asked, expected, strict=True):
            assert (prompt, what, greedy) == (other[0], other[1], other[3])
            assert answer == (other[2] if isinstance(answer, str) else pytest.approx(other[2], abs=1e-4))
            kinds.add(type(answer))
        if ours.task not in SCORED_HERE:
            assert sample["scores"] == {metric: pytest.approx(document[metric], abs=1e-5)
                                        for metric in document["metrics"]}
    return kinds


@pytest.mark.parametrize("name", STANDARD)
def test_every_task_gives_what_lm_eval_gives(name: str, root: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluate

    monkeypatch.chdir(root)
    # lm-eval would download SQuAD's scorer; test_harness_squad.py has the scores
    monkeypatch.setattr("evaluate.load", lambda _: SimpleNamespace(compute=lambda **_: {}))
    reader, twin = pair
    ours = run(reader, name, root=root, save=True)
    with reading_from(root):
        theirs = evaluate(hflm(twin, 4096, 4), {"tasks": stock(name, root, STANDARD[name].shots)}, bootstrap_iters=0)
    kinds = same(ours, theirs)
    assert kinds == {"nq-open": {str}, "squad-v2": {str, float}}.get(name, {float})
    for part, figures in (ours.parts or {"": ours.metrics}).items():
        of_part = next(figure for task, figure in theirs["results"].items() if part in task)
        found = {key.split(",")[0]: value for key, value in of_part.items()
                 if "," in key and "stderr" not in key}
        assert set(figures) == set(found)
        if name not in SCORED_HERE:
            assert {metric: figure.value for metric, figure in figures.items()} == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(("name", "theirs", "shots"), [("piqa", "piqa", 3), ("nq-open", "nq_open", 1)])
def test_worked_examples_are_those_that_lm_evals_command_draws(
        name: str, theirs: str, shots: int, root: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from hinny.evals.harness.build import FOLDER

    monkeypatch.chdir(root)
    reader, twin = pair
    ours = run(reader, name, root=root, shots=shots, save=True)
    manager = TaskManager(include_path=str(FOLDER / STANDARD[name].folder), include_defaults=False)
    with reading_from(root):
        found = simple_evaluate(model=hflm(twin, 4096, 4), tasks=[theirs], num_fewshot=shots, task_manager=manager,
                                bootstrap_iters=0)
    same(ours, found)


@pytest.mark.parametrize(("name", "max_length"), [("mmlu-5shot", 60), ("nq-open", 40 + 10)])
def test_what_is_cut_on_the_left_is_what_lm_eval_cuts(
        name: str, max_length: int, root: Path, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluate

    monkeypatch.chdir(root)
    reader, twin = pair
    ours = run(reader, name, root=root, save=True, max_length=max_length, truncate="left")
    assert ours.truncated == ours.requests > 0
    with reading_from(root):
        tasks = {"tasks": stock(name, root, STANDARD[name].shots)}
        same(ours, evaluate(hflm(twin, max_length, 1), tasks, bootstrap_iters=0))


def test_odd_texts_are_answered_as_lm_evals_model_answers_them(pair: Any) -> None:
    from lm_eval.api.instance import Instance

    from hinny.evals.harness.model import ReaderLM

    def instances(*arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance("loglikelihood", {}, of, i) for i, of in enumerate(arguments)]

    reader, twin = pair
    ours, theirs = ReaderLM(reader), hflm(twin, 4096, 4)
    asked = instances(("", "alone"), ("größe 日", " 本 🦔"), ("ends in spaces  \n ", "x"), ("café\u0301", "\u0301 ½"),
                      ("A", "\n"), ("Answer:", " the people"), ("Answer: ", "the people"),
                      ("🦔 Answer:", " D"), ("🦔 Answer:", " D. the"))
    for found, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    texts = instances(("größe 日本 🦔 ∂x → ½ of the people in London, 1945.",), ("A",), ("",))
    for max_length in (4096, 7, 2):
        rolled = ReaderLM(reader, max_length=max_length).loglikelihood_rolling(texts)
        assert rolled == pytest.approx(hflm(twin, max_length, 4).loglikelihood_rolling(texts), abs=1e-4)
    free = theirs.generate_until(instances(*((prompt, {"until": [], "max_gen_toks": 40}) for prompt in
                                             ("Question: who", "größe 日本", "🦔 "))))
    # stop strings that do come, among them one that spans tokens and one that begins inside another
    stops = [[text[5:8], text[7:9]] for text in free]
    writing = instances(*((prompt, {"until": until, "max_gen_toks": 40}) for prompt in
                          ("Question: who", "größe 日本", "🦔 ") for until in (*stops, [], ["\n", "."], "e")))
    assert ours.generate_until(writing) == theirs.generate_until(writing)
