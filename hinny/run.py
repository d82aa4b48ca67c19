"""A run directory: everything that a figure of this run depends on, in files a person can read. No torch.

    recipe.toml     the resolved recipe             metrics.jsonl    loss and speed by step, one consistent run
    env.json        versions, machine, command …    results/*.json   rows of evals and benches
    checkpoints/    hinny.checkpoint.store          tokenizer.*, data.json   copied from the data folder

Rows are the one schema of every result: see `row`.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hinny import __version__
from hinny.config import Recipe, read_toml, to_toml, validate
from hinny.errors import RunError

PACKAGE = Path(__file__).parent


def weights_print(meta: dict[str, Any]) -> str:
    """What tells the weights of a checkpoint, by its meta.json, from all others: the sha256 of its files' sums."""
    return hashlib.sha256(json.dumps(meta["files"], sort_keys=True).encode()).hexdigest()


class Run:
    """The run directory at `path`; nothing is read or written until it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, `step-00000100` and so on."""
        return self.path / "checkpoints"

    @property
    def text_home(self) -> Path:
        """Where data.json of the text lies that evaluations read: with the run, unless it is asked about another's."""
        return self.path

    def checkpoint_folders(self) -> list[Path]:
        """Folders of the checkpoints, oldest first. A folder has its name only when its checkpoint is whole."""
        found = [entry for entry in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", entry.name)]
        return sorted(found, key=_step_of)

    @property
    def steps_done(self) -> int:
        """Steps behind the newest checkpoint; 0 without one."""
        return max(map(_step_of, self.checkpoint_folders()), default=0)

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint is that of the recipe's last step."""
        return self.steps_done >= self.recipe.train.steps

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe. Raises RunError where there is no run."""
        file = self.path / "recipe.toml"
        if not file.exists():
            raise RunError(f"{self.path} is not a run directory: it has no recipe.toml. "
                           "Give the directory that `hinny train` wrote.")
        return validate(Recipe, read_toml(file), str(file))

    def write_recipe(self, recipe: Recipe) -> None:
        """Create the directory if needed and write the resolved recipe."""
        write_atomically(self.path / "recipe.toml", to_toml(recipe))

    @property
    def env(self) -> dict[str, Any]:
        """What the latest session of this run was made with; `earlier` lists the sessions before it."""
        return self._read_json(self.path / "env.json")

    def write_env(self, env: dict[str, Any], *, resumed: bool) -> None:
        """Write env.json; a resumed run keeps what its earlier sessions were made with."""
        earlier = []
        if resumed and (self.path / "env.json").exists():
            last = self.env
            earlier = [*last.pop("earlier"), last]
        write_atomically(self.path / "env.json", json.dumps({**env, "earlier": earlier}, indent=1) + "\n")

    def adopt(self, *files: Path, name: str | None = None) -> None:
        """Copy files that the run needs, its tokenizer for instance, so that it can be used without their folder.

        name: what a single file is called in the run; its own name without it.
        """
        for file in files:
            try:
                shutil.copyfile(file, self.path / (name or file.name))
            except OSError as fault:
                raise RunError(f"{file} cannot be copied to {self.path}: {fault.strerror}.") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this run directory for one process. Raises RunError, with the holder's pid, if it is in use."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as fault:
            raise RunError(f"{self.path} cannot be used as a run directory: {fault.strerror}.") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 32, 0).decode().strip() or "unknown"
                raise RunError(f"{self.path} is in use by another process (pid {holder}). "
                               "Wait for it, stop it, or use another run directory.") from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    @property
    def holder(self) -> str | None:
        """The pid of the process that holds this run directory, as far as this machine knows; None if none does."""
        if not (file := self.path / ".lock").is_file():
            return None
        with open(file, "rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle.read(32).decode().strip() or "unknown"
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl in one write, so that a killed process tears at most its last line."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as fault:
            raise RunError(f"{self.path / 'metrics.jsonl'} cannot be written: {fault.strerror}.") from None

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order. A torn last line is dropped; any other bad line is a RunError."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        *lines, _torn = file.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise RunError(f"{file}, line {number}: not a JSON record: {line[:60]!r}. "
                               "The file was changed by something else; restore it or delete that line.") from None
        return records

    def keep_metrics(self, step: int) -> None:
        """Drop the records past `step`, and a torn line, so that what follows continues one consistent run."""
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(kept))

    def save_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        """Write result rows as results/{name}.json, in place of what stood there; returns the file."""
        file = self.path / "results" / f"{name}.json"
        write_atomically(file, json.dumps(list(rows), indent=1, allow_nan=False) + "\n")
        return file

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """The rows of results/{name}.json, or of all results in the order of their names."""
        folder = self.path / "results"
        if name is None:
            return [row for file in sorted(folder.glob("*.json")) for row in self._read_json(file)]
        if not (folder / f"{name}.json").exists():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none yet"
            raise RunError(f"{self.path} has no results {name!r}; it has: {known}.")
        return self._read_json(folder / f"{name}.json")

    @staticmethod
    def _read_json(file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except OSError as fault:
            raise RunError(f"{file} cannot be read: {fault.strerror}.") from None
        except ValueError as fault:
            raise RunError(f"{file} is not JSON: {fault}.") from None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` by `text`, or leave it as it was; RunError names what the system refused."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as fault:
        raise RunError(f"{file} cannot be written: {fault.strerror}.") from None


def row(what: str, variant: str, value: float, unit: str, *, shape: str = "", low: float | None = None,
        high: float | None = None, bound: float | None = None, peer: str | None = None,
        peer_value: float | None = None, ratio: float | None = None, command: str | None = None,
        device: str | None = None) -> dict[str, Any]:
    """One figure, with what made it.

    `what` is measured on `variant` (a recipe's name) at `shape` ("key=value …"); `low` and `high` bound its spread,
    `bound` is the best possible, `ratio` says how many times better than `peer_value` of `peer` it is. `device` names
    an accelerator; command, commit and machine are filled in here.
    """
    return {"what": what, "variant": variant, "shape": shape, "value": value, "unit": unit, "low": low, "high": high,
            "bound": bound, "peer": peer, "peer_value": peer_value, "ratio": ratio,
            "command": command or command_line(), "commit": commit(), "machine": machine(device)}


def environment(*, device: str, seed: int, threads: int, data_fingerprint: str, accelerator: str | None = None,
                ) -> dict[str, Any]:
    """What env.json says of one session; `accelerator` is the name of the GPU if one is used."""
    packages = {name: _version(name) for name in ("torch", "numpy", "tokenizers")}
    versions = {"hinny": __version__, "python": platform.python_version(), **packages}
    return {"versions": versions, "device": device, "seed": seed,
            "threads": threads, "data_fingerprint": data_fingerprint, "command": command_line(), "commit": commit(),
            "machine": machine(accelerator)}


def command_line() -> str:
    """This process's command as a shell line, without the folder that the program lies in."""
    program = Path(sys.argv[0])
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name or "python"]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and program.name == "__main__.py":
        ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        start = ["torchrun", "--nproc-per-node", ranks, *start[1:]]
    return shlex.join([*start, *sys.argv[1:]])


@functools.cache
def commit() -> str:
    """The commit of hinny's checkout, `+changes` if its code or recipes differ from it; outside git, the version.

    $HINNY_COMMIT, where it is set, is taken instead: for a copy of a checkout that was sent to another machine.
    """
    if told := os.environ.get("HINNY_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        line = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    try:
        # an installed hinny may lie inside somebody else's repository
        git("ls-files", "--error-unmatch", "errors.py")
        changed = git("status", "--porcelain", "--", ".", "../recipes", "../studies")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__


@functools.cache
def machine(device: str | None = None) -> str:
    """The machine in words: processor, usable cores, memory, `device` if given, Python and torch. Never its name."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{cores} core{'s' if cores != 1 else ''}", f"{memory:.0f} GiB",
             *([device] if device else []), f"Python {platform.python_version()}", f"torch {_version('torch')}"]
    return ", ".join(parts)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
