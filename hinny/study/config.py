"""The sections of a study: which recipes, seeds, measurements and predictions make one comparison."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from hinny.config import Recipe, Section, apply_override, find, load_recipe, read_toml, validate
from hinny.errors import ConfigError
from hinny.study import tasks as asked
from hinny.study.longer import ExtendConfig, Extension, ExtensionConfig, extensions, flatten, resolved
from hinny.study.match import FitConfig, FittedConfig, Measure, check_matched, fitted, measured
from hinny.study.text import PrepareConfig
from hinny.study.vary import Variant, VaryConfig, variants

Positive = Annotated[int, Field(gt=0)]
Lengths = Annotated[list[Positive], Field(min_length=1)]
SHARED = ("data", "optim", "train")
"""Sections of a recipe that a fair comparison keeps equal."""
ALWAYS_DIFFER = ("train.seed", "data.path")
"""Keys that the study itself sets, one run at a time."""


class EvalConfig(Section):
    """What every trained model is asked."""

    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(asked.known)]
    """Names of `hinny eval --list`; those that a study may ask are in hinny.study.tasks."""
    samples: Positive
    """Questions at each length, form or number of pairs."""
    lengths: Lengths
    """Lengths of the whole prompt of Phonebook, copying and the synthetic tasks, of windows (window-loss), and the
    longest of sequences (position-joined), tokens."""
    pairs: Lengths
    """Numbers of key-value pairs of multi-query recall (mqar)."""
    windows: Positive
    """Held-out windows of the training length."""
    ruler_lengths: Lengths | None = None
    """Lengths of prompt and answer of RULER's tasks, tokens."""
    max_length: Positive | None = None
    """Tokens that a sample of RULER, multiple choice or the synthetic tasks may take; without it, of a model with
    rotary positions, those of its training."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        asked.check_keys(self)
        return self


class BenchConfig(Section):
    """Timings, taken one at a time when all training is done."""

    contexts: Lengths
    """Tokens in the prompt for prefill and decode."""
    train_steps: Positive


class PredictConfig(Section):
    """Models too large for this machine, predicted on named hardware."""

    recipes: Annotated[list[str], Field(min_length=1)]
    hardware: Annotated[list[str], Field(min_length=1)]
    contexts: Lengths
    batch: Positive
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Assumed share of the peak rate that prefill reaches; 0.3 is what `hinny show` assumes, too."""


class StudyConfig(Section):
    """All that defines a study. `name` is the study file's name and the default folder's."""

    name: str
    description: str
    recipes: list[str] = Field(default_factory=list)
    """Names of shipped recipes, or paths of recipe files."""
    vary: list[VaryConfig] = Field(default_factory=list)
    """Models besides: recipes changed step by step."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    match_tolerance: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Largest difference within a group of models of what is matched, as a share of the smallest."""
    match_by: Measure = "parameters"
    """What is equal: non-embedding parameters, training FLOPs a token, or the bytes that a sequence carries."""
    match_context: Positive | None = None
    """Tokens of that sequence; only with match_by = "state"."""
    fit: list[FittedConfig] = Field(default_factory=list)
    """Keys that the study chooses in some recipes, so that they match the first one."""
    may_differ: list[str] = Field(default_factory=list)
    """Keys of data, optim and train in which recipes may differ, such as optim.lr; the report lists them."""
    jobs: Positive | None = None
    """Trainings at a time, one thread each: on each GPU, one by default; without GPUs in all, by default one a core."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys set in every recipe, for instance train.steps."""
    extension: ExtensionConfig | None = None
    extend: list[ExtendConfig] = Field(default_factory=list)
    """Methods by which trained models are extended to longer sequences; each is asked what its base was asked."""
    prepare: PrepareConfig
    eval: EvalConfig
    bench: BenchConfig | None = None
    predict: PredictConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if not self.recipes and not self.vary:
            raise ValueError("recipes is empty and there is no [[vary]]: name at least one model.")
        if (self.match_by == "state") != (self.match_context is not None):
            raise ValueError('match_context and match_by = "state" belong together: a cache grows with the context.')
        for key, values in (("recipes", self.recipes), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names the same one twice: {', '.join(map(str, values))}.")
        axes: dict[str, str] = {}
        for entry in self.vary:
            if entry.plot is not None and axes.setdefault(entry.plot, entry.x) != entry.x:
                raise ValueError(f"vary {entry.name!r}: x is {entry.x!r}, and {axes[entry.plot]!r} in another entry of "
                                 f"the plot {entry.plot!r}, which has one axis; make them equal, or name another plot.")
        if any(key in ALWAYS_DIFFER for key in flatten(self.overrides)):
            raise ValueError(f"overrides may not set {' or '.join(ALWAYS_DIFFER)}: the study sets them for each run.")
        if self.extension is not None and not self.extend:
            raise ValueError("[extension] has no effect without [[extend]]; remove it, or name a method.")
        if self.extend and "window-loss" not in self.eval.tasks:
            raise ValueError('[[extend]] needs the task "window-loss" in eval.tasks, by which what is gained and lost '
                             "is judged; add it.")
        odd = [n for n in self.eval.lengths if max(self.eval.lengths) % n]
        if odd and "window-loss" in self.eval.tasks:
            raise ValueError(f"eval.lengths has {odd[0]}, which does not divide {max(self.eval.lengths)}, the longest: "
                             "windows of both (window-loss) cannot cover the same text. Choose lengths that do.")
        return self

    @property
    def recipe_overrides(self) -> list[str]:
        """The overrides as `key=value` items of a command line."""
        return [f"{key}={_toml_value(value)}" for key, value in flatten(self.overrides).items()]


def _toml_value(value: Any) -> str:
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def load_study(source: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """The study in file `source`, or the shipped one of that name, changed by `key=value` overrides of the study."""
    path = find("studies", source)
    data = {"name": path.stem, **read_toml(path)}
    for item in overrides:
        apply_override(data, item)
    return validate(StudyConfig, data, path.name)


def load_recipes(config: StudyConfig) -> dict[str, Recipe]:
    """The study's recipes with its overrides, then its variants, by name. Raises ConfigError unless they can be
    compared fairly.
    """
    recipes: dict[str, Recipe] = {}
    sources: dict[str, str] = {}
    for source in config.recipes:
        recipe = load_recipe(source, config.recipe_overrides)
        if recipe.name in sources:
            raise ConfigError(f"{sources[recipe.name]} and {source} are both recipes of the name {recipe.name!r}, "
                              "under which the study keeps their runs; give one of them another `name`.")
        recipes[recipe.name], sources[recipe.name] = recipe, source
    groups = {"": recipes.copy()}
    for name, (source, fit) in _fits(config, sources).items():
        groups[""][name] = recipes[name] = _fit(config, groups[""], name, source, [], fit)
    idle = {entry.name: entry for entry in config.vary if entry.fit is not None}
    for one in variants(config.vary):
        if one.name in recipes:
            raise ConfigError(f"the variant {one.name} has the name of a recipe of the study; give [[vary]] another.")
        group = groups.setdefault(one.group, {})
        if group:
            idle.pop(one.vary.name, None)
        group[one.name] = recipes[one.name] = _variant(config, one, group)
    _check_values(config.vary, recipes)
    if idle:
        raise ConfigError(f"vary {next(iter(idle))!r}: fit has no effect, since each of its models is the first of its "
                          "group, to which others are fitted. Remove it, or put another model first.")
    for entry in config.vary:
        if unknown := [name for name in entry.also if name not in recipes]:
            raise ConfigError(f"vary {entry.name!r}: also names {unknown[0]}, which the study does not have; it has "
                              f"{', '.join(recipes)}.")
    _check_vocabulary(recipes)
    for group in groups.values():
        if group:
            check_matched(group, config.match_by, config.match_context, config.match_tolerance)
    _check_alike(recipes, config.may_differ)
    for recipe in recipes.values():
        asked.check_lengths(config.eval, recipe)
    return recipes


def _fits(config: StudyConfig, sources: dict[str, str]) -> dict[str, tuple[str, FittedConfig]]:
    """Name of a recipe that is fitted → its source, and the key."""
    found: dict[str, tuple[str, FittedConfig]] = {}
    for fit in config.fit:
        for name in fit.recipes:
            if name not in sources:
                raise ConfigError(f"fit.recipes names {name!r}, which the study does not; it has {', '.join(sources)}.")
            if name in found:
                raise ConfigError(f"two [[fit]] name {name}: one key of a recipe can be chosen; remove one of them.")
            if name == next(iter(sources)):
                raise ConfigError(f"fit.recipes names {name}, the first recipe of the study, which the others are "
                                  "fitted to; remove it, or put another one first.")
            found[name] = sources[name], fit
    return found


def _variant(config: StudyConfig, one: Variant, group: dict[str, Recipe]) -> Recipe:
    overrides = [*one.overrides, f"name={one.name}"]
    if one.vary.fit is None or not group:
        return load_recipe(one.vary.recipe, [*config.recipe_overrides, *overrides])
    return _fit(config, group, one.name, one.vary.recipe, overrides, one.vary.fit)


def _fit(config: StudyConfig, group: dict[str, Recipe], name: str, source: str, overrides: list[str],
         fit: FitConfig) -> Recipe:
    """The recipe with the value of a key that brings it nearest to the first of the group."""
    def make(more: list[str]) -> Recipe:
        return load_recipe(source, [*config.recipe_overrides, *overrides, *more])

    target = measured(next(iter(group.values())), config.match_by, config.match_context)
    return make(fitted(name, make, fit, target, config.match_by, config.match_context))


def named_sources(config: StudyConfig, recipes: dict[str, Recipe]) -> dict[str, str]:
    """Name → source of the recipes that are what their source and the study's overrides say; the study makes others."""
    made = {name for fit in config.fit for name in fit.recipes}
    return {name: source for name, source in zip(recipes, config.recipes, strict=False) if name not in made}


def load_extensions(config: StudyConfig, recipes: dict[str, Recipe]) -> list[Extension]:
    """The study's extensions. Raises ConfigError for one whose recipe is not valid, or is not asked at its lengths."""
    found = extensions(config.extend, config.extension, recipes)
    for one in found:
        asked.check_lengths(config.eval, resolved(one))
        if absent := [length for length in (one.base.train.seq_len, one.length) if length not in config.eval.lengths]:
            raise ConfigError(f"eval.lengths lacks {absent[0]}: extensions of {one.base.name} are compared at "
                              f"{one.base.train.seq_len} and {one.length} tokens; add it.")
    return found


def differences(recipes: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Keys of data, optim and train in which the recipes differ: key → recipe → value."""
    flat = {name: flatten(recipe.model_dump(include=set(SHARED))) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for table in flat.values() for key in table)
    found = {key: {name: table.get(key) for name, table in flat.items()} for key in keys if key not in ALWAYS_DIFFER}
    return {key: values for key, values in found.items() if len(set(map(repr, values.values()))) > 1}


def _check_values(entries: list[VaryConfig], recipes: dict[str, Recipe]) -> None:
    for entry in entries:
        seen: dict[str, str] = {}
        for one in variants([entry]):
            made = repr(recipes[one.name].model_dump(exclude={"name"}))
            if made in seen:
                raise ConfigError(f"vary {entry.name!r}: {seen[made]} and {one.name} are one model; let overrides have "
                                  '"{value}", or give each a key, or seeds for repeated trainings.')
            seen[made] = one.name


def _check_vocabulary(recipes: dict[str, Recipe]) -> None:
    sizes = {name: recipe.model.vocab_size for name, recipe in recipes.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ConfigError(f"the recipes differ in model.vocab_size: {listed}. They share one tokenizer: make "
                          "them equal, for instance with overrides.model.vocab_size.")


def _check_alike(recipes: dict[str, Recipe], may_differ: list[str]) -> None:
    found = differences(recipes)
    for key, values in found.items():
        if key not in may_differ:
            listed = ", ".join(f"{value!r} in {name}" for name, value in values.items())
            raise ConfigError(f"the recipes differ in {key}: {listed}. The study compares architectures, so data, "
                              f'optim and train must be equal; or allow it: may_differ = ["{key}"].')
    if idle := [key for key in may_differ if key not in found]:
        raise ConfigError(f"may_differ names {idle[0]}, in which the recipes do not differ; remove it.")
