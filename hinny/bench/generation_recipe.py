"""Generation of a recipe's model with random weights, timed: decoding beside the floor that memory sets, prompts, and
whole answers, over batches and contexts in one process, or in as many as the model is cut over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from hinny.bench.clock import in_turn, median_range
from hinny.bench.evaluation import random_model
from hinny.bench.generation_engine import Ours
from hinny.bench.generation_peer import PEERS, Transformers
from hinny.bench.generation_points import Sweep, Where
from hinny.bench.gpu_clock import measure_roofs
from hinny.bench.kernel_table import read_rows
from hinny.config import Recipe, load_recipe
from hinny.errors import ConfigError
from hinny.infer.sums import Sums
from hinny.infer.tensor import random_model as random_part
from hinny.memory.quantised import KINDS, Kind
from hinny.train.processes import joined

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

COPIED = 2 ** 27
"""Bytes of the buffer whose copy tells a CPU's rate: more than its caches hold."""


def bench_recipe(recipe: str, *, contexts: Sequence[int] = (), batches: Sequence[int] = (1,), tokens: int = 16,
                 prefill: Sequence[int] = (), prompts: Sequence[int] = (), piece: int = 2048, tensor: int = 1,
                 precision: str | None = None, state_dtype: str = "fp32", against: str | None = None,
                 peer_context: int | None = None, overrides: Sequence[str] = (), save: Path | None = None,
                 ) -> list[dict[str, Any]]:
    """Rows of a recipe's model with random weights; the smallest points come first, and are saved as they are found.

    contexts   of decode points, at each of `batches`: median over `tokens` steps through the engine's runner, its pages
               and states filled with random numbers; bound: the floor, bytes by hinny.predict over the rate at which
               memory was found to move here; beside it the prediction and the most memory held
    prompts    of points of whole answers, at each of `batches`: requests of so many tokens, and `tokens` for each
    prefill    lengths of one prompt that is read in pieces of `piece` tokens
    tensor     processes that the model is cut over: as many as torchrun started
    precision  fp32 or bf16, of weights and keys, bf16 on a GPU; int8, fp8 or int4 of the layers' projections beside
               bf16 of the rest (hinny.infer.quantise); state_dtype: fp32, bf16 or fp16, of the SSM states
    against    "transformers" or "transformers-static": its generate() over the same weights at the same decode points,
               with its default or its static cache; peer_context: the context that the peer is timed at, where its own
               reading of the prompt would take too long
    save       a JSON file: rows take the place of the same figures in it; points of this commit in it are kept
    """
    if not (contexts or prompts or prefill):
        raise ConfigError("nothing to time: give contexts, prompts or prefill.")
    sizes = {"contexts": contexts, "batches": batches, "prompts": prompts, "prefill": prefill, "tokens": [tokens],
             "piece": [piece], "tensor": [tensor], "peer_context": [] if peer_context is None else [peer_context]}
    for name, values in sizes.items():
        if min(values, default=1) < 1:
            raise ConfigError(f"{name} is {min(values)}; it must be 1 or more.")
    _check(contexts, tensor, precision, state_dtype, against, peer_context)
    loaded = load_recipe(recipe, overrides)
    named = loaded.model_copy(update={"name": " ".join([loaded.name, *overrides])})
    if save is not None:
        read_rows(save)  # refused now, and not when all is timed
    with joined() as device:
        precision = precision or ("bf16" if device.type == "cuda" else "fp32")
        if precision not in ("fp32", "bf16", *KINDS):
            raise ConfigError(f"precision is {precision!r}; it must be fp32, bf16, {', '.join(KINDS)}.")
        where = _where(device, tensor)
        ours, peer = _sides(named, device, precision, state_dtype, piece, tensor, against, peer_context)
        sweep = Sweep(named, ours, where, precision=precision, state=state_dtype, tokens=tokens, piece=piece, peer=peer,
                      save=save)
        for context, rows in sorted(((c, b) for c in contexts for b in batches), key=lambda p: p[0] * p[1]):
            sweep.decode(rows, context)
        for length in sorted(prefill):
            sweep.prefill(length)
        for length in sorted(prompts):
            for rows in sorted(batches):
                sweep.answer(length, rows)
    return sweep.made if where.first else []


def _check(contexts: Sequence[int], tensor: int, precision: str | None, state_dtype: str, against: str | None,
           peer_context: int | None) -> None:
    """ConfigError for options that do not go together or are not known."""
    if against not in (None, *PEERS):
        raise ConfigError(f"against is {against!r}; known: {', '.join(PEERS)}.")
    if (against or peer_context) and not (contexts and against):
        raise ConfigError("against and peer_context are of decode points: give contexts, and whom it is against.")
    if against and precision in KINDS:
        raise ConfigError(f"against is timed with whole weights; drop it, or precision {precision}.")
    if against and tensor > 1:
        raise ConfigError("against is timed on one GPU; drop it, or tensor.")
    if state_dtype not in TYPES:
        raise ConfigError(f"state_dtype is {state_dtype!r}; it must be fp32, bf16 or fp16.")


def _sides(recipe: Recipe, device: torch.device, precision: str, state: str, piece: int, tensor: int,
           against: str | None, peer_context: int | None) -> tuple[Ours, Transformers | None]:
    width: Literal["fp32", "bf16"] = "fp32" if precision == "fp32" else "bf16"
    kind = cast(Kind, precision) if precision in KINDS else None
    if tensor > 1:
        sums = Sums(_world(), device)
        part = random_part(recipe.model, sums, bf16=width == "bf16")
        return Ours(part, state=TYPES[state], piece=piece, sums=sums, kind=kind), None
    model = random_model(recipe, device, width)
    # before the weights are packed
    peer = None if against is None else Transformers(model, static=against.endswith("static"), at=peer_context)
    ours = Ours(model, state=TYPES[state], piece=piece, kind=kind)
    if peer is not None:
        peer.check(ours)
    return ours, peer


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _where(device: torch.device, tensor: int) -> Where:
    """The machine, with its rate of memory measured."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if tensor != processes:
        raise ConfigError(f"tensor is {tensor}, but there are {processes} processes; start as many: torchrun "
                          f"--nproc-per-node {tensor} -m hinny bench generate ...")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if device.type != "cuda":
        return Where(device, None, tensor, _copy_rate(), first, None)
    # graphs cannot be captured on the default stream
    with torch.cuda.stream(torch.cuda.Stream(device)):
        rate = measure_roofs(device).bytes_per_s
    torch.cuda.empty_cache()
    return Where(device, torch.cuda.get_device_name(device), tensor, rate, first, torch.cuda.mem_get_info(device)[1])


def _copy_rate() -> float:
    """Bytes/s that a copy on the CPU reads and writes."""
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    (seconds,) = in_turn([lambda: target.copy_(source)], repeats=5)
    return 2 * COPIED / median_range(seconds)[0]
