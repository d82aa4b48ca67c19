"""A tokenizer that raises fails the request it raised for, with a status that fits; the server goes on with others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from fake_core import FakeCore
from fake_runner import FakeRunner

from hinny.infer.core import Core
from hinny.infer.limits import Limits
from hinny.infer.request import Request
from hinny.tokenizer import ByteTokenizer

LIMITS = Limits(sequences=4, context=200, step_tokens=64, page=8)
GOOD = {"prompt": "abcdefgh", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
BAD = GOOD | {"prompt": "ABCDEFGH"}


class Broken(ByteTokenizer):
    """Raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: Callable[[list[int]], bool] = lambda ids: False

    def encode_many(self, texts: Any) -> list[list[int]]:
        if any("#" in text for text in texts):
            raise ValueError("# is no piece")
        return super().encode_many(texts)

    def _decode(self, ids: list[int]) -> str:
        if self.fails(ids):
            raise ValueError("no such piece")
        return super()._decode(ids)


@dataclass(frozen=True)
class Served:
    """What the server needs of an engine."""

    core: Core
    limits: Limits
    tokenizer: Broken


@pytest.fixture
def live(serve: Callable[..., Any]) -> Iterator[Any]:
    """A server of a core whose model is a hash; in the end it serves on, and holds nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = Broken()
    core = Core(FakeRunner(8, 100), tokenizer, LIMITS, slots=8, pages=100, recurrent=True, worth=8)
    live = serve(engine=Served(core, LIMITS, tokenizer))
    true = _whole(live, GOOD).json()["choices"][0]["text"]
    yield live
    assert _whole(live, GOOD).json()["choices"][0]["text"] == true
    health = httpx.get(live.url + "/health").json()
    assert (health["status"], health["sequences"]["live"]) == ("ready", 0)
    live.server.should_exit = True
    live.thread.join(20)
    core.forget()
    assert (core.stats().running, core.stats().pages_used, core.stats().slots_used) == (0, 0, 0)
    torch.set_num_threads(threads)


def _whole(live: Any, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=20)


def _tokens(live: Any, body: dict[str, Any]) -> list[int]:
    names = _whole(live, body | {"logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"]
    return [int(name[9:]) if name.startswith("token_id:") else ord(name) for name in names if name != "<|endoftext|>"]


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": "a # b"}), ("/v1/completions", {"prompt": ["ab", "#"], "stream": True}),
    ("/v1/completions", {"prompt": "#" * 5000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "#"}]})])
def test_a_text_that_cannot_be_read_is_a_bad_request(live: Any, path: str, body: dict[str, Any]) -> None:
    found = _whole(live, body, path)
    assert found.status_code == 400
    assert "cannot read this text (ValueError: # is no piece)" in found.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_cannot_be_written_fails_its_answer_alone(live: Any, stream: bool) -> None:
    true = _tokens(live, GOOD)
    wrong = next(token for token in _tokens(live, BAD)[2:] if token not in (*true, *b"ABCDEFGHabcdefgh"))
    live.engine.tokenizer.fails = lambda ids: wrong in ids
    # both at once
    with httpx.stream("POST", live.url + "/v1/completions", json=GOOD | {"stream": True}, timeout=20) as good:
        found = _whole(live, BAD | {"stream": stream, "n": 2})
        lines = [line for line in good.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    if stream:
        assert found.status_code == 200
        error = json.loads(found.text.strip().split("\n\n")[-1][6:])["error"]
    else:
        assert found.status_code == 500
        error = found.json()["error"]
    assert error["message"] == f"the tokenizer cannot write token {wrong} (ValueError: no such piece)."
    assert error["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_cannot_be_named_fails_its_answer_alone(live: Any, stream: bool) -> None:
    live.engine.tokenizer.fails = lambda ids: len(ids) == 1
    found = _whole(live, GOOD | {"logprobs": 3, "stream": stream})
    if stream:
        error = json.loads(found.text.strip().split("\n\n")[-1][6:])["error"]
        assert 'hinny_stream_faults_total{status="500"} 1.0' in httpx.get(live.url + "/metrics").text
    else:
        assert found.status_code == 500
        error = found.json()["error"]
    assert error["message"] == "the server failed (ValueError)."
    assert "hinny_exceptions_total 1.0" in httpx.get(live.url + "/metrics").text


def test_a_prompt_that_cannot_be_written_is_a_fault_of_the_server(live: Any) -> None:
    live.engine.tokenizer.fails = lambda ids: 66 in ids
    assert _whole(live, BAD | {"prompt": [66, 67]}).status_code == 500


def test_a_request_that_the_core_cannot_take_on_fails_alone(serve: Callable[..., Any]) -> None:
    class Failing(FakeCore):
        def add(self, request: Request) -> int:
            if request.prompt[0] == 66:
                raise ValueError("no such piece")
            return super().add(request)

    core = Failing()
    live = serve(core)
    found = _whole(live, {"prompt": ["ab", "B"], "max_tokens": 3})
    assert found.status_code == 500
    assert found.json()["error"]["message"] == "the request could not be taken on (ValueError: no such piece)."
    assert _whole(live, {"prompt": "ab", "max_tokens": 3}).json()["choices"][0]["text"] == "aba"
    assert (core.live, live.service.loop.live) == ([], 0)
