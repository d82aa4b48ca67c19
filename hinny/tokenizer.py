"""Text to token ids and back: raw bytes, `tokenizers` JSON files and SentencePiece models behind one class.

Text is only ever text: a document that contains the spelling of a special token does not gain that token, and no
begin-of-sequence token is added. `eod`, the token that ends a document, is appended by whoever writes documents.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from hinny.errors import DataError

EOD_TEXT = "<|endoftext|>"
EOD_NAMES = (EOD_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")
"""Spellings by which the end-of-document token of a `tokenizers` file is known; the first one present is taken."""

BYTES_FILE = b'{"kind": "bytes"}\n'
"""Content of a tokenizer.json that stands for the byte tokenizer."""

SPACE = "\u2581"
"""How SentencePiece spells a space."""


class Tokenizer(ABC):
    """Text ↔ token ids in [0, vocab_size)."""

    file_name = "tokenizer.json"
    """What the tokenizer's file is called in a data folder."""

    def __init__(self, content: bytes, vocab_size: int, eod: int) -> None:
        self.content = content
        """The bytes of its file: all that is needed to load it again."""
        self.vocab_size = vocab_size
        self.eod = eod
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of valid ids without eod."""

    @abstractmethod
    def _n_bytes(self, ids: list[int]) -> int:
        """Bytes of valid ids without eod."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without eod."""
        return self.encode_many([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; eod is written as nothing. DataError for an id outside the vocabulary."""
        return self._decode(self._words(ids))

    def n_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of text that `ids` stand for, so that the pieces of a text add up to it; eod has none.

        Exact also where a piece ends within a character, which `decode` cannot write. Two bounds: a `tokenizers` file
        that is not byte-level is counted by what `decode` writes, and a tokenizer that changes its text first (Unicode
        forms, a space put in front) is counted by the changed text. DataError for an id outside the vocabulary.
        """
        return self._n_bytes(self._words(ids))

    def _words(self, ids: Sequence[int]) -> list[int]:
        """`ids` without eod, all of them found to be in the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(f"token id {wrong} is outside the tokenizer's vocabulary, 0 to {self.vocab_size - 1}; "
                            "are these ids of another tokenizer?")
        return [i for i in ids if i != self.eod]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's file into `folder`."""
        (folder / self.file_name).write_bytes(self.content)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and eod = 256."""

    def __init__(self) -> None:
        super().__init__(BYTES_FILE, vocab_size=257, eod=256)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _n_bytes(self, ids: list[int]) -> int:
        return len(ids)


class JSONTokenizer(Tokenizer):
    """A file of the `tokenizers` library."""

    def __init__(self, content: bytes, source: str) -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
        # the library raises bare Exception for a file that is not its own
        except Exception as fault:
            raise DataError(f"{source}: not a file of the `tokenizers` library: {fault}.") from None
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        eod = next((vocabulary[name] for name in EOD_NAMES if name in vocabulary), None)
        if eod is None:
            raise DataError(f"{source}: no end-of-document token among its {len(vocabulary)} tokens; "
                            f"known spellings: {', '.join(EOD_NAMES)}. Add one of them to the tokenizer.")
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        super().__init__(content, vocab_size=max(vocabulary.values()) + 1, eod=eod)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        # without the library's pool of threads, whose waking takes longer than a short text
        return self._inner.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=False)

    def _n_bytes(self, ids: list[int]) -> int:
        if self._sizes is None:
            return len(self._decode(ids).encode())
        return sum(self._sizes[i] for i in ids)

    @cached_property
    def _sizes(self) -> list[int] | None:
        """Bytes of each token of a byte-level vocabulary; None for another, whose tokens have no bytes of their own."""
        decoder = json.loads(self.content).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        sizes = [0] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            # one letter a byte; the decoder writes a token with any other letter as it stands
            sizes[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
        for i, added in self._inner.get_added_tokens_decoder().items():
            sizes[i] = len(added.content.encode())
        return sizes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file; eod is its end-of-sentence piece, as in Megatron."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, source: str) -> None:
        with warnings.catch_warnings():
            # its bindings warn at import on Python 3.12 and later
            warnings.simplefilter("ignore", DeprecationWarning)
            import sentencepiece
        self._inner = sentencepiece.SentencePieceProcessor()
        try:
            self._inner.LoadFromSerializedProto(content)
        except RuntimeError as fault:
            raise DataError(f"{source}: not a SentencePiece model: {fault}.") from None
        if self._inner.eos_id() < 0:
            raise DataError(f"{source}: the SentencePiece model has no end-of-sentence piece to end documents with; "
                            "train it with eos_id >= 0.")
        super().__init__(content, vocab_size=self._inner.vocab_size(), eod=self._inner.eos_id())

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._inner.encode(list(texts))

    def _decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids)

    def _n_bytes(self, ids: list[int]) -> int:
        return sum(self._sizes[i] for i in ids)

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each piece; an unknown piece has those of the mark that is written for it, a control piece none."""
        inner = self._inner
        return [1 if inner.is_byte(i) else 0 if inner.is_control(i) else
                len(inner.decode([i]).encode()) if inner.is_unknown(i) else
                len(inner.id_to_piece(i).replace(SPACE, " ").encode()) for i in range(self.vocab_size)]


def load(source: str | Path) -> Tokenizer:
    """The tokenizer in a file (.json, .model), in a folder made by `hinny prepare`, or the one called "bytes".

    Raises DataError for a path that is absent, unreadable or of another kind.
    """
    path = Path(source)
    if str(source) == "bytes":
        return ByteTokenizer()
    if path.is_dir():
        path = _file_in(path)
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise DataError(f"{path}: the tokenizer cannot be read: {fault.strerror}.") from None
    if path.suffix == ".model":
        return SentencePieceTokenizer(content, str(path))
    if path.suffix != ".json":
        raise DataError(f"{path}: the kind of tokenizer is told by the ending, .json (`tokenizers`) or .model "
                        f"(SentencePiece), not {path.suffix or 'none'!r}.")
    return ByteTokenizer() if _is_bytes(content) else JSONTokenizer(content, str(path))


def _file_in(folder: Path) -> Path:
    found = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if len(found) != 1:
        what = "both tokenizer.json and tokenizer.model" if found else "neither tokenizer.json nor tokenizer.model"
        raise DataError(f"{folder} holds {what}; a data folder of `hinny prepare` holds one.")
    return found[0]


def _is_bytes(content: bytes) -> bool:
    try:
        return json.loads(content) == json.loads(BYTES_FILE)
    except ValueError:
        return False


def check_vocab_size(vocab_size: int) -> None:
    """DataError for a size at which `train_bpe` cannot spell every text."""
    if vocab_size < 257:
        raise DataError(f"vocab_size {vocab_size} is too small: 256 bytes and the end-of-document token need 257.")


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from `texts`, in which every digit is a token of its own.

    So numbers compare digit by digit. The same texts give the same file. Ids: eod 0, the 256 bytes, then merges.
    DataError if the texts are too few for `vocab_size` tokens.
    """
    check_vocab_size(vocab_size)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    # digits first: the byte-level rule would join " 2024" into one word
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(texts, trainer)
    if (size := inner.get_vocab_size()) < vocab_size:
        raise DataError(f"the text yields only {size} tokens, not {vocab_size}; give more text or a lower vocab_size.")
    return JSONTokenizer(inner.to_str().encode(), "trained tokenizer")
