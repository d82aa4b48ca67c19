"""The verb that continues a prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hinny.cli.serve import Device, Dtype, where
from hinny.cli.shared import Tensor, Threads, ranks_told, set_threads
from hinny.errors import ConfigError


def generate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - or nothing: what is piped in.")] = None,
    file: Annotated[Path | None, typer.Option(help="Continue this file's text, as it is.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens of this much mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this share as likely as the likeliest.")] = None,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logit of every token written before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken off it as often as it was written.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what is there already.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the continuation; may be repeated.")] = None,
    drafts: Annotated[int, typer.Option(help="Tokens guessed from the text so far and checked at once; greedy.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    tensor: Tensor = 1,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prompt and text as JSON, when all is written.")] = False,
) -> None:
    """Continue a prompt, streamed to the terminal."""
    from hinny.infer import tensor_ranks
    from hinny.infer.engine import generate as stream

    given = _prompt(prompt, file, tensor)
    set_threads(threads)
    device, weights = where(device, dtype)
    tensor_ranks.check_tensor_processes(tensor, "generate")
    written = []
    with ranks_told():
        for piece in stream(run, given, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                            min_p=min_p, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                            repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()), device=device,
                            dtype=weights, drafts=drafts, tensor=tensor):
            written.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    if not tensor_ranks.process_rank():
        print(json.dumps({"prompt": given, "text": "".join(written)}, ensure_ascii=False) if as_json else "")


def _prompt(text: str | None, file: Path | None, tensor: int) -> str:
    """The text to continue: of the command line, a file or a pipe. ConfigError for none, two, or what is no text."""
    if text is not None and file is not None:
        raise ConfigError(f"there is a prompt, {text[:40]!r}, and the file {file}; give one of them.")
    where = "the prompt" if file is None else str(file)
    try:
        if file is not None:
            return file.read_bytes().decode()
        if text not in (None, "-"):
            # bytes of a command line that are no text come as lone surrogates
            text.encode()
            return text
        if tensor > 1:
            raise ConfigError("a pipe is read by one process alone; with --tensor give the prompt itself, or --file.")
        if sys.stdin.isatty():
            raise ConfigError("there is no prompt: give a text, --file, or pipe one in.")
        return sys.stdin.buffer.read().decode()
    except (OSError, UnicodeError) as fault:
        raise ConfigError(f"{where} cannot be read: {fault}.") from None
