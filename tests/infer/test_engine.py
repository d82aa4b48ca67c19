"""The engine: text comes out as the model says, in pieces that join to the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import hinny
from hinny.errors import HinnyError, RequestError
from hinny.infer import core as cores
from hinny.infer.engine import Engine
from hinny.infer.limits import Limits
from hinny.infer.request import Choice, Request
from hinny.infer.sampling import Sampling
from hinny.run import Run


@pytest.fixture(scope="module")
def engine(trained_run: Run) -> Engine:
    return Engine(trained_run.path)


def test_greedy_text_is_the_likeliest_token_again_and_again(engine: Engine) -> None:
    prompt = engine.tokenizer.encode("def main")
    tokens = list(prompt)
    for _ in range(10):
        tokens.append(int(engine.logits(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] == engine.tokenizer.eod:
            break
    assert list(engine.tokens(prompt, 10)) == tokens[len(prompt):]


def test_a_padded_vocabulary_is_never_drawn_from(trained_run: Run) -> None:
    engine = Engine(trained_run.path)
    with torch.no_grad():  # words that no text has, and that the model would like best
        own = engine.model.embedding.weight
        engine.model.embedding.weight = torch.nn.Parameter(torch.cat([own, 3 * own]), requires_grad=False)
    assert max(engine.tokens([1, 2, 3], 30, Sampling(temperature=1.0, seed=0))) < engine.tokenizer.vocab_size


def test_pieces_join_to_the_whole(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    whole = engine.generate("The ", max_tokens=40, sampling=sampling)
    assert "".join(engine.stream("The ", max_tokens=40, sampling=sampling)) == whole
    assert len(whole) > 0


def test_a_seed_decides_the_text(engine: Engine) -> None:
    texts = {engine.generate("The ", max_tokens=30, sampling=Sampling(temperature=1.0, seed=s)) for s in (1, 1, 2)}
    assert len(texts) == 2


def test_a_stop_string_ends_the_text_and_is_not_shown(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    whole = engine.generate("The ", max_tokens=40, sampling=sampling)
    stop = whole[10:13]
    assert engine.generate("The ", max_tokens=40, sampling=sampling, stop=(stop,)) == whole[:whole.index(stop)]


def test_unfinished_characters_are_held_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve €5"
    written = iter(text.encode())
    monkeypatch.setattr(cores, "choose", lambda logits, choosers, told: [Choice(next(written))])
    pieces = list(engine.stream("x", max_tokens=len(text.encode())))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_streams_of_one_engine_do_not_mix(engine: Engine) -> None:
    prompts = ["The ", "def f(", "import "]
    alone = [engine.generate(prompt, max_tokens=20) for prompt in prompts]
    pieces: list[list[str]] = [[], [], []]
    streams = [engine.stream(prompt, max_tokens=20) for prompt in prompts]
    for turn in itertools.zip_longest(*streams, fillvalue=""):
        for own, piece in zip(pieces, turn, strict=True):
            own.append(piece)
    assert ["".join(own) for own in pieces] == alone


def test_a_longer_request_than_before_gets_a_larger_core(trained_run: Run) -> None:
    engine = Engine(trained_run.path)
    begun = engine.stream("The ", max_tokens=30)
    first = next(begun)
    context = engine.limits.context
    assert len(list(engine.tokens([1] * context, 5))) <= 5
    assert engine.limits.context > context
    assert first + "".join(begun) == Engine(trained_run.path).generate("The ", max_tokens=30)


def test_a_stream_that_is_dropped_frees_its_memory(engine: Engine) -> None:
    stream = engine.stream("The ", max_tokens=500)
    next(stream)
    assert engine.core.stats().running == 1
    stream.close()
    assert (engine.core.stats().running, engine.core.stats().pages_used) == (0, 0)


def test_many_requests_are_answered_as_each_alone(trained_run: Run) -> None:
    engine = Engine(trained_run.path, limits=Limits(sequences=3, context=128, step_tokens=24, drafts=2))
    requests = [Request(tuple(engine.tokenizer.encode(text)), 12, n=n)
                for text, n in (("The ", 1), ("The cat", 2), ("def main", 1), ("x" * 40, 1))]
    found = engine.complete(requests)
    for request, answers in zip(requests, found, strict=True):
        alone = list(Engine(trained_run.path).tokens(request.prompt, 12))
        assert [[choice.token for choice in answer.choices] for answer in answers] == [alone] * request.n


def test_a_request_beyond_the_limits_is_refused(trained_run: Run) -> None:
    engine = Engine(trained_run.path, limits=Limits(sequences=2, context=64))
    with pytest.raises(RequestError, match=r"max_tokens is 60.*takes 64"):
        engine.generate("The cat", max_tokens=60)
    assert engine.core.stats().waiting == 0


@pytest.mark.parametrize(("prompt", "n"), [([], 5), ([1], 0)])
def test_requests_that_cannot_be_served_are_refused(engine: Engine, prompt: list[int], n: int) -> None:
    with pytest.raises(RequestError):
        list(engine.tokens(prompt, n))


def test_load_gives_model_and_tokenizer(trained_run: Run) -> None:
    model, tokenizer = hinny.load(trained_run.path)
    assert model.config == trained_run.recipe.model
    assert tokenizer.decode(tokenizer.encode("one, two")) == "one, two"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HinnyError, match="not a run directory"):
        Engine(tmp_path)


def test_bf16_halves_the_matrices_and_leaves_the_rest(trained_run: Run) -> None:
    whole, half = Engine(trained_run.path), Engine(trained_run.path, dtype="bf16")
    for (name, ours), theirs in zip(half.model.named_parameters(), whole.model.parameters(), strict=True):
        is_matrix = name in ("embedding.weight", "head.weight") or (ours.dim() == 2 and ".conv." not in name)
        assert ours.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
        torch.testing.assert_close(ours.float(), theirs, rtol=2 ** -8, atol=0)
    tokens = torch.arange(40)[None] % 200
    got, true = half.logits(tokens).float().log_softmax(-1), whole.logits(tokens).log_softmax(-1)
    assert 0 < (got - true).abs().max() < 0.1
