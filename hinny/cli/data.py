"""The verb that makes data folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text files or folders; may be repeated.")] = None,
    jsonl: Annotated[list[Path] | None, typer.Option(help="JSON-lines files, also .gz and .zst, with --field; may be "
                                                          "repeated.")] = None,
    field: Annotated[str | None, typer.Option(help="With --jsonl or --hf: what holds the text.")] = None,
    hf: Annotated[str | None, typer.Option(help="A Hugging Face data set: its name, or a folder.")] = None,
    hf_config: Annotated[str | None, typer.Option(help="With --hf: the configuration.")] = None,
    hf_split: Annotated[str | None, typer.Option(help="With --hf: the split; train by default.")] = None,
    hf_rows: Annotated[int | None, typer.Option(help="With --hf: only the first rows.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="With --hf: no copy in the package's cache.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer to use instead of training one.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Size of the BPE vocabulary to train.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.03,
    max_bytes: Annotated[int | None, typer.Option(help="At most this much text, spread over all of it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of documents.")] = 0,
    recall_words: Annotated[bool, typer.Option("--recall-words", help="Teach the tokenizer phone-book words.")] = False,
    megatron: Annotated[Path | None, typer.Option(help="Prefix of Megatron's .bin and .idx, with --tokenizer.")] = None,
    split: Annotated[str | None, typer.Option(help="With --megatron: train, held-out, unused; 99,1,0.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Leave out documents of fewer tokens.")] = None,
    source_field: Annotated[str | None, typer.Option(help="With --jsonl or --hf: what says which book, "
                                                          "repository … a text is from; kept for data.join.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tell how much text is in documents of so many tokens.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and encode.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Text to a tokenizer and token shards; Python's own library where no text is named. Stopped, it goes on."""
    from hinny.data.prepare import prepare as run
    from hinny.progress import stage_bar

    try:
        with stage_bar() as progress:
            found = run(out, text=text, jsonl=jsonl, field=field, hf=hf, hf_config=hf_config, hf_split=hf_split,
                        hf_rows=hf_rows, stream=stream, tokenizer=tokenizer, vocab_size=vocab_size, held_out=held_out,
                        max_bytes=max_bytes, seed=seed, recall_words=recall_words, megatron=megatron, split=split,
                        min_tokens=min_tokens, source_field=source_field, seq_len=seq_len, workers=workers,
                        progress=progress)
    except KeyboardInterrupt:
        print(f"{out}: stopped; run the same command to go on from the parts that are finished.", file=sys.stderr)
        sys.exit(130)
    train, kept = found["train"], found["heldout"]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{out}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on, {kept['documents']:,} and "
          f"{kept['tokens']:,} held out, {found['vocab_size']:,} words of vocabulary")
    if left := found.get("left_out"):
        print(f"left out, below {found['min_tokens']:,} tokens: {left['train']['documents']:,} documents, "
              f"{left['train']['tokens']:,} tokens of training, {left['heldout']['documents']:,} and "
              f"{left['heldout']['tokens']:,} held out")
    if told := found.get("of_seq_len"):
        print(f"{100 * told['tokens']:.1f} % of the tokens to train on are in documents of {told['seq_len']:,} tokens "
              f"or more, {100 * told['documents']:.1f} % of the documents; drawn in {out / 'lengths.svg'}")
