"""Hostile connections to a running server: heads and bodies that never end, readers that do not read, other names."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import pytest
from fake_core import FakeCore, FakeEngine

from hinny.infer.limits import Limits
from hinny.infer.server import serving
from hinny.infer.server.service import MOST_READ

POST = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")


def connected(live: Any) -> Any:
    found = socket.create_connection(live.server.servers[0].sockets[0].getsockname()[:2], timeout=20)
    return closing(found)


def answer(live: Any, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes until the server closes the connection."""
    with connected(live) as talk:
        for piece in pieces:
            talk.sendall(piece)
        said = b""
        while more := talk.recv(2**16):
            said += more
    head, _, body = said.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def error(body: bytes) -> dict[str, Any]:
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example",
                                  "127.0.0.1.evil.example"])
def test_another_name_for_this_machine_is_refused(serve: Callable[..., Any], host: str) -> None:
    live = serve()
    found = httpx.get(live.url + "/v1/models", headers={"Host": host})
    assert found.status_code == 403
    assert error(found.content)["code"] == "host_not_allowed"
    assert host in found.text
    # a key is not known to pages of the web
    keyed = serve(keys=("secret",))
    headers = {"Host": host, "Authorization": "Bearer secret"}
    assert httpx.get(keyed.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "me.localhost"])
def test_its_own_names_are_answered(serve: Callable[..., Any], host: str) -> None:
    assert httpx.get(serve().url + "/v1/models", headers={"Host": host}).status_code == 200


def test_a_head_that_never_ends_is_given_up(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    live = serve()
    status, headers, body = answer(live, b"GET / HTTP/1.1\r\nHost: loc")
    assert (status, error(body)["code"], headers["connection"]) == (408, "timeout", "close")
    # who says nothing gets nothing
    with connected(live) as talk:
        assert talk.recv(1) == b""
    # neither does a second request on a connection that is kept
    with connected(live) as talk:
        talk.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = talk.recv(2**16)
        talk.sendall(b"GET /he")
        while more := talk.recv(2**16):
            said += more
    assert said.count(b"HTTP/1.1 200") == 1
    assert said.count(b"HTTP/1.1 408") == 1


def test_a_body_that_never_ends_is_given_up_and_its_connection_too(serve: Callable[..., Any],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    live = serve(timeout=0.2)
    with connected(live) as talk:
        talk.sendall(POST + b"Content-Length: 500\r\n\r\n{")
        assert b"408" in talk.recv(2**16)
        # a drop now and then keeps nothing open
        def closed() -> bool:
            try:
                talk.sendall(b" ")
                return talk.recv(1, socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        until(closed)


@pytest.mark.parametrize("head", [
    b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000, b"GET / HTTP/1.1\r\n\r\n",
    POST + b"Content-Length: -5\r\n\r\n", POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_no_http_gets_a_reason(serve: Callable[..., Any], head: bytes) -> None:
    live = serve()
    status, headers, body = answer(live, head)
    assert (status, headers["content-type"], error(body)["code"]) == (400, "application/json", "invalid_http")
    assert 'hinny_requests_total{endpoint="other",status="400"} 1.0' in httpx.get(live.url + "/metrics").text


def test_a_body_in_chunks_has_the_same_bound(serve: Callable[..., Any]) -> None:
    live = serve(max_body=1000)
    chunk = b"190\r\n" + b" " * 400 + b"\r\n"
    with connected(live) as talk:
        talk.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + 3 * chunk)
        assert b"HTTP/1.1 413" in talk.recv(2**16)
    status, _, body = answer(live, POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
                             + b"1e\r\n" + b'{"prompt":"ab","max_tokens":3}' + b"\r\n0\r\n\r\n")
    assert status == 200
    assert b'"text":"aba"' in body


def test_head_is_get_without_a_body(serve: Callable[..., Any]) -> None:
    live = serve()
    for path in ("/", "/health", "/metrics", "/v1/models"):
        status, headers, body = answer(live, f"HEAD {path} HTTP/1.1\r\nHost: a.localhost\r\nConnection: close\r\n\r\n"
                                       .encode())
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 0
    found = httpx.options(live.url + "/v1/completions")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")
    assert "access-control-allow-origin" not in found.headers


def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_server(serve: Callable[..., Any]) -> None:
    live = serve()
    with connected(live) as talk:
        talk.sendall(POST + b"Content-Length: 500\r\n\r\n{")
        until(lambda: live.service._active == 1)
    until(lambda: live.service._active == 0)
    text = httpx.get(live.url + "/metrics").text
    assert "hinny_requests_abandoned_total 1.0" in text
    assert "hinny_exceptions_total 0.0" in text
    assert 'status="500"' not in text


def test_a_reader_who_stops_reading_keeps_no_place(serve: Callable[..., Any]) -> None:
    # so much that neither side's buffers hold it; the rest is never let
    core = FakeCore(threading.Semaphore(1000))
    live = serve(engine=FakeEngine(core, Limits(sequences=64, context=2**20)), timeout=1.0)
    body = json.dumps({"prompt": "ab", "max_tokens": 2**19, "n": 64, "stream": True}).encode()
    with connected(live) as talk:
        talk.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        talk.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: bool(core.seen))
        until(lambda: not core.live and not live.service.loop.live and not live.service._active)


def test_bodies_that_are_held_at_once_are_bounded(serve: Callable[..., Any]) -> None:
    live = serve(max_queue=0)
    most = live.service.loop.most + MOST_READ
    talks = [socket.create_connection(live.server.servers[0].sockets[0].getsockname()[:2]) for _ in range(most)]
    try:
        for talk in talks:
            talk.sendall(POST + b"Content-Length: 500\r\n\r\n{")
        until(lambda: live.service._active == most)
        found = httpx.post(live.url + "/v1/completions", json={"prompt": "a"})
        assert (found.status_code, error(found.content)["code"]) == (429, "queue_full")
        assert int(found.headers["retry-after"]) > 0
        assert httpx.get(live.url + "/health").status_code == 200
    finally:
        for talk in talks:
            talk.close()
    until(lambda: live.service._active == 0)
    assert httpx.post(live.url + "/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_fault_of_the_server_is_told_and_counted(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    live = serve()

    def broken() -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(live.service, "health", broken)
    found = httpx.get(live.url + "/health")
    assert found.status_code == 500
    assert "ZeroDivisionError" in error(found.content)["message"]
    assert "of ours" not in found.text
    text = httpx.get(live.url + "/metrics").text
    assert "hinny_exceptions_total 1.0" in text
    assert 'hinny_requests_total{endpoint="/health",status="500"} 1.0' in text


def test_nothing_of_a_request_is_kept(serve: Callable[..., Any]) -> None:
    live = serve(FakeCore(threading.Semaphore(10**6)))
    seen: list[weakref.ref[Any]] = []
    submit = live.service.loop.submit

    async def watched(requests: Any) -> Any:
        feed = await submit(requests)
        seen.append(weakref.ref(feed))
        return feed

    live.service.loop.submit = watched
    address = live.url + "/v1/completions"
    httpx.post(address, json={"prompt": "ab", "n": 3})
    httpx.post(address, json={"prompt": ["ab", "cd"], "stream": True})
    httpx.post(address, json={"prompt": "ab", "stop": "b"})
    with httpx.stream("POST", address, json={"prompt": "ab", "max_tokens": 190, "stream": True}) as stream:
        next(stream.iter_lines())
    until(lambda: not live.service._active and not live.service.loop.live)
    assert not live.service.loop._feeds
    assert not live.service.loop._by_number
    assert len(seen) == 4

    def gone() -> bool:
        gc.collect()
        return not any(feed() for feed in seen)

    until(gone)
