"""The endpoints answer as OpenAI's do: the `openai` client reads every form of answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_core import FakeCore


@pytest.fixture
def live(serve: Callable[..., Any]) -> Any:
    return serve()


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    found = client.completions.create(model="fake", prompt="abcd", max_tokens=6)
    assert found.object == "text_completion"
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("abcdab", "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (4, 6, 10)
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_a_completion_without_max_tokens_has_sixteen(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="ab").usage.completion_tokens == 16


@pytest.mark.parametrize(("prompt", "texts"), [
    ("ab", ["aba"]), (["ab", "cde"], ["aba", "cde"]), ([120, 121], ["xyx"]), ([[120], [121, 122]], ["xxx", "yzy"])])
def test_a_prompt_may_be_text_tokens_or_a_list_of_them(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    found = client.completions.create(model="fake", prompt=prompt, max_tokens=3)
    assert [choice.text for choice in found.choices] == texts
    assert [choice.index for choice in found.choices] == list(range(len(texts)))


def test_a_stream_joins_to_the_whole_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt=["ab", "xyz"], max_tokens=5, n=2, stream=True,
                                       stream_options={"include_usage": True})
    pieces = list(stream)
    texts = [""] * 4
    for piece in pieces[:-1]:
        assert piece.usage is None
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == ["ababa", "ababa", "xyzxy", "xyzxy"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 20
    assert pieces[-1].usage.prompt_tokens == 5
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens == 6
    assert len({piece.id for piece in pieces}) == 1


def test_events_have_openais_lines(live: Any) -> None:
    found = httpx.post(live.url + "/v1/completions", json={"prompt": "ab", "max_tokens": 2, "stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    lines = found.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]] == ["a", "b"]


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="ab", max_tokens=2, echo=True).choices[0].text == "abab"
    pieces = client.completions.create(model="fake", prompt="ab", max_tokens=2, echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "abab"


def test_logprobs_of_a_completion_name_tokens_and_places(client: openai.OpenAI) -> None:
    found = client.completions.create(model="fake", prompt=[97, 0xC3, 0xA9, 98], max_tokens=4, logprobs=2)
    logprobs = found.choices[0].logprobs
    assert logprobs.tokens == ["a", "token_id:195", "token_id:169", "b"]
    # é is two tokens: it is there after the second one
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[0] == {"\x00": 0.0, "\x01": -1.0, "a": -0.5}
    stream = client.completions.create(model="fake", prompt=[97, 0xC3, 0xA9, 98], max_tokens=4, logprobs=2, stream=True)
    assert [piece.choices[0].logprobs.text_offset for piece in stream] == [[0], [1], [1], [2]]


def test_a_chat_has_a_turn_for_each_message(live: Any, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="fake", max_tokens=4, messages=[
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                                                              {"type": "text", "text": " you"}]}])
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", "Syst")
    assert bytes(live.engine.core.seen[0].prompt) == b"System: Be brief.\nUser: Hi you\nAssistant:"
    assert live.engine.core.seen[0].stop == ("\nUser:",)


def test_a_chat_streams_role_content_and_reason(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="fake", max_completion_tokens=3, stream=True,
                                            messages=[{"role": "user", "content": "Hi"}])
    pieces = [piece.choices[0] for piece in stream]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == "Use"
    assert pieces[-1].finish_reason == "length"


def test_a_chat_without_max_tokens_fills_the_context(live: Any, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "ab" * 20}])
    assert found.usage.total_tokens == live.engine.limits.context


def test_logprobs_of_a_chat_have_bytes(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="fake", max_tokens=1, logprobs=True, top_logprobs=1,
                                           messages=[{"role": "user", "content": "Hi"}])
    entry = found.choices[0].logprobs.content[0]
    assert (entry.token, entry.bytes, entry.logprob) == ("U", [85], -0.5)
    assert [(top.token, top.bytes) for top in entry.top_logprobs] == [("\x00", [0])]


def test_options_reach_the_core(live: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt="abcd", max_tokens=5, temperature=0.5, top_p=0.9, n=2, seed=7,
                              stop=["q", "cd"], presence_penalty=1, frequency_penalty=-1, user="somebody",
                              extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True})
    seen = live.engine.core.seen[0]
    assert (seen.n, seen.stop, seen.max_tokens, seen.ignore_eod, seen.logprobs) == (2, ("q", "cd"), 5, True, None)
    drawn = seen.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p, drawn.seed) == (0.5, 0.9, 3, 0.1, 7)
    assert (drawn.presence_penalty, drawn.frequency_penalty, drawn.repetition_penalty) == (1, -1, 1.5)


def test_temperature_is_one_unless_it_is_given(live: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt="ab")
    assert live.engine.core.seen[0].sampling.temperature == 1


def test_greedy_takes_options_that_cannot_matter(live: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt="ab", temperature=0, top_p=0.9, seed=3)
    assert live.engine.core.seen[0].sampling.greedy


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    found = client.completions.create(model="fake", prompt="abcd", stop="c").choices[0]
    assert found.finish_reason == "stop"
    assert "c" not in found.text


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "hinny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_the_async_client_streams_many_at_once(live: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, n: int) -> str:
        stream = await client.completions.create(model="fake", prompt=chr(97 + n), max_tokens=n + 1, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, n) for n in range(20)))

    assert asyncio.run(all_of_them()) == [chr(97 + n) * (n + 1) for n in range(20)]


def test_the_core_is_used_by_one_thread(live: Any, client: openai.OpenAI) -> None:
    for _ in range(3):
        client.completions.create(model="fake", prompt="ab", max_tokens=2)
    assert len(live.engine.core.threads) == 1
    assert live.engine.core.threads != {threading.get_ident()}


def test_metrics_count_requests_and_tokens(live: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt="abcd", max_tokens=6)
    httpx.get(live.url + "/nowhere/" + "x" * 50)
    text = httpx.get(live.url + "/metrics").text
    for line in ('hinny_requests_total{endpoint="/v1/completions",status="200"} 1.0',
                 'hinny_requests_total{endpoint="other",status="404"} 1.0', "hinny_prompt_tokens_total 4.0",
                 "hinny_generated_tokens_total 6.0", "hinny_cached_tokens_total 3.0", "hinny_state_bytes 1000.0",
                 "hinny_time_to_first_token_seconds_count 1.0", "hinny_time_per_token_seconds_count 5.0",
                 "hinny_sequences_running 0.0", "hinny_preemptions_total 0.0"):
        assert line in text.splitlines(), line


def test_health_tells_what_is_at_work(serve: Callable[..., Any]) -> None:
    steps = threading.Semaphore(1)
    live = serve(FakeCore(steps))
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "ab", "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        found = httpx.get(live.url + "/health").json()
        assert (found["status"], found["sequences"]["running"], found["memory"]["bytes_used"]) == ("ready", 1, 10)
        steps.release(20)
