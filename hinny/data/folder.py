"""A data folder as its readers see it: data.json, the tokenizer and the shards, checked against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from hinny import tokenizer as tokenizers
from hinny.data.shards import Shard
from hinny.errors import ConfigError, DataError


class DataFolder:
    """An opened data folder. DataError if its parts do not belong together, ConfigError if no folder is named.

    `vocab_size`: of the model that will read it; every token id must be below. None: whoever asks has no model.
    """

    def __init__(self, path: str | None, vocab_size: int | None) -> None:
        if path is None:
            raise ConfigError("data.path is not set; make a folder with `hinny prepare DIR` and name it, --data DIR.")
        self.path = Path(path)
        self.record = read_record(path)
        self.fingerprint: str = self.record["fingerprint"]
        self.tokenizer = tokenizers.load(self.path)
        if self.tokenizer.fingerprint != self.record["tokenizer_fingerprint"]:
            raise DataError(f"{path}: its tokenizer ({self.tokenizer.fingerprint[:12]}) is not the one its shards were "
                            f"made with ({self.record['tokenizer_fingerprint'][:12]}); prepare the folder again.")
        if vocab_size is not None and self.record["vocab_size"] > vocab_size:
            raise DataError(f"{path}: its tokenizer has {self.record['vocab_size']} tokens, but model.vocab_size is "
                            f"{vocab_size}; set it to at least {self.record['vocab_size']}, or prepare other data.")

    def shard(self, split: Literal["train", "heldout"]) -> Shard:
        """The shard of one split, found to be what data.json says."""
        shard = Shard(self.path / split)
        found = {"dtype": shard.dtype.name, "tokens": shard.n_tokens, "documents": len(shard.document_ends)}
        expected = {"dtype": self.record["dtype"], **{k: self.record[split][k] for k in ("tokens", "documents")}}
        for name, value in found.items():
            if value != expected[name]:
                raise DataError(f"{shard.prefix}.idx: {name} {value}, but data.json says {expected[name]}; the shard "
                                "is of other data. Prepare the folder again.")
        return shard


def read_record(folder: str | Path) -> dict[str, Any]:
    """The data.json of a data folder; DataError if it is absent or damaged."""
    path = Path(folder) / "data.json"
    try:
        record = json.loads(path.read_bytes())
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror}; make a data folder with `hinny prepare`.") from None
    except ValueError as fault:
        raise DataError(f"{path}: damaged: {fault}. Remove {folder} and run `hinny prepare` again.") from None
    needed = {"fingerprint", "request", "tokenizer_fingerprint", "vocab_size", "eod", "dtype", "train", "heldout"}
    if missing := needed - set(record):
        raise DataError(f"{path}: lacks {', '.join(sorted(missing))}; it was not made by `hinny prepare`.")
    return record
