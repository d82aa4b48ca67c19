"""The verb that serves, for Python: a run behind an OpenAI-compatible address."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import torch

from hinny.infer.engine import Engine
from hinny.infer.limits import Limits
from hinny.infer.quantise import Precision
from hinny.infer.server import serving
from hinny.infer.server.options import Options
from hinny.infer.tensor_ranks import check_tensor_processes, process_rank


def serve(run: str | Path, *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None,
          keys: tuple[str, ...] = (), limits: Limits | None = None, chat_template: Path | None = None,
          timeout: float = 600.0, drain: float = 30.0, max_queue: int = 256, max_body: int = 8 * 2**20,
          device: str = "cpu", dtype: Precision | None = None, state_dtype: torch.dtype | None = None,
          tensor: int = 1) -> None:
    """Answer requests for the model in `run` until SIGTERM or Ctrl-C: call it in the main thread. docs/serving.md.

    host, port     where to listen; port 0 takes a free one, which the log of "hinny" tells
    name           of the model, in requests; the run's folder's without it
    keys           requests need one of these; without any the server is open
    limits         sizes of the engine: sequences at work, context, memory, snapshots, drafts; `Limits()` without them
    chat_template  Jinja file that makes a prompt of messages; the run's own, else a plain form, without it
    timeout        seconds for a request, its time in the queue included
    drain          seconds for running requests at the end
    max_queue      continuations that may wait beside those at work
    max_body       bytes of a request
    device, dtype  as for `hinny.load`: "cpu" or "cuda", and the weights' type
    state_dtype    of SSM states; float32 without it
    tensor         processes that share the model, each of which torchrun has call this: rank 0 answers, and when it
                   ends, or one of them fails, all end

    ConfigError, before the model is loaded, for an option that cannot be or an address that cannot be had.
    RankFailure if a process failed: it says which, and why.
    """
    path = Path(run)
    options = Options(name=name or path.resolve().name, keys=tuple(keys), chat_template=chat_template, timeout=timeout,
                      drain=drain, max_queue=max_queue, max_body=max_body)
    check_tensor_processes(tensor)

    def opened() -> Engine:
        return Engine(path, device=device, dtype=dtype, limits=limits or Limits(), state_dtype=state_dtype,
                      tensor=tensor)

    if tensor > 1 and process_rank() > 0:
        opened().follow()
        return
    with serving.listen(host, port) as listener, opened() as engine:
        # the signal of a drain: nobody can be answered any more
        engine.on_failure(partial(os.kill, os.getpid(), signal.SIGTERM))
        serving.serve(engine, path, options, listener)
