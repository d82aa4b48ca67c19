"""A run's newest checkpoint, written as somebody else's format: weights, settings, tokenizer and a model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hinny.checkpoint import formats, sharded, weights
from hinny.checkpoint.card import card
from hinny.checkpoint.folders import appearing, need_room
from hinny.checkpoint.formats.foreign import Info, Tensors
from hinny.checkpoint.formats.table import Row
from hinny.checkpoint.matching import entry, not_finite
from hinny.checkpoint.sharded import n_bytes
from hinny.checkpoint.store import read_meta, read_weights
from hinny.checkpoint.tokenizer_files import choose
from hinny.checkpoint.tokenizer_files import write as write_tokenizer
from hinny.errors import CheckpointError, ConfigError
from hinny.run import Run, write_atomically

Report = Callable[[str, float], None]

LAYOUTS = ("released", "current")
"""Names of Megatron's weights: as in June 2024, and as its main branch has had them since June 2026."""


def export(source: Path, target: Path | None, to: str, *, dry_run: bool, layout: str | None, tp: int, pp: int,
           tokenizer: str | Path | None, shard_bytes: int, report: Report) -> dict[str, Any]:
    """Write the run `source` into the new folder `target` in format `to`; returns what was done, as data.

    Arguments as in `convert`. Raises CheckpointError, with every reason, where the format cannot express the model.
    """
    run = Run(source)
    model = run.recipe.model
    module: Any = formats.load(to)
    auto = to not in formats.SELF_WRITTEN
    _check_options(to, layout, tp, pp)
    if not auto and shard_bytes != sharded.SHARD_BYTES:
        raise ConfigError(f"shard_bytes has no effect on {to}, whose files are one a rank; drop it.")
    ranks = {"layout": layout or LAYOUTS[-1], "tp": tp, "pp": pp} if to == "megatron" else {}
    if reasons := module.refusals(model, **ranks):
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise CheckpointError(f"{run.path} cannot be written as {to}, which has no way to say what its model "
                              f"is:\n{lines}\nChoose another format: nothing is approximated.")
    words = choose(run, tokenizer, auto=auto)
    report("check", 0.0)
    meta = read_meta(run)
    stored = read_weights(run)
    rows = module.rows(model, **{"names": module.names_of(model, ranks["layout"])} if ranks else {})
    infos = _theirs(rows, stored)
    record: dict[str, Any] = {
        "run": str(run.path), "step": meta["step"], "format": to, "folder": None if target is None else str(target),
        "parameters": sum(torch.Size(info.shape).numel() for info in stored.infos.values()),
        "bytes": sum(map(n_bytes, (infos if auto else stored.infos).values())), "notes": [],
        "mapping": [entry(row, infos[row.theirs]) for row in rows]}
    if dry_run:
        return record
    assert target is not None
    with appearing(target) as folder:
        need_room(folder, record["bytes"], target)
        if auto:
            record["notes"] = _write_folder(module, run, rows, infos, stored, folder, shard_bytes, words.eod, report)
        else:
            options = {**ranks, "seq_len": run.recipe.train.seq_len} if ranks else {}
            record["notes"] = _write_itself(module, run, stored, folder, options, report)
        record["notes"] += write_tokenizer(words, folder, auto=auto)
        write_atomically(folder / "README.md", card(run, meta, _source(run), to, record))
    return record


def _source(run: Run) -> dict[str, Any] | None:
    """What the run was converted from, also if it was trained on since."""
    first = run.checkpoint_folders()[0]
    return read_meta(run, 0)["source"] if weights.are_in(first) else None


def _check_options(to: str, layout: str | None, tp: int, pp: int) -> None:
    if to != "megatron" and (layout is not None or (tp, pp) != (1, 1)):
        raise ConfigError(f"layout, tp and pp have no effect on {to}, which has one layout and no ranks; drop them.")
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; known: {', '.join(LAYOUTS)}.")
    if tp < 1 or pp < 1:
        raise ConfigError(f"tp is {tp} and pp is {pp}; each must be 1 or more.")


def _theirs(rows: list[Row], stored: Tensors) -> dict[str, Info]:
    """Shape and type of each of their tensors: the widest type where the parts that it joins differ."""
    infos = {}
    for row in rows:
        parts = [torch.empty(stored.infos[name].shape, device="meta") for name in row.ours]
        dtype = stored.infos[row.ours[0]].dtype
        for name in row.ours[1:]:
            dtype = torch.promote_types(dtype, stored.infos[name].dtype)
        infos[row.theirs] = Info(tuple(row.layout.join(parts).shape), dtype)
    return infos


class _Joined:
    """Their tensors, made of ours one at a time, each found to be finite."""

    def __init__(self, rows: list[Row], infos: dict[str, Info], stored: Tensors) -> None:
        self._rows = {row.theirs: row for row in rows}
        self._infos, self._stored = infos, stored

    def __call__(self, name: str) -> Tensor:
        dtype = self._infos[name].dtype
        return self._rows[name].layout.join([finite(self._stored, part).to(dtype) for part in self._rows[name].ours])


def finite(stored: Tensors, name: str) -> Tensor:
    """A weight of the run. Raises CheckpointError for a value that is not finite."""
    value = stored.read(name)
    if bad := not_finite(value):
        raise CheckpointError(f"{name} has {bad:,} of {value.numel():,} values that are not finite; nothing was "
                              "written. Export an earlier checkpoint.")
    return value


def _write_folder(module: Any, run: Run, rows: list[Row], infos: dict[str, Info], stored: Tensors, folder: Path,
                  shard_bytes: int, eod: int | None, report: Report) -> list[str]:
    recipe = run.recipe
    shards = sharded.plan(infos, shard_bytes, single=True)
    sharded.write(folder, shards, _Joined(rows, infos, stored), lambda share: report("read and write", share))
    kinds: Counter[torch.dtype] = Counter()
    for info in infos.values():
        kinds[info.dtype] += n_bytes(info)
    notes = module.write_settings(recipe.model, folder, dtype=kinds.most_common(1)[0][0],
                                  max_len=recipe.train.seq_len, eod=eod)
    # no sampling defaults: whoever generates chooses; and no token begins a text
    ends = {} if eod is None else {"eos_token_id": eod}
    write_atomically(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")
    return list(notes)


def _write_itself(module: Any, run: Run, stored: Tensors, folder: Path, options: dict[str, Any],
                  report: Report) -> list[str]:
    total = len(stored.infos)
    done: set[str] = set()

    def read(name: str) -> Tensor:
        done.add(name)
        report("read and write", len(done) / total)
        return finite(stored, name)

    notes: list[str] = module.write_checkpoint(run.recipe.model, read, folder, **options)
    return notes
