"""A study as a list of command lines: what runs, in which order, where it writes and when it counts as done.

This is the only place that knows the command line of `hinny`'s other verbs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hinny.config import Recipe
from hinny.study import text
from hinny.study.config import StudyConfig, load_extensions, named_sources
from hinny.study.done import asked, check_kept, checkpoint, extends, newer, recorded, trained
from hinny.study.longer import Extension, resolved
from hinny.study.tasks import Asking, askings, commas

GENERATE_FILE, TRAIN_FILE = "generate", "train"
"""Names in RUN/results of what `hinny bench generate` and `hinny bench train` write; an eval's is its task's."""

PROGRAM = (sys.executable, "-m", "hinny")


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
    longer, extended = [], defaultdict(list)
    for seed in config.seeds:
        for extension in load_extensions(config, recipes):
            run, recipe = layout.extended(extension, seed), resolved(extension)
            longer.append([_extend(config, extension, commands[extension.base.name], recipe, seed, layout),
                           *_evals(config, recipe, run, extension.folder(seed), layout)])
            waiting[layout.run(extension.base.name, seed)] += longer[-1][1:]
            extended[layout.run(extension.base.name, seed)].append(run)
    bases = [[_train(config, commands[name], recipe, seed, layout, waiting[layout.run(name, seed)],
                     extended[layout.run(name, seed)]),
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
           waiting: list[Job], extended: list[Path]) -> Job:
    """The training of a base; `command` names its recipe and overrides, `waiting` are jobs that read its checkpoint,
    and `extended` runs that go on from it.
    """
    run = layout.run(recipe.name, seed)
    source, *overrides = command
    argv = ("train", source, f"train.seed={seed}", *overrides,
            "--data", str(layout.data), "--out", str(run), "--threads", "1")
    name = f"train {recipe.name} s{seed}"

    def done() -> bool:
        spared = all(job.done() for job in waiting) and asked(config, run, config.eval.tasks)
        there = trained(run, recipe, layout.data, spared)
        if not there:
            check_kept(run, recipe, extended)
        return there

    return Job(name, argv, done, _log(layout, name), run, recipe.train.steps)


def _extend(config: StudyConfig, extension: Extension, command: list[str], recipe: Recipe, seed: int,
            layout: Layout) -> Job:
    run, (source, *overrides) = layout.extended(extension, seed), command
    argv = ("train", source, f"train.seed={seed}", *overrides, *extension.overrides,
            f"init.from={layout.run(extension.base.name, seed)}",
            "--data", str(layout.data), "--out", str(run), "--threads", "1")
    name = f"extend {extension.folder(seed)}"

    def done() -> bool:
        there = trained(run, recipe, layout.data, asked(config, run, config.eval.tasks))
        if there:
            extends(run, layout.run(extension.base.name, seed))
        return there

    return Job(name, argv, done, _log(layout, name), run, recipe.train.steps)


def _evals(config: StudyConfig, recipe: Recipe, run: Path, subject: str, layout: Layout) -> list[Job]:
    """Everything that the run is asked, a job for the tasks of one list of lengths."""
    return [_eval(config, asking, recipe, run, subject, layout) for asking in askings(config.eval)]


def _eval(config: StudyConfig, asking: Asking, recipe: Recipe, run: Path, subject: str, layout: Layout) -> Job:
    argv = ["eval", str(run), *asking.tasks, *(word for option in asking.options.items() for word in option),
            "--threads", "1"]
    name, last = " ".join(filter(None, ("eval", asking.part, subject))), checkpoint(run, recipe)

    def done() -> bool:
        made = last if last.exists() else run / "metrics.jsonl"
        finished = last.exists() or recorded(run) == recipe.train.steps
        return finished and newer([run / "results" / f"{task}.json" for task in asking.tasks], made) \
            and asked(config, run, asking.tasks)

    return Job(name, tuple(argv), done, _log(layout, name))


def _bench(config: StudyConfig, recipe: str, layout: Layout, cores: int) -> Iterator[Job]:
    """Timings of one recipe on its first seed's run: speed does not depend on the seed."""
    assert config.bench
    run = layout.run(recipe, config.seeds[0])
    verbs = {GENERATE_FILE: ["generate", "--run", str(run), "--contexts", commas(config.bench.contexts)],
             TRAIN_FILE: ["train", "--recipe", str(run / "recipe.toml"), "--steps", str(config.bench.train_steps),
                          "--data", str(layout.data), "--save", str(run)]}
    for file, (what, *options) in verbs.items():
        name = f"bench {what} {recipe}"
        argv = ("bench", what, *options, "--threads", str(cores))
        yield Job(name, argv, (run / "results" / f"{file}.json").is_file, _log(layout, name))


def _log(layout: Layout, name: str) -> Path:
    return layout.logs / f"{name.replace(' ', '-')}.log"
