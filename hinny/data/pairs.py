"""Megatron's own .bin and .idx as a data folder: they stay where they are, the folder says what they hold.

The folder has the tokenizer and data.json, whose "pair" names the files and the sequences of each split, by Megatron's
rule for `--split`. Both orders of text read it like any other folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hinny.data.lengths import Lengths, document_lengths
from hinny.data.shards import Shard
from hinny.errors import ConfigError, DataError
from hinny.tokenizer import Tokenizer

SPLIT = "99,1,0"
"""Train, held-out and unused parts, where none are asked for."""

TOKENS_AT_ONCE = 4_000_000


def split_ranges(split: str, sequences: int) -> list[range]:
    """The sequences of the three parts in Megatron's words, "99,1,0": any numbers, in proportion, rounded half to even.

    ConfigError for a split that has no number, more than three, or a first part of nothing.
    """
    try:
        parts = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or parts[0] == 0 or not re.fullmatch(r"[.0-9]+([,\s/]+[.0-9]+)*", split):
        raise ConfigError(f"split is {split!r}; it is one to three numbers, for training, held out and unused, such as "
                          f"{SPLIT}, and the first is above 0.")
    shares = np.array(parts + [0.0] * (3 - len(parts)))
    edges = accumulate((shares / np.sum(shares)).tolist(), initial=0.0)
    return [range(round(low * float(sequences)), round(high * float(sequences))) for low, high in pairwise(edges)]


def read_pair(prefix: str | Path, tokenizer: Tokenizer, split: str, report: Callable[[float], None]) -> dict[str, Any]:
    """data.json for the pair at `prefix`, read once from end to end; `report` hears the share that was read.

    DataError for tokens that the tokenizer does not know, and for a pair without training tokens.
    """
    prefix = Path(re.sub(r"\.(bin|idx)$", "", str(prefix))).resolve()
    shard = Shard(prefix)
    if shard.dtype.kind not in "iu":
        raise DataError(f"{prefix}.idx: its tokens are {shard.dtype.name}, expected whole numbers.")
    content = hashlib.sha256(Path(f"{prefix}.idx").read_bytes())
    for start in range(0, shard.n_tokens, TOKENS_AT_ONCE):
        tokens = shard.tokens(start, min(start + TOKENS_AT_ONCE, shard.n_tokens))
        content.update(tokens.tobytes())
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise DataError(f"{prefix}.bin: token {low if low < 0 else high}, but the tokenizer has the tokens 0 to "
                            f"{tokenizer.vocab_size - 1}; give the tokenizer that the files were made with.")
        report((start + len(tokens)) / shard.n_tokens)
    train, heldout, _ = split_ranges(split, len(shard))
    parts = {"train": shard.part(train), "heldout": shard.part(heldout)}
    if not parts["train"].n_tokens:
        raise DataError(f"{prefix}: split {split} of its {len(shard)} sequences leaves no token to train on.")
    asked = {"pair": content.hexdigest(), "split": [[r.start, r.stop] for r in (train, heldout)],
             "tokenizer": tokenizer.fingerprint}
    request = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": request, "request": request, "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "dtype": shard.dtype.name,
            "source": {"kind": "megatron", "prefix": str(prefix), "split": split},
            "pair": {"prefix": str(prefix), "sequences": len(shard), "train": [train.start, train.stop],
                     "heldout": [heldout.start, heldout.stop]},
            **{name: {"documents": len(part.document_ends), "tokens": part.n_tokens} for name, part in parts.items()},
            "lengths": Lengths.of(document_lengths(parts["train"])).table()}
