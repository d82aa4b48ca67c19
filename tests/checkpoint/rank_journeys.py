"""What each of four ranks does, one journey after another in one launch; test_store_ranks.py says what it must find."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_models import (
    CONFIG,
    EXTRA,
    adam,
    advance,
    built,
    contents,
    cut,
    differ,
    new_run,
    reloaded,
    stage,
    trained,
    whole,
    wrapped,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hinny.checkpoint import Saver, latest, load, load_model, read_meta, save, store, weights
from hinny.checkpoint.formats.foreign import Info
from hinny.errors import CheckpointError
from hinny.model import Model
from hinny.run import Run

LAYOUTS = ("fsdp", "hsdp", "fsdp x tp")


def journeys(folder: Path) -> dict[str, Any]:
    """What this rank found on each journey."""
    world = dist.new_group(backend="gloo")
    pair = dist.new_group([0, 1], backend="gloo")
    found: dict[str, Any] = {"resumed": _two_one_four(folder, pair, world), "stages": _stages(folder, world)}
    found["replicas"] = _replicas(folder, world)
    found["converted"] = _converted(folder, world)
    found["saver"] = _saver(folder, world)
    found |= _faults(folder, world)
    return found


def _two_one_four(folder: Path, pair: Any, world: Any) -> dict[str, list[str]]:
    """Two ranks save, one process goes on from there and saves, four ranks go on from there and save."""
    run, rank = new_run(folder / "run"), dist.get_rank()
    found: dict[str, list[str]] = {}
    two = cut(wrapped(built(0)), "fsdp", [0, 1]) if rank < 2 else None
    if rank >= 2:
        DeviceMesh("cpu", [0, 1])  # every rank takes part in making a mesh
    if two is not None:
        save(run, 2, *trained(two, 2), EXTRA, group=pair)
    dist.barrier()
    if rank == 0:
        model = built(1)
        optimizer = adam(model)
        meta = load(run, model, optimizer)
        found["one"] = differ(contents(model, optimizer), whole(0, 2))
        found["files"] = sorted(meta["files"])
        advance(model, optimizer)
        save(run, 3, model, optimizer, EXTRA)
    dist.barrier()
    for layout in LAYOUTS:
        model, optimizer = reloaded(run, layout, world)
        found[f"{layout}, loaded"] = differ(contents(model, optimizer), whole(0, 3))
        advance(model, optimizer)
        onward = new_run(folder / layout)
        save(onward, 4, model, optimizer, EXTRA, group=world)
        advance(model, optimizer)
        load(onward, model, optimizer, group=world)  # an optimiser with a state is filled too
        found[f"{layout}, loaded again"] = differ(contents(model, optimizer), whole(0, 4))
        if rank == 0:
            found[f"{layout}, one process"] = differ(contents(load_model(onward)), contents(trained(built(0), 4)[0]))
        dist.barrier()
    return found


def _stages(folder: Path, world: Any) -> dict[str, Any]:
    """Two pipeline stages of two FSDP ranks each, then four stages of one rank each."""
    run, rank = new_run(folder / "stages"), dist.get_rank()
    half = stage(built(0), rank // 2, 2)
    for ranks in ([0, 1], [2, 3]):
        mesh = DeviceMesh("cpu", ranks)
        if rank in ranks:
            fully_shard(half, mesh=mesh)
    save(run, 2, *trained(half, 2), EXTRA, group=world)
    quarter = stage(built(1), rank, 4)
    optimizer = adam(quarter)
    load(run, quarter, optimizer, group=world)
    found: dict[str, Any] = {"quarters": differ(contents(quarter, optimizer), whole(0, 2), part=True),
                             "names": list(contents(quarter))}
    lacking = stage(built(1), rank % 2, 4)
    found["lacking"] = _error(lambda: load(run, lacking, group=world))
    if rank == 0:
        found["one"] = differ(contents(load_model(run)), contents(trained(built(0), 2)[0]))
    dist.barrier()
    return found


def _replicas(folder: Path, world: Any) -> list[str]:
    """Plain tensors, the same on all ranks, are stored once."""
    run = new_run(folder / "replicas")
    model, optimizer = trained(built(0), 2)
    save(run, 2, model, optimizer, EXTRA, group=world)
    size = sum(file.stat().st_size for file in latest(run).glob("*.distcp"))
    numbers = sum(value.nbytes for value in contents(model, optimizer).values())
    other = built(1)
    filled = adam(other)
    load(run, other, filled, group=world)
    # a tensor's own header in the file takes about a kilobyte
    spare = 2048 * len(contents(model, optimizer))
    return differ(contents(other, filled), whole(0, 2)) + ([] if size < numbers + spare else [f"{size} bytes"])


def _converted(folder: Path, world: Any) -> dict[str, Any]:
    run, rank = new_run(folder / "converted"), dist.get_rank()
    values = {name: value.bfloat16() if value.ndim > 1 else value for name, value in contents(built(3)).items()}
    if rank == 0:
        infos = {name: Info(tuple(value.shape), value.dtype) for name, value in values.items()}
        weights.save(run, infos, values.__getitem__, EXTRA, shard_bytes=4000)
    dist.barrier()
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        model = cut(built(1), layout, [0, 1, 2, 3])
        load(run, model, group=world)
        found[layout] = differ(contents(model), {name: value.float() for name, value in values.items()})
    found["optimiser"] = _error(lambda: load(run, model, adam(model), group=world))
    wider = Model(CONFIG.model_copy(update={"vocab_size": 38}))
    found["wider"] = _error(lambda: load(run, cut(wider, "fsdp", [0, 1, 2, 3]), group=world))
    return found


def _saver(folder: Path, world: Any) -> dict[str, Any]:
    """Training goes on while the state of the moment before is written."""
    run = new_run(folder / "saver")
    model, optimizer = trained(cut(built(0), "fsdp x tp", [0, 1, 2, 3]), 2)
    found: dict[str, Any] = {}
    with Saver(run, world) as saver:
        found["at first"] = (saver.done, saver.poll(saver.done), saver.wait())
        for step in (2, 3):
            saver.start(step, model, optimizer, EXTRA)
            advance(model, optimizer)
            found[f"not agreed {step}"] = saver.poll(False)
            path = None
            while path is None:
                agreed = torch.tensor(int(saver.done))
                # the threads talk meanwhile, over a group of their own
                dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=world)
                path = saver.poll(bool(agreed))
            found[f"path {step}"] = path.name
            other, filled = reloaded(run, "fsdp x tp", world)
            found[f"saved {step}"] = differ(contents(other, filled), whole(0, step))
        saver.start(4, model, optimizer, EXTRA)
        saver.start(5, model, optimizer, EXTRA, keep=True)  # waits for 4
    dist.barrier()
    found["folders"] = [path.name for path in run.checkpoint_folders()]
    found["kept"] = read_meta(run)["kept"]
    return found


def _faults(folder: Path, world: Any) -> dict[str, Any]:
    """What each rank is told when a save or a file goes wrong on one of them, and what is loaded then."""
    run, rank = new_run(folder / "faults"), dist.get_rank()
    model, optimizer = trained(cut(built(0), "fsdp", [0, 1, 2, 3]), 2)
    save(run, 2, model, optimizer, EXTRA, group=world)
    advance(model, optimizer)
    found: dict[str, Any] = {}

    def asynchronous() -> None:
        with Saver(run, world) as saver:
            saver.start(4, model, optimizer, EXTRA)
            saver.poll(True)

    for way, act in (("now", lambda: save(run, 4, model, optimizer, EXTRA, group=world)), ("later", asynchronous)):
        with _no_room(rank == 1):
            found[f"full disk, {way}"] = _error(act)
        dist.barrier()
        found[f"left, {way}"] = [path.name for path in run.checkpoints.iterdir()]
        dist.barrier()
    found["unseen"] = _unseen(run, model, optimizer, world)
    save(run, 4, model, optimizer, EXTRA, group=world)
    found["damage"] = _damage(run, latest(run), world)
    return found


def _unseen(run: Run, model: Any, optimizer: Any, world: Any) -> str:
    """Rank 2's disk is its own: what it writes is not where rank 0 looks."""
    seconds, store.VISIBLE_SECONDS = store.VISIBLE_SECONDS, 0
    private = Run(run.path.with_name("private")) if dist.get_rank() == 2 else run
    said = _error(lambda: save(private, 4, model, optimizer, EXTRA, group=world))
    store.VISIBLE_SECONDS = seconds
    return said


def _damage(run: Run, folder: Path, world: Any) -> dict[str, Any]:
    """One file is changed by rank 0 and restored, for each kind of damage."""
    found: dict[str, Any] = {}
    shard = folder / "__1_0.distcp"
    cases: dict[str, tuple[Path, Callable[[bytes], bytes | None]]] = {
        "flipped": (shard, lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]), "cut": (shard, lambda b: b[:-40]),
        "gone": (shard, lambda b: None), "index": (folder / ".metadata", lambda b: b[:-1]),
        "meta": (folder / "meta.json", lambda b: None), "torn": (folder / "meta.json", lambda b: b[:-40])}
    for case, (file, change) in cases.items():
        content = file.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            changed = change(content)
            file.unlink() if changed is None else file.write_bytes(changed)
        dist.barrier()
        model = cut(built(1), "fsdp", [0, 1, 2, 3])
        found[case] = _error(lambda m=model: load(run, m, adam(m), group=world))  # type: ignore[misc]
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()
    model, optimizer = reloaded(run, "fsdp", world)
    found["restored"] = differ(contents(model, optimizer), whole(0, 3))
    load(run, model, optimizer, step=2, group=world)
    found["the one before"] = differ(contents(model, optimizer), whole(0, 2))
    return found


@contextmanager
def _no_room(here: bool) -> Iterator[None]:
    """Writing past a few bytes fails on this rank, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _error(act: Callable[[], Any]) -> str:
    """What the CheckpointError of `act` says; empty without one."""
    try:
        act()
    except CheckpointError as fault:
        return str(fault)
    return ""
