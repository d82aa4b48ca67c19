"""The verb `convert`: a foreign checkpoint becomes a run, and a run becomes a foreign checkpoint.

In: find the folder and its format, hold every name, shape and type against our model, then stream one tensor at a time,
found to be finite, into a new run directory. Out: hinny.checkpoint.export. Both appear whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hinny import tokenizer as tokenizers
from hinny.checkpoint import formats, releases, sharded, weights
from hinny.checkpoint.export import export
from hinny.checkpoint.folders import appearing, need_room
from hinny.checkpoint.formats.foreign import LONGEST, Foreign
from hinny.checkpoint.matching import Match, Reader, entry, match
from hinny.checkpoint.own import open_run
from hinny.checkpoint.sources import Source, locate
from hinny.checkpoint.store import fingerprint
from hinny.config import Recipe, validate
from hinny.errors import CheckpointError, ConfigError, DataError
from hinny.run import Run, environment
from hinny.tokenizer import Tokenizer

Progress = Callable[[str, float], None]
"""Called with a stage's name (check, read and write) and the share of it that is done."""

TRAINING: dict[str, Any] = {
    "data": {"boundaries": "reset"},
    "optim": {"lr": 3e-5, "schedule": "constant", "warmup_samples": 1024, "weight_decay": 0.1, "beta1": 0.9,
              "beta2": 0.95, "eps": 1e-8, "clip": 1.0},
    "train": {"batch_size": 32, "micro_batch_size": 1, "steps": 1000, "seed": 1234, "precision": "bf16",
              "log_every": 10, "save_every": 500}}
"""How a converted run would be trained on; docs/convert.md says why. No checkpoint tells its own settings."""

SEQ_LEN = 4096
"""train.seq_len where the checkpoint names no longest sequence."""


def convert(source: str | Path, target: str | Path | None = None, *, to: str | None = None, format: str | None = None,
            dry_run: bool = False, layout: str | None = None, tp: int = 1, pp: int = 1,
            tokenizer: str | Path | None = None, verify: str | None = None,
            shard_bytes: int = sharded.SHARD_BYTES, progress: Progress | None = None) -> dict[str, Any]:
    """Convert `source` to `target`; returns what was found and done, as data.

    source: without `to`, a folder of a foreign checkpoint or a Hub id, owner/name or owner/name@revision, which becomes
        the run `target`; or a run, of which `target` gets the newest weights alone. With `to`, a run, whose newest
        checkpoint becomes the folder `target`.
    to: a format to write: nemotron_h, mamba2, mamba, nemotron, llama, state-spaces or megatron.
    format: the format of `source`, where it is not clear.
    dry_run: check and return the mapping; nothing is written and no target is needed.
    layout, tp, pp: megatron's names, released or current, and its tensor- and pipeline-parallel ranks.
    tokenizer: a file in place of the checkpoint's (.json, .model), "bytes", or "none" for none.
    verify: a release of hinny.checkpoint.releases: its file's checksum and its counts are compared and kept.
    shard_bytes: largest size of a file of weights.
    Raises CheckpointError, with everything that is missing, left over or wrong; and DataError for a tokenizer.
    """
    start = time.perf_counter()
    report = progress or (lambda stage, share: None)
    if target is None and not dry_run:
        raise ConfigError("a target is needed: the run or folder to write, which must not be there yet.")
    if verify is not None and dry_run:
        raise ConfigError(f"verify = {verify!r} has no effect on a dry run, which reads no weights; drop one of them.")
    out = None if target is None else Path(target)
    if to is not None:
        for name, value in (("format", format), ("verify", verify)):
            if value is not None:
                raise ConfigError(f"{name} = {value!r} has no effect on the way out of a run; drop it.")
        record = export(Path(source), out, to, dry_run=dry_run, layout=layout, tp=tp, pp=pp, tokenizer=tokenizer,
                        shard_bytes=shard_bytes, report=report)
    else:
        if layout is not None or (tp, pp) != (1, 1):
            raise ConfigError('layout, tp and pp go with to = "megatron", out of a run; what comes in is recognised.')
        record = _bring_in(locate(source), out, format, dry_run, tokenizer, verify, shard_bytes, report)
    return {**record, "done": not dry_run, "seconds": round(time.perf_counter() - start, 3)}


def _bring_in(source: Source, target: Path | None, format: str | None, dry_run: bool, tokenizer: str | Path | None,
              verify: str | None, shard_bytes: int, report: Progress) -> dict[str, Any]:
    run_of_ours = (source.folder / "recipe.toml").is_file()
    for name, value in (("format", format), ("verify", verify)) if run_of_ours else ():
        if value is not None:
            raise ConfigError(f"{name} = {value!r} has no effect on {source}, which is a run of hinny; drop it.")
    release = None if verify is None else releases.find(verify)
    foreign = (open_run(Run(source.folder)) if run_of_ours
               else formats.detect(source.folder, format).open_checkpoint(source.folder))
    report("check", 0.0)
    matched = match(foreign)
    record = _describe(source, target, matched)
    if not dry_run:
        matched.require(str(source))
    words = _tokenizer(foreign, source.folder, tokenizer)
    record["tokenizer"] = None if words is None else words.file_name
    if dry_run:
        return record
    assert target is not None
    if release is not None:
        record["checks"] = releases.check(release, source.folder, len(matched.mapping), matched.parameters,
                                          lambda share: report("check", share))
    with appearing(target) as partial:
        need_room(partial, record["bytes"], target)
        recipe = (_renamed(Run(source.folder).recipe, target, source) if run_of_ours
                  else _recipe(target, source, foreign))
        meta = {"recipe_fingerprint": fingerprint(recipe), "recipe": recipe.model_dump(mode="json"),
                "source": _provenance(record, verify)}
        run = Run(partial)
        weights.save(run, matched.infos, Reader(matched), meta, shard_bytes=shard_bytes,
                     progress=lambda share: report("read and write", share))
        if words is not None:
            words.save(partial)
        run.write_env(environment(device="cpu", seed=recipe.train.seed, threads=torch.get_num_threads(),
                                  data_fingerprint="none"), resumed=False)
        # last: what makes a folder a run
        run.write_recipe(recipe)
    return record


def _describe(source: Source, target: Path | None, matched: Match) -> dict[str, Any]:
    foreign = matched.foreign
    return {"source": str(source), "hub": source.hub, "revision": source.revision, "format": foreign.format,
            "run": None if target is None else str(target), "parameters": matched.parameters,
            "tensors": len(foreign.tensors.infos),
            "bytes": sum(map(sharded.n_bytes, matched.infos.values())),
            "largest_source_file": foreign.tensors.largest_file(),
            "model": foreign.model.model_dump(mode="json", exclude_none=True), "facts": dict(foreign.facts),
            "ignored": dict(foreign.ignored), "mapping": [entry(row, info) for row, info in matched.mapping],
            "problems": dict(matched.problems), "looks_like": matched.likeness if matched.problems else []}


def _provenance(record: Mapping[str, Any], verify: str | None) -> dict[str, Any]:
    """What stays known of the source beside the weights."""
    kept = {key: record[key] for key in ("format", "source", "hub", "revision", "parameters", "tensors", "facts",
                                         "ignored")}
    return kept if verify is None else {**kept, "release": verify, "checks": record["checks"]}


def _recipe(target: Path, source: Source, foreign: Foreign) -> Recipe:
    longest = foreign.facts.get(LONGEST, "")
    seq_len = int(longest) if longest.isdigit() and int(longest) > 0 else SEQ_LEN
    return validate(Recipe, {
        "name": target.resolve().name, "description": f"Converted from {source} ({foreign.format}).",
        "model": foreign.model.model_dump(exclude_none=True), **TRAINING,
        "train": {"seq_len": seq_len, **TRAINING["train"]}}, str(source))


def _renamed(recipe: Recipe, target: Path, source: Source) -> Recipe:
    """The recipe of a run of ours, for a run that has its weights alone."""
    return recipe.model_copy(update={"name": target.resolve().name, "description": f"The weights of {source}. "
                                     f"{recipe.description}"})


def _tokenizer(foreign: Foreign, folder: Path, given: str | Path | None) -> Tokenizer | None:
    """The tokenizer of the run: the one given, else the checkpoint's; None where there is none."""
    if str(given) == "none":
        return None
    if given is None and not foreign.tokenizer:
        if models := sorted(folder.glob("*.model")):
            raise CheckpointError(f"it is not clear which tokenizer is meant, {' or '.join(map(str, models))}; name "
                                  "one with --tokenizer, or --tokenizer none.")
        return None
    try:
        words = tokenizers.load(foreign.tokenizer[0] if given is None else given)
    except DataError as fault:
        raise DataError(f"{fault} Name another tokenizer with --tokenizer, or --tokenizer none.") from None
    if words.vocab_size > foreign.model.vocab_size:
        raise CheckpointError(f"the tokenizer has {words.vocab_size:,} tokens and the model "
                              f"{foreign.model.vocab_size:,}; it is that of another model. Name the right one with "
                              "--tokenizer, or --tokenizer none.")
    return words
