"""What cannot be served gets a status of 400 or more, and a body that says why, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_core import FakeCore, FakeEngine

from hinny.infer.server import schemas
from hinny.infer.server.application import application
from hinny.infer.server.chat import Chat
from hinny.infer.server.options import Options
from hinny.infer.server.service import Service


class Asked:
    """The application without a network, in an event loop of its own."""

    def __init__(self, **options: Any) -> None:
        self.engine = FakeEngine(FakeCore())
        self.service = Service(self.engine, Chat(self.engine.tokenizer), Options(**{"name": "fake", **options}))
        self.app = application(self.service)
        self.runner = asyncio.Runner()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.runner.run(self.lifespan.__aenter__())

    def close(self) -> None:
        self.runner.run(self.lifespan.__aexit__(None, None, None))
        self.runner.close()

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **more)

        return self.runner.run(go())

    def raw(self, body: bytes | str, path: str = "/v1/completions") -> httpx.Response:
        return self("POST", path, content=body, headers={"Content-Type": "application/json"})


@pytest.fixture
def ask() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.close()


def fault(found: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, whose form is checked."""
    assert found.status_code == status, found.text
    assert found.headers["content-type"] == "application/json"
    assert list(found.json()) == ["error"]
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert found.json()["error"]["message"]
    return found.json()["error"]


@pytest.mark.parametrize(("change", "named"), [
    ({"nonsense": 1}, "nonsense"), ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"), ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"n": 10**9}, "n"),
    ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"),
    ({"echo": True, "logprobs": 1}, "echo"), ({"logprobs": 21}, "logprobs"), ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [257]}, "prompt"), ({"prompt": [10**30]}, "prompt"), ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"seed": 2**63}, "seed"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"top_k": -1}, "top_k")])
def test_a_bad_field_of_a_completion_is_named(ask: Asked, change: dict[str, Any], named: str) -> None:
    found = fault(ask("POST", "/v1/completions", json={"prompt": "ab"} | change), 400)
    assert found["param"] == named
    assert named.split(".")[0] in found["message"]


@pytest.mark.parametrize(("change", "named"), [
    ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"), ({"modalities": ["audio"]}, "modalities")])
def test_a_bad_field_of_a_chat_is_named(ask: Asked, change: dict[str, Any], named: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | change
    assert fault(ask("POST", "/v1/chat/completions", json=body), 400)["param"] == named


@pytest.mark.parametrize(("change", "words"), [
    ({"temperature": -1}, "temperature is -1: it should be greater than or equal to 0."),
    ({"n": 10**25}, f"n is {10**25}: it should be less than or equal to 128."),
    ({"max_tokens": "5" * 99}, f'max_tokens is "{"5" * 59} ...: it should be a valid integer.'),
    ({"suffix": "x"}, 'suffix is "x", which is not served; leave it out, or give null or "".'),
    ({"best_of": 3}, "best_of is 3 and n 1, which is not served; leave best_of out, or make it equal to n."),
    ({"stream": True, "stream_options": {"include_usage": 1}},
     "stream_options.include_usage is 1: it should be a valid boolean.")])
def test_a_refusal_has_the_value_and_what_is_allowed(ask: Asked, change: dict[str, Any], words: str) -> None:
    assert fault(ask("POST", "/v1/completions", json={"prompt": "ab"} | change), 400)["message"] == words


def test_a_refusal_finds_the_place_in_a_conversation(ask: Asked) -> None:
    said = {"role": "user", "content": "Hi"}
    for last, words in (({"role": "tool", "content": ""}, "messages.1.role is \"tool\": it should be 'system', "),
                        ({"role": "user", "content": 5}, "messages.1.content is 5: it should be a valid string"),
                        ({"role": "user"}, "messages.1.content is missing")):
        found = fault(ask("POST", "/v1/chat/completions", json={"messages": [said, last]}), 400)
        assert words in found["message"]
        assert found["param"] == "messages"


@pytest.mark.parametrize("body", [
    '{"messages": [{"role": "user", "content": [' + "1," * 10**6 + "1]}]}",
    '{"messages": [' + "1," * 10**6 + "1]}", '{"messages": [], "stop": [' + "1," * 10**6 + "1]}",
    '{"messages": [], ' + ",".join(f'"{n}": 1' for n in range(10**5)) + "}",
    '{"messages": [{"role": "user", "content": "", ' + ",".join(f'"{n}": 1' for n in range(10**5)) + "}]}"])
def test_a_million_mistakes_cost_no_more_than_one(ask: Asked, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = schemas._refusal
    monkeypatch.setattr(schemas, "_refusal", lambda faults: made.extend(faults) or real(faults))
    fault(ask.raw(body, "/v1/chat/completions"), 400)
    assert len(made) < 10


def test_fields_that_ask_for_nothing_are_taken(ask: Asked) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": None, "response_format": {"type": "text"},
            "tool_choice": "none", "logit_bias": {}, "max_tokens": 2}
    assert ask("POST", "/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a\x01"}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b'{"prompt": "a", "\\ud800": 1}', b"\x00" * 50, "{'prompt': 'a'}".encode("utf-16")])
def test_a_body_that_is_no_good_json_is_refused(ask: Asked, body: bytes) -> None:
    fault(ask.raw(body), 400)
    fault(ask.raw(body.replace(b'"prompt"', b'"messages"'), "/v1/chat/completions"), 400)


def test_control_characters_in_json_are_text(ask: Asked) -> None:
    assert ask.raw(b'{"prompt": "\\u0000\\u001b", "max_tokens": 2}').json()["choices"][0]["text"] == "\x00\x1b"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_of_another_type_is_refused(ask: Asked, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    fault(ask("POST", "/v1/completions", content=b'{"prompt": "a"}', headers=headers), 415)


def test_a_compressed_body_is_refused(ask: Asked) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    fault(ask("POST", "/v1/completions", content=b'{"prompt": "a"}', headers=headers), 415)


def test_a_request_longer_than_the_context_is_told_the_figures(ask: Asked) -> None:
    found = fault(ask("POST", "/v1/completions", json={"prompt": "a" * 150, "max_tokens": 60}), 400)
    assert found["code"] == "context_length_exceeded"
    assert all(number in found["message"] for number in ("200", "150", "60", "210"))
    chat = {"messages": [{"role": "user", "content": "a" * 5000}]}
    assert fault(ask("POST", "/v1/chat/completions", json=chat), 400)["code"] == "context_length_exceeded"


def test_what_the_core_refuses_is_a_bad_request(ask: Asked) -> None:
    for body in ({"prompt": ["ab", "a" * 13]}, {"prompt": "a" * 13, "stream": True}):
        assert "thirteen" in fault(ask("POST", "/v1/completions", json=body), 400)["message"]
    # the first of the two prompts was taken on and must be given up
    assert ask("POST", "/v1/completions", json={"prompt": "ab"}).status_code == 200
    assert ask.service.loop.live == 0
    assert ask.engine.core.live == []


def test_another_model_is_not_found(ask: Asked) -> None:
    found = fault(ask("POST", "/v1/completions", json={"prompt": "a", "model": "<b>gpt-4</b>"}), 404)
    assert (found["code"], found["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nowhere", 404), ("GET", "/../../etc/passwd", 404), ("GET", "/v1/completions", 405), ("POST", "/", 405),
    ("DELETE", "/v1/models", 405), ("GET", "/v1/models/other", 404), ("GET", "/v1/models/", 404),
    ("GET", "/docs", 404)])
def test_other_addresses_and_methods_get_a_body_too(ask: Asked, method: str, path: str, status: int) -> None:
    fault(ask(method, path), status)


def test_too_long_a_body_is_refused_while_it_is_read() -> None:
    ask = Asked(max_body=1000)

    async def pieces() -> Any:
        for _ in range(100):
            yield b'{"prompt": "' + b"a" * 200
        raise AssertionError("the rest was read as well")

    try:
        assert fault(ask.raw(b'{"prompt": "' + b"a" * 1000 + b'"}'), 413)["code"] == "too_large"
        fault(ask.raw(pieces()), 413)
        assert ask.raw(b'{"prompt": "a"}').status_code == 200
    finally:
        ask.close()


def test_a_key_opens_what_is_not_open() -> None:
    ask = Asked(keys=("secret", "other"))
    body = {"prompt": "ab", "max_tokens": 2}
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"},
                        {"Authorization": "secret"}, {"Authorization": b"Bearer \xff"}):
            found = ask("POST", "/v1/completions", json=body, headers=headers)
            assert fault(found, 401)["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/nowhere"):
            fault(ask("GET", path), 401)
        for key in ("secret", "other"):
            found = ask("POST", "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == 200
        assert ask("GET", "/metrics", headers={"Authorization": "bearer other"}).status_code == 200
        assert [ask("GET", path).status_code for path in ("/", "/health")] == [200, 200]
    finally:
        ask.close()


def test_the_page_runs_its_own_script_alone(ask: Asked) -> None:
    found = ask("GET", "/")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["content-type"].startswith("text/html")


def test_the_description_has_every_address_and_field(ask: Asked) -> None:
    found = ask("GET", "/openapi.json").json()
    assert set(found["paths"]) == {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}",
                                   "/health", "/metrics"}
    kinds = found["components"]["schemas"]
    assert {"prompt", "top_k", "stream_options"} <= set(kinds["CompletionRequest"]["properties"])
    assert "#/components/schemas/Message" in json.dumps(found)
    assert "Message" in kinds
    # none of them gives it
    assert not [path for path, verbs in found["paths"].items() for verb in verbs.values() if "422" in verb["responses"]]
