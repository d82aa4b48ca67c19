"""A run's tokenizer as files that other programs open: the same text gives the same ids there.

A file of the `tokenizers` library goes out as it is, with tokenizer_config.json for AutoTokenizer. The byte tokenizer
becomes such a file exactly. A SentencePiece model is copied where the reader takes one; AutoTokenizer converts it by
rules that are not SentencePiece's own, so for it another file must be given, or none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers as library

from hinny import tokenizer as tokenizers
from hinny.errors import CheckpointError
from hinny.run import Run, write_atomically
from hinny.tokenizer import EOD_TEXT, ByteTokenizer, JSONTokenizer, SentencePieceTokenizer, Tokenizer


@dataclass(frozen=True)
class Words:
    """The run's own tokenizer, if it has one, and the one to write, if any."""

    own: Tokenizer | None
    out: Tokenizer | None

    @property
    def eod(self) -> int | None:
        """The token that ends a document."""
        return None if self.own is None else self.own.eod


def choose(run: Run, given: str | Path | None, *, auto: bool) -> Words:
    """What goes out with `run`: its tokenizer, or the file `given` with the same ids, or nothing for "none".

    auto: AutoTokenizer is to open it, which CheckpointError refuses for SentencePiece.
    """
    own = tokenizers.load(run.path) if any(run.path.glob("tokenizer.*")) else None
    if str(given) == "none":
        return Words(own, None)
    if given is None:
        if auto and isinstance(own, SentencePieceTokenizer):
            raise CheckpointError(
                f"the tokenizer of {run.path} is a SentencePiece model, which AutoTokenizer would convert by rules of "
                "its own: the ids could differ. Give the same tokenizer as a file of the `tokenizers` library, "
                "--tokenizer FILE.json, or write none, --tokenizer none, and SentencePiece's file is copied alone.")
        return Words(own, own)
    out = tokenizers.load(given)
    if own is not None:
        _check_same(own, out, str(given))
    return Words(own, out)


def write(words: Words, folder: Path, *, auto: bool) -> list[str]:
    """Write the tokenizer's files into `folder`; returns what readers must know."""
    if words.out is None:
        if words.own is None:
            return ["The run has no tokenizer: none was written."]
        if isinstance(words.own, SentencePieceTokenizer):
            words.own.save(folder)
            return ["tokenizer.model is a SentencePiece model: encode with SentencePiece itself, which adds no tokens."]
        return ["No tokenizer was written, as was asked for."]
    if isinstance(words.out, SentencePieceTokenizer):
        words.out.save(folder)
        return []
    content = byte_level(words.out) if isinstance(words.out, ByteTokenizer) else words.out.content
    (folder / "tokenizer.json").write_bytes(content)
    if auto:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                    "eos_token": library.Tokenizer.from_str(content.decode()).id_to_token(words.out.eod)}
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return []


def byte_level(words: ByteTokenizer) -> bytes:
    """The byte tokenizer as a file of the `tokenizers` library: a byte-level BPE in which nothing merges."""
    inner = library.Tokenizer(library.models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())},
                                                 merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens([EOD_TEXT])
    assert inner.token_to_id(EOD_TEXT) == words.eod
    return inner.to_str().encode()


def _letters() -> list[str]:
    """How byte-level tokenizers spell the bytes 0 to 255: printable Latin-1 as it is, the others from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _check_same(own: Tokenizer, out: Tokenizer, given: str) -> None:
    """CheckpointError unless `out` gives the ids of `own` for what each token of it spells."""
    if not isinstance(out, JSONTokenizer):
        raise CheckpointError(f"{given} is no file of the `tokenizers` library; only such a file can stand for the "
                              "run's own tokenizer.")
    texts = [text for i in range(own.vocab_size) if (text := own.decode([i])) and "\ufffd" not in text]
    pairs = zip(texts, own.encode_many(texts), out.encode_many(texts), strict=True)
    if differing := [text for text, mine, other in pairs if mine != other]:
        raise CheckpointError(f"{given} is another tokenizer than the run's: it encodes {len(differing):,} of "
                              f"{len(texts):,} tokens otherwise, for instance {differing[0]!r}.")
    if own.eod != out.eod:
        raise CheckpointError(f"{given} ends documents with token {out.eod}, the run's tokenizer with {own.eod}.")
