"""Cards and multiple choice: a reader of the text alone is right, silence and constants are not, lengths are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from oracle_synthetic import synthetic_answer

from hinny.data.choices import choice_training
from hinny.errors import ConfigError
from hinny.evals.synthetic import TASKS
from hinny.evals.task import Chosen, Setting, Task, Written
from hinny.infer.reading.requests import Generated, Scored
from hinny.tokenizer import ByteTokenizer, Tokenizer, load, train_bpe

BY_NAME = {task.name: task for task in TASKS}
CARDS = BY_NAME["fact-cards"]
CHOICES = [task for task in TASKS if task.name.startswith("choice-")]
RULER_QA = re.compile(
    r"Answer the question based on the given documents\. Only give me the answer and do not output any other words\."
    r"\n\nThe following are given documents\.\n\n(Document \d+:\n.+?)\n\n"
    r"Answer the question based on the given documents\. Only give me the answer and do not output any other words\."
    r"\n\nQuestion: (.+) Answer:", re.DOTALL)


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    text = _cards(ByteTokenizer(), 1, 4000)[0].prompt
    if request.param == "bpe":
        return train_bpe([text], 600)
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with open(file, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.splitlines()), model_writer=writer,
                                                 vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2)
    return load(file)


def _cards(tokenizer: Tokenizer, n: int, length: int, **changes: int) -> list[Written]:
    return list(CARDS.samples(Setting(tokenizer, n, length=length, **changes)))


def _said(text: str) -> Generated:
    return Generated((), text, "length")


def test_names_are_unique_and_spelt_as_they_are_typed() -> None:
    assert len(BY_NAME) == len(TASKS)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in BY_NAME)
    assert all(isinstance(task, Task) for task in TASKS)
    assert not {"heldout", "phonebook", "mqar", "copy"} & set(BY_NAME), "the tasks of studies keep their names"


def test_a_reader_of_the_cards_is_right(tokenizer: Tokenizer) -> None:
    samples = _cards(tokenizer, 20, 4000)
    assert [CARDS.score(s, _said(synthetic_answer(s.prompt))) for s in samples] == [{"match": 1.0}] * 20
    assert [CARDS.score(s, _said(f"It is {synthetic_answer(s.prompt).upper()}.")) for s in samples] == [
        {"match": 1.0}] * 20
    for constant in ("", "I do not know.", "Document 1"):
        assert [CARDS.score(s, _said(constant)) for s in samples] == [{"match": 0.0}] * 20


def test_another_answer_of_the_kind_is_wrong() -> None:
    """No answer is part of another: what is found in the text is the answer meant."""
    samples = _cards(ByteTokenizer(), 40, 4000)
    for sample in samples:
        others = {s.references[0] for s in samples} - set(sample.references)
        assert not any(CARDS.score(sample, _said(other))["match"] for other in others)


def test_the_score_is_settled_once_the_answer_stands_there() -> None:
    sample = _cards(ByteTokenizer(), 1, 4000)[0]
    answer = sample.references[0]
    assert not CARDS.settled(sample, f"It is {answer[:-1]}")
    assert CARDS.settled(sample, f"It is {answer}")
    assert CARDS.score(sample, _said(f"It is {answer}, or something else"))["match"] == 1.0


def test_cards_have_rulers_shape_and_fill_the_length(tokenizer: Tokenizer) -> None:
    least = CARDS.least(Setting(tokenizer, 1))
    # the rest: a card that does not fit, and the difference of the longest question and this one
    rest = max(len(tokenizer.encode(card)) for card in _cards(tokenizer, 1, 4000)[0].prompt.split("\n\n")[2:-2]) + 60
    for length in (least, least + 1, 2 * least):
        for sample in _cards(tokenizer, 5, length):
            size = len(tokenizer.encode(sample.prompt)) + sample.max_tokens
            assert size <= length
            # the shortest samples hold 4 cards, which may be shorter than the longest ones
            assert size > length - rest or sample.facts["cards"] == 4
            found = RULER_QA.fullmatch(sample.prompt)
            assert found
            start, stop = sample.document
            assert sample.prompt[start:stop] == found[1]
            assert found[1].count("Document ") == sample.facts["cards"] >= 4
    with pytest.raises(ConfigError, match=f"fact-cards: length is {least - 1}.*{least} or more"):
        _cards(tokenizer, 1, least - 1)


def test_a_pile_of_cards_is_shared_by_its_questions() -> None:
    samples = _cards(ByteTokenizer(), 11, 4000)
    assert [s.facts["context"] for s in samples] == [0] * 4 + [1] * 4 + [2] * 3
    heads = {s.prompt[:s.document[1]] for s in samples[:4]}
    assert len(heads) == 1
    assert len({s.prompt for s in samples}) == 11
    assert _cards(ByteTokenizer(), 3, 4000) == samples[:3]
    assert _cards(ByteTokenizer(), 3, 4000, seed=2) != samples[:3]
    depths = [s.facts["depth"] for s in _cards(ByteTokenizer(), 160, 5000)]
    assert np.histogram(depths, 4, (0, 1))[0].min() > 20


def _ask(task: Task, n: int = 64, **changes: int) -> list[Chosen]:
    return list(task.samples(Setting(ByteTokenizer(), n, **changes)))


def _chosen(sample: Chosen, answer: str) -> list[Scored]:
    """The choice `answer` is likely, the others are not."""
    return [Scored(np.full(3, -1.0 if choice == f" {answer}" else -9.0), np.zeros(3, int), False)
            for choice in sample.choices]


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_a_reader_of_the_question_chooses_rightly(task: Task) -> None:
    for sample in _ask(task):
        assert task.score(sample, _chosen(sample, synthetic_answer(sample.prompt))) == dict.fromkeys(task.metrics, 1.0)
        assert len(set(sample.choices)) == 4


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_a_habit_gets_a_quarter(task: Task) -> None:
    samples = _ask(task, 400)
    flat = [Scored(np.full(2, -1.0), np.zeros(2, int), False)] * 4
    assert np.mean([task.score(s, flat)["acc"] for s in samples]) == pytest.approx(0.25, abs=0.07)
    # nor do the largest and the smallest number stand out
    if task.name != "choice-letter":
        for pick in (np.argmax, np.argmin):
            hits = [pick([int(choice) for choice in s.choices]) == s.right for s in samples]
            assert np.mean(hits) == pytest.approx(0.25, abs=0.08)
    assert set(Counter(s.right for s in samples)) == {0, 1, 2, 3}
    assert len({len(choice) for s in samples for choice in s.choices}) <= 2


def test_choices_are_asked_in_the_three_ways_of_mmlu() -> None:
    letter, text, cloze = ([_ask(task)[i] for i in (0, 1)] for task in CHOICES)
    for i, kind in enumerate(("lookup", "sum")):
        assert letter[i].facts["kind"] == kind
        assert letter[i].prompt.startswith("The following are multiple choice questions (with answers) about ")
        assert letter[i].choices == (" A", " B", " C", " D")
        shown = "".join(f"{name}. {choice.strip()}\n" for name, choice in zip("ABCD", text[i].choices, strict=True))
        assert letter[i].prompt.endswith(f"\n{shown}Answer:")
        assert text[i].prompt.endswith(f"\n{shown}Answer:")
        # the solved examples differ in what they answer
        assert re.search(r"Answer: [A-D]\n\n", letter[i].prompt)
        assert re.search(r"Answer: \d+\n\n", text[i].prompt)
        question = letter[i].prompt.split("\n\n")[-1].split("\nA. ")[0]
        assert cloze[i].prompt.endswith(f"\n\nQuestion: {question}\nAnswer:")
        assert cloze[i].prompt.startswith("The following are questions (with answers) about ")
        assert "A. " not in cloze[i].prompt
        assert cloze[i].choices == text[i].choices
        assert letter[i].right == text[i].right == cloze[i].right


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_items_depend_on_their_number_alone_and_share_their_head(task: Task) -> None:
    many = _ask(task)
    assert _ask(task, 5) == many[:5]
    assert _ask(task, 5, seed=3) != many[:5]
    heads = {sample.prompt.rpartition("\n\n")[0] for sample in many}
    assert len(heads) == 1
    assert heads.pop().count("Answer: ") == task.shots == 2


@pytest.mark.parametrize(("name", "digest"), [
    ("choice-letter", "76be03e824299be2d4b60190334e41efe4877e1932bd1f6a9f21e560b6540c9b"),
    ("choice-text", "d5bd5e179cef2275ceeb860ba77bb135c51829fdfa98eadd3c419a0ffa26fc0b"),
    ("choice-cloze", "a48296a6c14572d5753296728fa0076ed28413398f47668f9df4a06a69d21d7a")])
def test_samples_of_choice_are_those_of_version_1(name: str, digest: str) -> None:
    """Taken before the training stream shared their construction; another sample is another version."""
    task, found = BY_NAME[name], hashlib.sha256()
    for sample in [*_ask(task, 200, seed=1_000_003), *_ask(task, 20, seed=3)]:
        found.update(repr((sample.id, sample.prompt, sample.choices, sample.right, dict(sample.facts))).encode())
    assert (task.version, found.hexdigest()) == ("1", digest)


def test_practice_has_the_prompts_form_and_other_lookups() -> None:
    """The evaluation's reader answers practice documents, too; what is looked up there is not asked here."""
    coder, practised = ByteTokenizer(), set()
    heads = {sample.prompt.partition("\n\n")[0] for task in CHOICES for sample in _ask(task, 1)}
    for i in range(300):
        # as hinny.data.mix seeds the rows of a run, here of the evaluations' own seed
        text = coder.decode(choice_training(np.random.default_rng([1_000_003, i, 1]), coder, 2000).tokens)
        head, *questions = text.split("\n\n")
        assert head in heads
        practised |= {_lookup(question) for question in questions}
        for n, question in enumerate(questions):
            asked, answer = question.rsplit(" ", 1)
            if n:
                assert synthetic_answer("\n\n".join([*questions[:n], asked])) == answer
    assert len(practised) > 300
    assert not (practised - {""}) & {_lookup(s.prompt.split("\n\n")[-1]) for s in _ask(CHOICES[0], 2000)}


def _lookup(question: str) -> str:
    """The facts of a lookup; nothing for a sum, of which there are only 34 times 34."""
    return " ".join(re.findall(r"The code of the .+?\.", question))


def test_the_normalised_score_is_per_character() -> None:
    task = BY_NAME["choice-cloze"]
    sample = dataclasses.replace(_ask(task, 1)[0], choices=(" 1", " 22222", " 3", " 4"), right=1)
    answer = [Scored(np.array([total]), np.zeros(1, int), False) for total in (-2.0, -5.0, -3.0, -4.0)]
    assert task.score(sample, answer) == {"acc": 0.0, "acc_norm": 1.0}
