"""A data folder as its readers see it: data.json, the tokenizer and the shards, checked against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hinny import tokenizer as tokenizers
from hinny.config import DataConfig
from hinny.data.origins import read_numbers
from hinny.data.shards import Shard
from hinny.errors import ConfigError, DataError

Split = Literal["train", "heldout"]


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
        self._pair: dict[str, Any] | None = self.record.get("pair")
        if vocab_size is not None and self.record["vocab_size"] > vocab_size:
            raise DataError(f"{path}: its tokenizer has {self.record['vocab_size']} tokens, but model.vocab_size is "
                            f"{vocab_size}; set it to at least {self.record['vocab_size']}, or prepare other data.")

    def shard(self, split: Split) -> Shard:
        """The tokens of one split, found to be what data.json says."""
        shard, sequences = self.sequences(split)
        return shard.part(sequences) if self._pair else shard

    def sequences(self, split: Split) -> tuple[Shard, range]:
        """The pair of files that has the split, its own or Megatron's (hinny.data.pairs), and the sequences of it."""
        if self._pair is None:
            shard = Shard(self.path / split)
            self._compare(shard, split)
            return shard, range(len(shard))
        shard = Shard(self._pair["prefix"])
        if len(shard) != self._pair["sequences"]:
            raise DataError(f"{shard.prefix}.idx: {len(shard)} sequences, but {self.path}/data.json says "
                            f"{self._pair['sequences']}; the pair was made anew. Prepare the folder again.")
        sequences = range(*self._pair[split])
        self._compare(shard.part(sequences), split)
        return shard, sequences

    def origins(self, split: Split) -> np.ndarray:
        """(documents,) uint32: the number of each document's source; DataError if the folder does not have them."""
        if "sources" not in self.record:
            raise DataError(f'{self.path}: data.join = "source" needs to know where each document is from, and the '
                            "folder does not say; prepare it with --source-field NAME, or set another data.join.")
        return read_numbers(self.path, split, len(self.shard(split).document_ends))

    def _compare(self, shard: Shard, split: Split) -> None:
        found = {"dtype": shard.dtype.name, "tokens": shard.n_tokens, "documents": len(shard.document_ends)}
        expected = {"dtype": self.record["dtype"], **{k: self.record[split][k] for k in ("tokens", "documents")}}
        for name, value in found.items():
            if value != expected[name]:
                raise DataError(f"{shard.prefix}.idx: {name} {value}, but data.json says {expected[name]}; the shard "
                                "is of other data. Prepare the folder again.")


def open_folders(config: DataConfig, vocab_size: int | None) -> list[DataFolder]:
    """The folders of a recipe, in its order; DataError if they do not speak the same tokens, or are the same data."""
    folders = [DataFolder(path, vocab_size) for path in config.folders or [None]]
    seen: dict[str, DataFolder] = {}
    for folder in folders:
        first, ours, theirs = folders[0], folder.tokenizer.fingerprint, folders[0].tokenizer.fingerprint
        if ours != theirs:
            raise DataError(f"data.blend: the tokenizer of {folder.path} ({ours[:12]}) is not that of {first.path} "
                            f"({theirs[:12]}); prepare one of them with the other's: hinny prepare DIR --tokenizer "
                            f"{first.path}.")
        if other := seen.get(folder.fingerprint):
            raise DataError(f"data.blend: {folder.path} and {other.path} hold the same data ({folder.fingerprint[:12]})"
                            "; name them once, with the sum of their weights.")
        seen[folder.fingerprint] = folder
    return folders


def record_name(place: int) -> str:
    """What a run calls its copy of the data.json of the recipe's folder number `place`."""
    return "data.json" if place == 0 else f"data-{place}.json"


def read_record(folder: str | Path, place: int = 0) -> dict[str, Any]:
    """The data.json of a data folder, or number `place` of a run; DataError if it is absent or damaged."""
    path = Path(folder) / record_name(place)
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
