"""`hinny.serve`: the verb for Python, whose options all reach the server."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import hinny
from hinny.errors import ConfigError
from hinny.infer.limits import Limits
from hinny.infer.server import serving
from hinny.run import Run


def test_every_option_reaches_the_server(trained_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[serving.Server] = []
    monkeypatch.setattr(serving.Server, "run", lambda self, sockets: found.append(self))
    template = tmp_path / "turns.jinja"
    template.write_text("{{ messages[0].content }}")
    hinny.serve(trained_run.path, port=0, name="other", keys=("k",), chat_template=template, timeout=9, drain=8,
                max_queue=7, max_body=6, dtype="bf16", state_dtype=torch.float16,
                limits=Limits(sequences=2, context=100, snapshots=1))
    service = found[0].service
    assert vars(service.options) == dict(name="other", keys=("k",), chat_template=template, timeout=9, drain=8,
                                         max_queue=7, max_body=6)
    assert service.chat.stop == ()
    assert service.loop.most == 2 + 7
    core: Any = service.loop.core
    assert core.limits.context == 100
    assert core.runner.model.blocks[0].layer.out_proj.weight.dtype == torch.bfloat16
    assert core.runner.pool.layers[0].ssm.dtype == torch.float16


def test_it_answers_until_it_is_told_to_end(trained_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, where no signal arrives: the server itself is told."""
    listening, servers = threading.Event(), []
    startup = serving.Server.startup

    async def told(self: serving.Server, sockets: list[socket.socket] | None = None) -> None:
        await startup(self, sockets)
        servers.append(self)
        listening.set()

    monkeypatch.setattr(serving.Server, "startup", told)
    thread = threading.Thread(target=hinny.serve, args=(trained_run.path,), kwargs=dict(port=0, limits=Limits(
        sequences=1, context=64, snapshots=0)))
    thread.start()
    try:
        assert listening.wait(30)
        port = servers[0].servers[0].sockets[0].getsockname()[1]
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", timeout=30,
                            json=dict(prompt="the", max_tokens=5, temperature=0)).json()
    finally:
        if servers:
            servers[0].should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    assert answer["model"] == trained_run.path.name
    assert answer["choices"][0]["text"] == "".join(hinny.generate(trained_run.path, "the", max_tokens=5))


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="timeout is 0"):
        hinny.serve(tmp_path, timeout=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be listened at"):
            hinny.serve(tmp_path, port=port)
