"""The verb that serves."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hinny.cli.shared import Tensor, Threads, ranks_told, set_threads
from hinny.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hinny.infer.quantise import Precision

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
Dtype = Annotated[Literal["fp32", "bf16", "stored", "int8", "fp8", "int4"] | None, typer.Option(
    help="Weights: fp32, bf16, or stored: as in the checkpoint; int8, fp8 or int4 (a GPU's alone) for the layers' "
         "projections by torchao, bf16 for the rest. bf16 on a GPU, fp32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")]


def serve(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, and says which.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, in requests; the run's folder's without it.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Requests need one of these keys; may be repeated. Other "
                                                           "users of the machine see it: better a file.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A key a line. $HINNY_API_KEY is read as well.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    state: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Numbers of SSM states.")] = "fp32",
    sequences: Annotated[int, typer.Option(help="Continuations at work at the same time; more wait.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens of a prompt and its continuation, at most.")] = 4096,
    memory: Annotated[str | None, typer.Option(help="Of states, keys and snapshots, such as 20GiB; without it what all "
                                                    "sequences need, or what is free.")] = None,
    snapshots: Annotated[int | None, typer.Option(help="States kept for prompts that begin alike; as many as sequences "
                                                       "without it, 0: no prefix cache.")] = None,
    drafts: Annotated[int, typer.Option(help="Tokens guessed from the text so far, for greedy requests.")] = 0,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file that makes a prompt of messages.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, its time in the queue included.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds for running requests after SIGTERM.")] = 30.0,
    max_queue: Annotated[int, typer.Option(help="Continuations that may wait; one more is refused with 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Longest body of a request.")] = "8MiB",
    tensor: Tensor = 1,
    threads: Threads = None,
) -> None:
    """Put a run behind an OpenAI-compatible address, with a page to try it on."""
    from hinny.infer.limits import Limits

    keys = _keys(api_key or [], api_key_file)
    limits = Limits(sequences=sequences, context=context, memory=None if memory is None else size(memory, "--memory"),
                    snapshots=snapshots, drafts=drafts)
    longest = size(max_body, "--max-body")
    set_threads(threads)
    from hinny.infer.serve import serve as go

    device, weights = where(device, dtype)
    with ranks_told():
        go(run, host=host, port=port, name=name, keys=keys, limits=limits, chat_template=chat_template,
           timeout=timeout, drain=drain, max_queue=max_queue, max_body=longest, device=device, dtype=weights,
           state_dtype=_state(state), tensor=tensor)


def where(device: str | None, dtype: Literal["fp32"] | Precision | None) -> tuple[str, Precision | None]:
    """Device and weights' type of an engine, where none are named: a GPU if there is one, and bf16 on it."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dtype or ("fp32" if device == "cpu" else "bf16")
    return device, None if chosen == "fp32" else chosen


def _state(name: str) -> torch.dtype | None:
    import torch

    # None is the engine's own: float32, and float64 for a float64 model
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def size(text: str, option: str) -> int:
    """Bytes of a size such as 20GiB; a mistake names `option`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KiB|MiB|GiB)?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 512MiB or 20GiB.", param_hint=option)
    return int(float(found[1]) * UNITS[found[2] or ""])


def _keys(named: list[str], file: Path | None) -> tuple[str, ...]:
    """All API keys: of the command line, of the file and of the environment."""
    keys = [*named]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"{file}: the API keys cannot be read: {fault}.") from None
        if len(keys) == len(named):
            raise ConfigError(f"{file}: there is no API key in it; without one the server would be open to everybody.")
    told = os.environ.get("HINNY_API_KEY")
    return tuple(dict.fromkeys([*keys, *([told] if told else [])]))
