"""The model that lm-eval sees: its split of texts is lm-eval's own, its answers those of plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness_offline import offline_root  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model

from hinny.errors import RequestError
from hinny.infer.reading.reader import ModelReader
from hinny.infer.reading.requests import Generate, Generated, Score, Scored, Usage
from hinny.model import Model
from hinny.tokenizer import ByteTokenizer, Tokenizer, train_bpe

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402

from hinny.evals.harness import STANDARD, run  # noqa: E402
from hinny.evals.harness.model import ReaderLM  # noqa: E402
from hinny.evals.harness.sources import reading_from  # noqa: E402

WORDS = train_bpe(["the quick  brown fox jumps over the lazy dog. " * 30, "A. 12\nB. 34\n\nAnswer: A " * 30], 290)
TEXTS = st.lists(st.sampled_from([*"the qA.1\n ½", "the ", "Answer: ", "quick "]), max_size=8).map("".join)


def instances(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, of, i) for i, of in enumerate(arguments)]


class Recorder:
    """A reader that keeps what it is asked; a token's log-probability depends on it and the one before alone."""

    def __init__(self, tokenizer: Tokenizer = WORDS) -> None:
        self.tokenizer, self.usage = tokenizer, Usage()
        self.asked: list[Any] = []

    def score(self, requests: Sequence[Score], progress: Any = None) -> list[Scored]:
        self.asked += requests
        return [Scored(np.array([-1.0 - (7 * a + b) % 11 for a, b in zip(
            (request.context[-1], *request.continuation), request.continuation, strict=False)]),
            np.zeros(len(request.continuation), dtype=np.int64), len(request.continuation) == 1)
            for request in requests]

    def generate(self, requests: Sequence[Generate], progress: Any = None) -> list[Generated]:
        self.asked += requests
        return [Generated((1,), f"text {i}", "stop") for i, _ in enumerate(requests)]


class Plain(TemplateLM):
    """lm-eval's own split, then one forward pass a request and one a written token: nothing shared, no state."""

    def __init__(self, tokenizer: Tokenizer, model: Model | None = None) -> None:
        super().__init__()
        self.words, self.model = tokenizer, model
        self.seen: list[tuple[list[int], list[int]]] = []

    @property
    def eot_token_id(self) -> int:
        return self.words.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.words.encode(string)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.seen += [(context, continuation) for _, context, continuation in requests]
        return [self._score(context, continuation) for _, context, continuation in requests]

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if self.model is None:
            return 0.0, False
        rows = self.model(torch.tensor([context + continuation]))[0, len(context) - 1:-1].log_softmax(-1)
        found = rows.gather(1, torch.tensor(continuation)[:, None])
        return float(found.sum()), bool((rows.argmax(-1) == torch.tensor(continuation)).all())

    @torch.no_grad()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        assert self.model is not None
        texts = []
        for request in requests:
            tokens, text = self.tok_encode(request.args[0]), ""
            for n in range(1, request.args[1].get("max_gen_toks", 256) + 1):
                tokens.append(int(self.model(torch.tensor([tokens]))[0, -1].argmax()))
                text = self.words.decode(tokens[-n:])
                if tokens[-1] == self.words.eod or any(stop in text for stop in request.args[1]["until"]):
                    break
            for stop in request.args[1]["until"]:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_texts_are_split_as_lm_eval_splits_them(pairs: list[tuple[str, str]]) -> None:
    theirs, ours = Plain(WORDS), Recorder()
    pairs = [(context, continuation or "A") for context, continuation in pairs]
    theirs.loglikelihood(instances(*pairs), disable_tqdm=True)
    if any(not continuation for _, continuation in theirs.seen):
        with pytest.raises(RequestError, match="no token of its own"):
            ReaderLM(ours).loglikelihood(instances(*pairs))
        return
    ReaderLM(ours).loglikelihood(instances(*pairs))
    # lm-eval leaves a context of spaces alone empty, which no model can be asked
    assert [(list(score.context), list(score.continuation)) for score in ours.asked] == [
        (context or [WORDS.eod], continuation) for context, continuation in theirs.seen]


def test_each_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    tokenizer = ByteTokenizer()
    encode = tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: encoded.extend(texts) or encode(texts))
    reader = Recorder(tokenizer)
    answers = ReaderLM(reader).loglikelihood(instances(("long text", " A"), ("long text", " B"), ("long text ", "A")))
    assert sorted(encoded) == ["long text", "long text A", "long text B"]
    assert answers[0] == answers[2] != answers[1]
    assert answers[0] == (sum(-1.0 - (7 * a + b) % 11 for a, b in ((ord("t"), 32), (32, 65))), False)


def test_few_texts_are_encoded_at_a_time_and_contexts_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer's memory is that of some requests, not of all: MMLU has 56,168."""
    calls: list[list[str]] = []
    tokenizer = ByteTokenizer()
    encode = tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: calls.append(list(texts)) or encode(texts))
    reader = Recorder(tokenizer)
    # three choices a question: some questions lie across the border of two calls
    asked = instances(*((f"question {i}", f" {choice}") for i in range(400) for choice in "ABC"))
    answers = ReaderLM(reader).loglikelihood(asked)
    assert max(map(len, calls)) <= 256
    encoded = [text for call in calls for text in call]
    assert len(encoded) == len(set(encoded)) == 400 + 1200
    assert answers == [pair for of in asked for pair in ReaderLM(Recorder(tokenizer)).loglikelihood([of])]
    assert [(bytes(score.context).decode(), bytes(score.continuation).decode()) for score in reader.asked] == [
        of.args for of in asked]
    held = {id(score.context) for score in reader.asked}
    assert len(held) == 400, "choices share the ids of their context"
    calls.clear()
    ReaderLM(reader).generate_until(instances(*((f"question {i}", {"until": []}) for i in range(400))))
    assert max(map(len, calls)) <= 256


def test_ids_are_held_as_one_object_a_word() -> None:
    reader = Recorder()
    ReaderLM(reader).loglikelihood(instances(("the quick fox", " jumps"), ("lazy", " the quick")))
    ids = [i for score in reader.asked for i in (*score.context, *score.continuation)]
    assert max(ids) > 256, "smaller numbers are one object in any case"
    assert len({id(i) for i in ids}) == len(set(ids)) < len(ids)


def test_a_long_text_is_summed_over_windows_as_over_the_whole() -> None:
    text = "the quick brown fox jumps over"
    whole, cut = Recorder(), Recorder()
    expected = ReaderLM(whole).loglikelihood_rolling(instances((text,), ("A",)))
    assert [score.context for score in whole.asked] == [(WORDS.eod,)] * 2
    # each window begins with the last token of the one before, and this reader looks no further
    assert ReaderLM(cut, max_length=3).loglikelihood_rolling(instances((text,), ("A",))) == expected
    assert len(cut.asked) == -(-len(WORDS.encode(text)) // 3) + 1
    assert all(len(score.context) + len(score.continuation) - 1 <= 3 for score in cut.asked)


@pytest.mark.parametrize(("options", "stop", "most"), [
    ({"until": ["\n", "."], "do_sample": False, "temperature": 0.0}, ("\n", "."), 256),
    ({"until": "\n", "max_gen_toks": 7}, ("\n",), 7),
    ({"until": ["", "x"], "max_new_tokens": 3}, ("x",), 3),
    ({"max_tokens": 5, "temperature": None}, (), 5)])
def test_generation_arguments_become_a_request(options: dict[str, Any], stop: tuple[str, ...], most: int) -> None:
    reader = Recorder()
    assert ReaderLM(reader).generate_until(instances(("the fox", options), ("", options))) == ["text 0", "text 1"]
    assert reader.asked == [Generate(tuple(WORDS.encode("the fox")), most, stop), Generate((WORDS.eod,), most, stop)]


@pytest.mark.parametrize(("options", "complaint"), [
    ({"do_sample": True}, "greedy"), ({"temperature": 0.7}, "greedy"), ({"top_p": 0.9}, "'top_p' is not known"),
    ({"num_beams": 2}, "not known"), ({"max_gen_toks": 3, "max_tokens": 4}, "same thing twice"),
    ({"max_gen_toks": 0}, "max_tokens is 0")])
def test_generation_arguments_that_would_be_ignored_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        ReaderLM(Recorder()).generate_until(instances(("the fox", options)))


def test_what_is_cut_is_cut_alike_for_all_choices_and_counted() -> None:
    asked = instances(("0123456789", "cdef"), ("0123456789", "ab"), ("xyz", "ab"))
    kept = {"left": "56789", "middle": "01789"}
    for policy, context in kept.items():
        reader = Recorder(ByteTokenizer())
        model = ReaderLM(reader, max_length=8, truncate=policy)
        model.loglikelihood(asked)
        # as lm-eval's own models: the last token of the longest continuation is not read
        assert [bytes(score.context).decode() for score in reader.asked] == [context, context, "xyz"]
        assert (model.requests, model.truncated) == (3, 2)
        reader.asked.clear()
        model.generate_until(instances(("0123456789", {"max_gen_toks": 3})))
        assert bytes(reader.asked[0].prompt).decode() == context
        assert model.truncated == 3
    exact = ReaderLM(Recorder(ByteTokenizer()), max_length=13)
    exact.loglikelihood(asked)
    assert exact.truncated == 0
    with pytest.raises(RequestError, match="a context of 10 tokens where 9 have room"):
        ReaderLM(Recorder(ByteTokenizer()), max_length=12).loglikelihood(asked)
    with pytest.raises(RequestError, match="leaves 0 tokens"):
        ReaderLM(Recorder(ByteTokenizer()), max_length=3, truncate="left").loglikelihood(asked)
    for wrong in ({"truncate": "right"}, {"max_length": 1}):
        with pytest.raises(RequestError, match=r"must be|allowed"):
            ReaderLM(Recorder(), **wrong)


@pytest.mark.parametrize("pattern", ["M-M*-", "1*M-"])
def test_answers_are_those_of_plain_forward_passes(pattern: str) -> None:
    model, tokenizer = small_model(pattern, vocab_size=257).eval(), ByteTokenizer()
    head = "Question: what is it?\nAnswer:"
    asked = instances(*((head, f" {choice}") for choice in ("a cat", "a car", "b", "")), ("", "alone"),
                      ("spaces  ", "x"), ("Answer these", " quickly"))
    ours, theirs = ReaderLM(ModelReader(model, tokenizer)), Plain(tokenizer, model)
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    writing = instances(*((prompt, {"until": [stop], "max_gen_toks": 12}) for prompt in ("Q: who", "Q: when is", "Hm")
                          for stop in ("\n", "e", "zz")))
    assert ours.generate_until(writing) == theirs.generate_until(writing)


@pytest.mark.parametrize("name", ["arc-easy", "winogrande", "nq-open"])
def test_a_whole_task_scores_as_with_plain_forward_passes(name: str, root: Path) -> None:
    from lm_eval import evaluate

    from hinny.evals.harness.build import build

    model, tokenizer = small_model("M-M*-", vocab_size=257).eval(), ByteTokenizer()
    found = run(ModelReader(model, tokenizer), name, root=root, save=True)
    with reading_from(root):
        tasks = build(STANDARD[name], root, shots=0, seed=0)
        theirs = evaluate(Plain(tokenizer, model), {"tasks": tasks}, bootstrap_iters=0)
    part = next(iter(tasks))
    assert found.samples is not None
    for ours, other in zip(found.samples, theirs["samples"][part], strict=True):
        answers = [answer for prompt in ours["prompts"] for answer in prompt["answers"]]
        expected = [answer for given in other["resps"] for answer in given]
        if name == "nq-open":
            assert [answer["answer"] for answer in answers] == expected
        else:
            assert [answer["log_probability"] for answer in answers] == pytest.approx(
                [total for total, _ in expected], abs=1e-9)
    metric = next(iter(found.metrics))
    of_theirs = {key.split(",")[0]: value for key, value in theirs["results"][part].items()}
    assert found.metrics[metric].value == of_theirs[metric]
