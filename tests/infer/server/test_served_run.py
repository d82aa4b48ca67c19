"""A trained run behind the server: its answers are those of the model, read from the first token again and again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from hinny.infer.engine import Engine
from hinny.infer.limits import Limits
from hinny.run import Run


@pytest.fixture
def opened(trained_run: Run) -> Engine:
    return Engine(trained_run.path, limits=Limits(sequences=4, context=128, snapshots=4, page=16, step_tokens=64))


@pytest.fixture
def client(serve: Callable[..., Any], opened: Engine) -> Iterator[openai.OpenAI]:
    live = serve(engine=opened)
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def plainly(opened: Engine, prompt: str, tokens: int) -> list[tuple[int, float]]:
    """Greedy tokens and their log-probabilities, by whole forward passes."""
    ids = opened.tokenizer.encode(prompt)
    found = []
    for _ in range(tokens):
        logits = opened.logits(torch.tensor([ids]))[0, -1, :opened.tokenizer.vocab_size].double().log_softmax(-1)
        ids.append(int(logits.argmax()))
        found.append((ids[-1], float(logits[ids[-1]])))
        if ids[-1] == opened.tokenizer.eod:
            break
    return found


def text(opened: Engine, tokens: list[tuple[int, float]]) -> str:
    return opened.tokenizer.decode([token for token, _ in tokens]).rstrip("\ufffd")


def test_many_clients_at_once_get_the_models_answers(client: openai.OpenAI, opened: Engine) -> None:
    prompts = [f"{'the class self ' * (n % 4)}def {n}" for n in range(12)]

    async def ask(other: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await other.completions.create(model="fake", prompt=prompt, max_tokens=12, temperature=0, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="any", max_retries=0) as other:
            return await asyncio.gather(*(ask(other, prompt) for prompt in prompts))

    found = asyncio.run(all_of_them())
    assert [answer.rstrip("\ufffd") for answer in found] == [text(opened, plainly(opened, p, 12)) for p in prompts]


def test_logprobs_are_those_of_a_whole_forward_pass(client: openai.OpenAI, opened: Engine) -> None:
    found = client.completions.create(model="fake", prompt="the self", max_tokens=8, temperature=0, logprobs=3)
    choice = found.choices[0]
    true = plainly(opened, "the self", 8)
    assert choice.logprobs.token_logprobs == pytest.approx([logprob for _, logprob in true], abs=1e-4)
    assert all(max(top.values()) == logprob for top, logprob in zip(
        choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True))
    drawn = client.completions.create(model="fake", prompt="the self", max_tokens=20, temperature=2, seed=1, logprobs=1)
    told = drawn.choices[0].logprobs
    assert any(len(top) == 2 for top in told.top_logprobs), "nothing but the likeliest was drawn"
    assert all(token in top for token, top in zip(told.tokens, told.top_logprobs, strict=True))
    chat = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}], max_tokens=3,
                                          temperature=0, logprobs=True, top_logprobs=2)
    assert all(len(entry.top_logprobs) == 2 for entry in chat.choices[0].logprobs.content)
    assert sum(math.exp(top.logprob) for top in chat.choices[0].logprobs.content[0].top_logprobs) <= 1


def test_two_choices_of_a_seed_differ_and_come_again(client: openai.OpenAI) -> None:
    def both() -> list[str]:
        found = client.completions.create(model="fake", prompt="the", max_tokens=16, n=2, seed=5)
        return [choice.text for choice in found.choices]

    first = both()
    assert first[0] != first[1]
    assert both() == first


def test_a_stop_string_ends_the_models_text(client: openai.OpenAI) -> None:
    asked = {"model": "fake", "prompt": "the", "max_tokens": 24, "seed": 7}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[4:6]
    found = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (found.text, found.finish_reason) == (whole[:whole.index(stop)], "stop")


def test_a_prompt_that_was_read_before_is_cached_and_the_answer_the_same(client: openai.OpenAI) -> None:
    asked = {"model": "fake", "prompt": "class self return " * 5, "max_tokens": 8, "temperature": 0}
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text


def test_closing_a_stream_frees_the_memory_of_the_sequence(client: openai.OpenAI, opened: Engine) -> None:
    stream = client.completions.create(model="fake", prompt="the", max_tokens=120, n=3, temperature=0, stream=True,
                                       extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    base = str(client.base_url).removesuffix("/v1/")
    while httpx.get(base + "/health").json()["sequences"]["live"]:
        pass
    stats = opened.core.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.slots_used == stats.slots_cached
    assert stats.pages_used == stats.pages_cached
    assert client.completions.create(model="fake", prompt="the", max_tokens=2).usage.completion_tokens > 0
