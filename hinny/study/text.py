"""The text of a study: where it is from, what of it is used, as the section [prepare] and as a `hinny prepare` command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from hinny.config import Section

Positive = Annotated[int, Field(gt=0)]
HUB = ("hf_config", "hf_split", "hf_rows", "stream")


class PrepareConfig(Section):
    """The text; without text, jsonl or hf, the Python standard library's sources and documentation.

    The tokenizer learnt from it has the recipes' model.vocab_size.
    """

    text: Annotated[list[str], Field(min_length=1)] | None = None
    """Files and folders, a document a file."""
    jsonl: str | None = None
    field: str | None = None
    """Name of the text in a line of jsonl, or in a row of hf ("text" without it)."""
    hf: str | None = None
    """A data set of the Hugging Face Hub by its name, or a folder of one."""
    hf_config: str | None = None
    hf_split: str | None = None
    """train without it."""
    hf_rows: Positive | None = None
    """The first rows only."""
    stream: bool | None = None
    """Read hf without keeping a copy in the package's cache."""
    source_field: str | None = None
    """With jsonl or hf: what says where a document is from, for data.join = "source"."""
    tokenizer: str | None = None
    """A tokenizer's file, with as many tokens as model.vocab_size, in place of one learnt from the text."""
    max_bytes: Positive | None = None
    min_tokens: Positive | None = None
    """Shorter documents are left out."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the documents kept for evaluation; hinny prepare's own without it."""
    workers: Positive | None = None
    """Processes that read and encode; the data are the same with any number."""

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        given = [name for name in ("text", "jsonl", "hf") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other; remove one.")
        if self.jsonl and not self.field:
            raise ValueError("jsonl and field belong together: field names the text in each line.")
        for name, value in (("field", self.field), ("source_field", self.source_field)):
            if value and not (self.jsonl or self.hf):
                raise ValueError(f"{name} has no effect without jsonl or hf; remove it.")
        if idle := [name for name in HUB if getattr(self, name) is not None and not self.hf]:
            raise ValueError(f"{idle[0]} has no effect without hf; remove it.")
        return self


def command(config: PrepareConfig, folder: Path, vocab_size: int, *, recall_words: bool) -> list[str]:
    """The words behind `hinny` that make the data folder. recall_words: the recipes practise recall."""
    words = ["prepare", str(folder)]
    for path in config.text or ():
        words += ["--text", path]
    for name in ("jsonl", "field", "hf", "hf_config", "hf_split", "hf_rows", "source_field", "tokenizer", "max_bytes",
                 "min_tokens", "held_out", "workers"):
        if (value := getattr(config, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if config.stream:
        words.append("--stream")
    if config.tokenizer is None:
        # a given tokenizer has its own words
        words += ["--vocab-size", str(vocab_size), *(["--recall-words"] if recall_words else [])]
    return words
