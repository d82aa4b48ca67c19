"""Requests that end before their time: clients leave, time runs out, the engine fails, the server ends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fake_core import FakeCore

LONG = {"prompt": "ab", "max_tokens": 150}


class Watched(FakeCore):
    """A core that tells when it was given something, and when something was taken from it."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__(threading.Semaphore(steps))
        self.added, self.cancelled = threading.Event(), threading.Event()

    def add(self, request: Any) -> int:
        number = super().add(request)
        self.added.set()
        return number

    def cancel(self, number: int) -> None:
        super().cancel(number)
        self.cancelled.set()


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_frees_its_places(serve: Callable[..., Any], n: int) -> None:
    core = Watched(2)
    live = serve(core)
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(model="fake", stream=True, n=n, **LONG)
        assert next(iter(stream)).choices[0].text == "a"
        stream.close()
        assert core.cancelled.wait(20)
    assert core.live == []
    assert 'hinny_requests_abandoned_total 1.0' in httpx.get(live.url + "/metrics").text


def test_a_client_that_leaves_before_its_answer_frees_its_place(serve: Callable[..., Any]) -> None:
    core = Watched()
    live = serve(core)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(live.url + "/v1/completions", json=LONG, timeout=httpx.Timeout(20, read=0.3))
    assert core.cancelled.wait(20)
    assert core.live == []


def test_a_request_that_takes_too_long_is_given_up(serve: Callable[..., Any]) -> None:
    core = Watched()
    live = serve(core, timeout=0.2)
    found = httpx.post(live.url + "/v1/completions", json=LONG)
    assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
    assert core.cancelled.wait(20)


def test_a_stream_that_takes_too_long_ends_with_an_error(serve: Callable[..., Any]) -> None:
    core = Watched(1)
    live = serve(core, timeout=0.5)
    with openai.OpenAI(base_url=live.url + "/v1", api_key="any", max_retries=0) as client:
        stream = iter(client.completions.create(model="fake", stream=True, **LONG))
        assert next(stream).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="took too long"):
            list(stream)
    assert core.cancelled.wait(20)


def test_one_more_than_may_wait_is_told_to_come_again(serve: Callable[..., Any]) -> None:
    core = Watched()
    live = serve(core, max_queue=1)
    answers: list[httpx.Response] = []
    full = LONG | {"n": 5}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(live.url + "/v1/completions", json=full)))
    asking.start()
    assert core.added.wait(20)
    refused = httpx.post(live.url + "/v1/completions", json=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert httpx.post(live.url + "/v1/completions", json=LONG | {"n": 6}).status_code == 400
    assert "hinny_queue_refusals_total 1.0" in httpx.get(live.url + "/metrics").text
    core.steps.release(150)
    asking.join()
    assert answers[0].status_code == 200
    core.steps.release(150)
    assert httpx.post(live.url + "/v1/completions", json=LONG).status_code == 200


def test_a_failed_engine_tells_everybody(serve: Callable[..., Any]) -> None:
    core = Watched()
    live = serve(core)
    answers: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda: answers.append(httpx.post(live.url + "/v1/completions", json=LONG)))
              for _ in range(3)]
    for thread in asking:
        thread.start()
    assert core.added.wait(20)
    core.broken = "out of luck"
    for thread in asking:
        thread.join(20)
    answers.append(httpx.post(live.url + "/v1/completions", json=LONG))
    for found in answers:
        assert found.status_code == 500
        assert "out of luck" in found.json()["error"]["message"]
    assert len(answers) == 4
    health = httpx.get(live.url + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "out of luck" in health.json()["message"]


def test_a_draining_server_finishes_what_runs_and_takes_nothing_more(serve: Callable[..., Any]) -> None:
    core = Watched(1)
    live = serve(core, drain=20)
    with httpx.stream("POST", live.url + "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.server.handle_exit(15, None)
        while httpx.get(live.url + "/health").json()["status"] == "ready":
            pass
        assert httpx.get(live.url + "/health").json()["status"] == "draining"
        refused = httpx.post(live.url + "/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        core.steps.release(150)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    live.thread.join(20)
    assert not live.thread.is_alive()


def test_a_body_that_comes_when_the_time_is_up_is_told_so_and_not_begun(serve: Callable[..., Any]) -> None:
    core = Watched()
    live = serve(core, drain=0.1)
    address = urlsplit(live.url)
    body = json.dumps(LONG).encode()
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body[:5])
        while not live.service._active:
            time.sleep(0.01)
        live.server.handle_exit(15, None)
        while not live.server.should_exit:
            time.sleep(0.01)
        client.sendall(body[5:])
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["code"]) == (503, "draining")
    live.thread.join(20)
    assert not live.thread.is_alive()
    assert core.seen == []


def test_what_is_not_finished_in_time_is_given_up_when_the_server_ends(serve: Callable[..., Any]) -> None:
    core = Watched(1)
    live = serve(core, drain=0.1)
    with httpx.stream("POST", live.url + "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.server.handle_exit(15, None)
        assert any('"code":"draining"' in line for line in lines)
    live.thread.join(20)
    assert not live.thread.is_alive()
    assert core.live == []
