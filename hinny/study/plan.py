"""A study as a list of command lines: what runs, in which order, where it writes and when it counts as done.

This is the only place that knows the command line of `hinny`'s other verbs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hinny.config import Recipe, read_toml
from hinny.errors import ConfigError, RunError
from hinny.run import Run, write_atomically
from hinny.study import text
from hinny.study.config import StudyConfig, flatten, load_extensions, named_sources
from hinny.study.longer import Extension, resolved
from hinny.study.tasks import Asking, asked_anew, askings, commas, is_asked

GENERATE_FILE, TRAIN_FILE = "generate", "train"
"""Names in RUN/results of what `hinny bench generate` and `hinny bench train` write; an eval's is its task's."""

PROGRAM = (sys.executable, "-m", "hinny")
NO_MATTER = ("jobs", "description", "prepare.workers")
"""Keys that no figure depends on."""
MAY_GROW = ("seeds", "extend", "vary")
"""Lists to which a later start in the same folder may add: what is there keeps its place and its figures."""


@dataclass(frozen=True)
class Job:
    """One command line, and a test whether what it writes is there already."""

    name: str
    argv: tuple[str, ...]
    done: Callable[[], bool]
    log: Path
    run: Path | None = None
    """A training's run directory, whose metrics show its progress."""
    steps: int = 0
    always: bool = False
    """Run at every start: the command itself finds what it wrote before, or refuses what is of something else."""

    @property
    def command(self) -> list[str]:
        """The command as a process: this interpreter, this hinny."""
        return [*PROGRAM, *self.argv]


@dataclass(frozen=True)
class Stage:
    """Chains of jobs: `jobs` chains at a time, the jobs of a chain one after the other."""

    chains: list[list[Job]]
    jobs: int


@dataclass(frozen=True)
class Layout:
    """Where everything of a study lies."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def resolved(self) -> Path:
        return self.root / "study.toml"

    def run(self, recipe: str, seed: int) -> Path:
        return self.root / "runs" / f"{recipe}-s{seed}"

    def extended(self, extension: Extension, seed: int) -> Path:
        return self.root / "runs" / extension.folder(seed)

    def recipe(self, name: str) -> Path:
        return self.root / "recipes" / f"{name}.toml"


def stages(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout, cores: int) -> list[Stage]:
    """Everything to run: data, then training and evaluation side by side, then extensions, then timings one at a
    time."""
    jobs = config.jobs or cores
    sources = named_sources(config, recipes)
    commands = {name: ([sources[name], *config.recipe_overrides] if name in sources else [str(layout.recipe(name))])
                for name in recipes}
    timings = [job for name in recipes for job in _bench(config, name, layout, cores)] if config.bench else []
    waiting: dict[Path, list[Job]] = defaultdict(list)
    for job in timings:
        waiting[layout.run(job.name.split()[-1], config.seeds[0])].append(job)
    longer = []
    for seed in config.seeds:
        for extension in load_extensions(config, recipes):
            run, recipe = layout.extended(extension, seed), resolved(extension)
            longer.append([_extend(config, extension, commands[extension.base.name], recipe, seed, layout),
                           *_evals(config, recipe, run, extension.folder(seed), layout)])
            waiting[layout.run(extension.base.name, seed)] += longer[-1][1:]
    bases = [[_train(config, commands[name], recipe, seed, layout, waiting[layout.run(name, seed)]),
              *_evals(config, recipe, layout.run(name, seed), f"{name} s{seed}", layout)]
             for seed in config.seeds for name, recipe in recipes.items()]
    plan = [Stage([[_prepare(config, recipes, layout)]], 1), Stage(bases, jobs)]
    return plan + [Stage(chains, n) for chains, n in ((longer, jobs), ([timings], 1)) if any(chains)]


def _prepare(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout) -> Job:
    (vocab_size,) = {recipe.model.vocab_size for recipe in recipes.values()}
    argv = text.command(config.prepare, layout.data, vocab_size,
                        recall_words=any(recipe.data.synthetic for recipe in recipes.values()))
    # always: only reading the text tells whether it is still the one that the data folder was made from
    return Job("prepare", tuple(argv), (layout.data / "data.json").is_file, layout.logs / "prepare.log", always=True)


def _train(config: StudyConfig, command: list[str], recipe: Recipe, seed: int, layout: Layout,
           waiting: list[Job]) -> Job:
    """The training of a base; `command` names its recipe and overrides, `waiting` are jobs that read its checkpoint."""
    run = layout.run(recipe.name, seed)
    source, *overrides = command
    argv = ("train", source, f"train.seed={seed}", *overrides,
            "--data", str(layout.data), "--out", str(run), "--threads", "1")
    name = f"train {recipe.name} s{seed}"

    def done() -> bool:
        spared = all(job.done() for job in waiting) and _asked(config, run, config.eval.tasks)
        return _trained(run, recipe, layout.data, spared)

    return Job(name, argv, done, _log(layout, name), run, recipe.train.steps)


def _extend(config: StudyConfig, extension: Extension, command: list[str], recipe: Recipe, seed: int,
            layout: Layout) -> Job:
    run, (source, *overrides) = layout.extended(extension, seed), command
    argv = ("train", source, f"train.seed={seed}", *overrides, *extension.overrides,
            f"init.from={layout.run(extension.base.name, seed)}",
            "--data", str(layout.data), "--out", str(run), "--threads", "1")
    name = f"extend {extension.folder(seed)}"

    def done() -> bool:
        return _trained(run, recipe, layout.data, _asked(config, run, config.eval.tasks))

    return Job(name, argv, done, _log(layout, name), run, recipe.train.steps)


def _trained(run: Path, recipe: Recipe, data: Path, spared: bool) -> bool:
    """Whether the training is done: its last checkpoint is there, or nothing needs it any more (`spared`) and its
    records go to the last step. RunError if it was done on other data than the folder `data` holds now.
    """
    if not checkpoint(run, recipe).is_dir() and not (spared and _recorded(run) == recipe.train.steps):
        return False
    prints = [json.loads(file.read_text())["fingerprint"] for folder in (run, data)
              if (file := folder / "data.json").is_file()]
    if len(set(prints)) > 1:
        raise RunError(f"{run} was trained on other data than {data} holds now ({prints[0][:12]}, {prints[1][:12]}). "
                       "Choose another folder with --out, or prepare the old text again.")
    return True


def _recorded(run: Path) -> int:
    """The last step of which the run has a record; 0 without one."""
    return max((record["step"] for record in Run(run).metrics()), default=0)


def checkpoint(run: Path, recipe: Recipe) -> Path:
    """The checkpoint of the last step; checkpoints are whole or absent, so it tells a finished training."""
    return run / "checkpoints" / f"step-{recipe.train.steps:08d}"


def _evals(config: StudyConfig, recipe: Recipe, run: Path, subject: str, layout: Layout) -> list[Job]:
    """Everything that the run is asked, a job for the tasks of one list of lengths."""
    return [_eval(config, asking, recipe, run, subject, layout) for asking in askings(config.eval)]


def _eval(config: StudyConfig, asking: Asking, recipe: Recipe, run: Path, subject: str, layout: Layout) -> Job:
    argv = ["eval", str(run), *asking.tasks, *(word for option in asking.options.items() for word in option),
            "--threads", "1"]
    name, last = " ".join(filter(None, ("eval", asking.part, subject))), checkpoint(run, recipe)

    def done() -> bool:
        made = last if last.exists() else run / "metrics.jsonl"
        finished = last.exists() or _recorded(run) == recipe.train.steps
        return finished and newer([run / "results" / f"{task}.json" for task in asking.tasks], made) \
            and _asked(config, run, asking.tasks)

    return Job(name, tuple(argv), done, _log(layout, name))


def _asked(config: StudyConfig, run: Path, tasks: Iterable[str]) -> bool:
    """Whether the results in force are those of the study's own sizes, not of an evaluation by hand since."""
    records = {task: run / "evals" / f"{task}.json" for task in tasks}
    return all(file.is_file() and is_asked(config.eval, task, json.loads(file.read_text(encoding="utf-8")))
               for task, file in records.items())


def _bench(config: StudyConfig, recipe: str, layout: Layout, cores: int) -> Iterator[Job]:
    """Timings of one recipe on its first seed's run: speed does not depend on the seed."""
    assert config.bench
    run = layout.run(recipe, config.seeds[0])
    verbs = {GENERATE_FILE: ["generate", "--run", str(run), "--contexts", commas(config.bench.contexts)],
             TRAIN_FILE: ["train", "--recipe", str(run / "recipe.toml"), "--steps", str(config.bench.train_steps),
                          "--save", str(run)]}
    for file, (what, *options) in verbs.items():
        name = f"bench {what} {recipe}"
        argv = ("bench", what, *options, "--threads", str(cores))
        yield Job(name, argv, (run / "results" / f"{file}.json").is_file, _log(layout, name))


def _log(layout: Layout, name: str) -> Path:
    return layout.logs / f"{name.replace(' ', '-')}.log"


def newer(files: list[Path], than: Path) -> bool:
    """Whether all `files` exist and none is older than `than`."""
    return than.exists() and all(f.is_file() and f.stat().st_mtime >= than.stat().st_mtime for f in files)


def claim_folder(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout) -> None:
    """Write the resolved study and recipes, or check them against those of an earlier start in the same folder.

    The resolved study names its recipes by their names, as the files in recipes/ are, not by where they came from.
    Raises ConfigError that names what changed: runs of another study or recipe are never mixed with new ones.
    Raises RunError where the folder cannot be read or written.
    """
    try:
        _claim(config, recipes, layout)
    except OSError as fault:
        raise RunError(f"{layout.root} cannot be used as a study's folder: {fault.strerror}. "
                       "Choose another with --out.") from None


def _claim(config: StudyConfig, recipes: dict[str, Recipe], layout: Layout) -> None:
    wanted = {layout.resolved: _plain(config.model_dump() | {"recipes": list(recipes)[:len(config.recipes)]})}
    wanted |= {layout.recipe(name): _plain(recipe.model_dump()) for name, recipe in recipes.items()}
    for path, table in wanted.items():
        if path.is_file() and (changed := _changes(_grown(read_toml(path), table), table)):
            raise ConfigError(f"{path} is of an earlier start and differs: {'; '.join(changed)}. "
                              "Its runs cannot be reused: choose another folder with --out, or undo the change.")
    if strangers := [p.stem for p in layout.recipe("x").parent.glob("*.toml") if p.stem not in recipes]:
        raise ConfigError(f"{layout.root} holds runs of {strangers[0]}, which this study does not name; "
                          "choose another folder with --out.")
    for path, table in wanted.items():
        write_atomically(path, tomli_w.dumps(table))


def _grown(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the lists of `new` where those only have more in them, and with the tasks that may change."""
    more = {key: new[key] for key in MAY_GROW
            if key in new and all(item in new[key] for item in old.get(key, []))}
    if "extend" in more and not old.get("extend"):
        more |= {key: new[key] for key in ("extension",) if key in new}
    if "eval" in old and "eval" in new:
        more["eval"] = asked_anew(old["eval"], new["eval"])
    return {**old, **more}


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """The table as TOML keeps it: without None."""
    plain: dict[str, Any] = json.loads(json.dumps(_without_none(table)))
    return plain


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(child) for key, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_without_none(child) for child in value]
    return value


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    keys = [key for key in dict.fromkeys([*before, *after])
            if key not in NO_MATTER and before.get(key) != after.get(key)]
    return [f"{key} was {before.get(key, 'not set')!r} and is now {after.get(key, 'not set')!r}" for key in keys]
