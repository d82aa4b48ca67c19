"""Runs → one table: every figure a mean over seeds with its spread, and what made it.

`collect` writes two files, from which alone the report is rendered:

    results/study.json   rows of the one schema (hinny.run.row); shape ends with seeds=N; low and high are the
                         smallest and largest seed, or the row's own interval where there is one seed
    results/about.json   the study, its recipes, their sizes, the data
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hinny import counts, pattern
from hinny.config import ModelConfig, Recipe, load_recipe, read_toml, to_toml, validate
from hinny.errors import RunError
from hinny.run import Run, write_atomically
from hinny.study.alike import differing, groups
from hinny.study.config import EvalConfig, StudyConfig, differences, load_extensions
from hinny.study.gains import extended_rows
from hinny.study.longer import Extension
from hinny.study.plan import Layout
from hinny.study.tasks import is_asked, ruler_means, study_rows
from hinny.study.vary import Axis, Value, VaryConfig, variants

Row = dict[str, Any]
FAMILIES = {"transformer": "Transformer", "mamba": "Mamba", "mamba2": "Mamba-2", "hybrid": "Mamba-2-Hybrid",
            "other": "Other"}
SHARES = {"attention": "*", "mlp": "-"}
"""Kind of layer → its symbol."""
CURVES = {"loss": ("train_loss", "nats/token"), "held_out_loss": ("held_out_curve", "nats/token")}
"""Field of metrics.jsonl → what its row is called, and its unit."""


@dataclass(frozen=True)
class Figure:
    """One figure of the table: a mean over `seeds` seeds, between `low` and `high`."""

    what: str
    variant: str
    shape: dict[str, str]
    value: float
    low: float
    high: float
    unit: str
    seeds: int
    command: str
    commit: str
    machine: str

    def number(self, key: str) -> int:
        """The shape's `key` as a number: "256" is 256, "64-127" is 64."""
        return int(self.shape[key].partition("-")[0])


@dataclass(frozen=True)
class Table:
    """All figures of a study, and what they are about."""

    figures: list[Figure]
    about: dict[str, Any]

    def find(self, what: str, variant: str | None = None, **shape: object) -> list[Figure]:
        """The figures called `what`, of `variant` if given, whose shape agrees with every key given."""
        wanted = {key: str(value) for key, value in shape.items()}
        return [f for f in self.figures if f.what == what and variant in (None, f.variant)
                and all(f.shape.get(key) == value for key, value in wanted.items())]

    def one(self, what: str, variant: str | None, **shape: object) -> Figure | None:
        """The figure of that description if there is exactly one."""
        found = self.find(what, variant, **shape) if variant else []
        return found[0] if len(found) == 1 else None

    def curve(self, what: str, variant: str, axis: str, **shape: object) -> list[Figure]:
        """The figures along `axis`, in its order."""
        return sorted((f for f in self.find(what, variant, **shape) if axis in f.shape), key=lambda f: f.number(axis))

    def of_family(self, family: str) -> str | None:
        """The study's recipe of that family if there is exactly one."""
        names = [name for name, recipe in self.about["recipes"].items() if recipe["family"] == family]
        return names[0] if len(names) == 1 else None

    def label(self, variant: str) -> str:
        """What a reader calls the recipe: its family if it is the only one of it in its group, else its name; and its
        name where it stands on a plot of what is varied.
        """
        if any(member["recipe"] == variant for line in self.about.get("sweeps", []) for member in line["members"]):
            return variant
        for group in (self.about["recipes"], self.about["predicted"]):
            if variant in group:
                family = group[variant]["family"]
                alone = [r["family"] for r in group.values()].count(family) == 1 and family != "other"
                return FAMILIES[family] if alone else variant
        return variant


def family(model: ModelConfig) -> str:
    """Which of the paper's four families a pattern belongs to."""
    kinds = frozenset(counts.layer_counts(model)) - {"-"}
    return {frozenset("*"): "transformer", frozenset("1"): "mamba", frozenset("M"): "mamba2",
            frozenset("M*"): "hybrid"}.get(kinds, "other")


def parse_shape(shape: str) -> dict[str, str]:
    """"form=standard length=256" as a dictionary; values without the escapes of white space and %."""
    return {key: unquote(value) for key, value in (item.split("=", 1) for item in shape.split())}


def read_table(study: Path) -> Table:
    """The table that `collect` wrote in folder `study`. Raises RunError where there is none."""
    layout = Layout(study)
    try:
        rows = json.loads((layout.results / "study.json").read_text(encoding="utf-8"))
        about = json.loads((layout.results / "about.json").read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{study} is not a study: it has no results/study.json and results/about.json. "
                       "Give the folder that `hinny study` wrote.") from None
    except ValueError as fault:
        raise RunError(f"{layout.results} holds a file that is not JSON: {fault}.") from None
    return Table([_figure(row) for row in rows], about)


def _figure(row: Row) -> Figure:
    shape = parse_shape(row["shape"])
    seeds, value = int(shape.pop("seeds", 1)), row["value"]
    low, high = (value if row[side] is None else row[side] for side in ("low", "high"))
    return Figure(row["what"], row["variant"], shape, value, low, high, row["unit"], seeds,
                  row["command"], row["commit"], row["machine"])


def collect(study: Path) -> Path:
    """Read every run in folder `study` and write results/study.json and results/about.json; returns the former."""
    layout = Layout(study)
    if not layout.resolved.is_file():
        raise RunError(f"{study} is not a study: it has no study.toml. Give the folder that `hinny study` wrote.")
    config = validate(StudyConfig, read_toml(layout.resolved), str(layout.resolved))
    paths = {name: layout.recipe(name) for name in [*config.recipes, *(one.name for one in variants(config.vary))]}
    recipes = {name: validate(Recipe, read_toml(path), str(path)) for name, path in paths.items()}
    extensions = load_extensions(config, recipes)
    swept = {member["recipe"] for line in sweeps(config.vary, recipes) for member in line["members"]}
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for name in recipes:
        for seed in config.seeds:
            own = [one for one in extensions if one.base.name == name]
            for row in _seed_rows(layout, name, seed, own, config.eval):
                groups[row["what"], row["variant"], row["shape"]].append(row)
                if row["what"] == "held_out_loss" and name in swept:
                    # what a law is fitted to
                    each = {**row, "what": "held_out_loss_of_seed", "shape": f"seed={seed}"}
                    groups[each["what"], name, each["shape"]].append(each)
    rows = [_over_seeds(group) for group in groups.values()]
    predicted = layout.results / "predict.json"
    rows += json.loads(predicted.read_text(encoding="utf-8")) if predicted.is_file() else []
    about = _about(config, recipes, extensions, layout)
    write_atomically(layout.results / "about.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    write_atomically(layout.results / "study.json", json.dumps(rows, indent=1) + "\n")
    return layout.results / "study.json"


def _seed_rows(layout: Layout, name: str, seed: int, extensions: list[Extension], asked: EvalConfig) -> list[Row]:
    """All rows of one recipe's run, and of those that go on from it."""
    run = Run(layout.run(name, seed))
    if not (run.path / "recipe.toml").is_file():
        return []
    rows = _run_rows(run, name, asked)
    for extension in extensions:
        longer = Run(layout.extended(extension, seed))
        if (longer.path / "results").is_dir():
            rows += extended_rows(extension, rows, _run_rows(longer, name, asked))
    return rows


def _run_rows(run: Run, name: str, asked: EvalConfig) -> list[Row]:
    """All rows of one run: its results, its learning curves, the share of right digits in wrong numbers, and RULER's
    means. RunError for results that are not of what the study asks.
    """
    for task in asked.tasks:
        told = run.path / "evals" / f"{task}.json"
        if told.is_file() and not is_asked(asked, task, json.loads(told.read_text(encoding="utf-8"))):
            raise RunError(f"{run.path}: the results of {task} are of an evaluation by hand, with other samples or "
                           "lengths than the study's. The command of the study asks it again.")
    rows = [{**row, "variant": name} for row in study_rows(asked, run.rows())]
    env = run.env
    made = {key: env[key] for key in ("command", "commit", "machine")}
    empty = dict.fromkeys(("low", "high", "bound", "peer", "peer_value", "ratio"))
    for record in run.metrics():
        for field, (what, unit) in CURVES.items():
            if field in record:
                rows.append({"what": what, "variant": name, "shape": f"tokens={record['tokens']}",
                             "value": record[field], "unit": unit, **empty, **made})
    return rows + _wrong_digits(rows) + ruler_means(asked, rows)


def _wrong_digits(rows: list[Row]) -> list[Row]:
    """`phonebook.wrong_digits`: right answers have all digits right, so digits = exact + (1 - exact) * wrong_digits."""
    exact = {row["shape"]: row["value"] for row in rows if row["what"] == "phonebook.exact"}
    return [{**row, "what": "phonebook.wrong_digits", "low": None, "high": None,
             "value": (row["value"] - exact[row["shape"]]) / (1 - exact[row["shape"]])}
            for row in rows if row["what"] == "phonebook.digits" and exact.get(row["shape"], 1.0) < 1.0]


def _over_seeds(rows: list[Row]) -> Row:
    """One row for the same figure of several seeds."""
    values = [row["value"] for row in rows]
    spread = {"low": min(values), "high": max(values)} if len(rows) > 1 else {}
    joined = {key: "\n".join(dict.fromkeys(row[key] for row in rows)) for key in ("command", "commit", "machine")}
    shape = f"{rows[0]['shape']} seeds={len(rows)}".strip()
    return {**rows[0], "shape": shape, "value": sum(values) / len(values), **spread, **joined}


def _about(config: StudyConfig, recipes: dict[str, Recipe], extensions: list[Extension],
           layout: Layout) -> dict[str, Any]:
    data = layout.data / "data.json"
    predicted = {recipe.name: recipe for recipe in map(load_recipe, config.predict.recipes if config.predict else [])}
    group = groups(config.vary, recipes)
    return {"name": config.name, "description": config.description, "seeds": config.seeds,
            "match_tolerance": config.match_tolerance, "samples": config.eval.samples,
            "recipes": {name: {**describe(recipe), "group": group[name]} for name, recipe in recipes.items()},
            "predicted": {name: describe(recipe) for name, recipe in predicted.items()},
            "differences": differences(recipes),
            "match": {"by": config.match_by, "context": config.match_context},
            "sweeps": sweeps(config.vary, recipes),
            "extensions": [{"recipe": one.base.name, "method": one.method, "factor": one.factor, "length": one.length,
                            "overrides": list(one.overrides), "changes": list(one.changes)} for one in extensions],
            "data": json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}}


def describe(recipe: Recipe) -> dict[str, Any]:
    """What the report tells of a recipe: text, family and the sizes that follow from it."""
    model, train = recipe.model, recipe.train
    count = counts.parameters(model)
    layers = [getattr(model, section) for section in ("mamba1", "mamba2") if getattr(model, section)]
    return {"toml": to_toml(recipe), "description": recipe.description, "family": family(model),
            "pattern": model.pattern, "parameters": count.total, "non_embedding": count.non_embedding,
            "seq_len": train.seq_len, "steps": train.steps, "tokens": train.steps * train.batch_size * train.seq_len,
            "flops_per_token": counts.training_flops(model, train.pass_len),
            "d_state": layers[0].d_state if layers else None,
            "positions": model.attention.positions if model.attention else None,
            "heads": model.attention.n_heads if model.attention else None,
            "kv_heads": model.attention.n_kv_heads if model.attention else None,
            "even": is_even(model),
            "shares": {kind: counts.layer_counts(model).get(symbol, 0) / model.depth
                       for kind, symbol in SHARES.items()}}


def is_even(model: ModelConfig) -> bool:
    """Whether attention and MLP layers are spread evenly, by the paper's Algorithm 1."""
    layers, found = pattern.parse(model.pattern), counts.layer_counts(model)
    n = len(layers)
    return layers == pattern.allocate(n, found.get("*", 0) / n, found.get("-", 0) / n)


def sweeps(entries: list[VaryConfig], recipes: dict[str, Recipe]) -> list[dict[str, Any]]:
    """The variants that stand on a plot, line by line: plot, line, what x is, each one's name, value and x, and the
    keys in which they differ.
    """
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        if entry.plot is not None:
            own = {one.name: one.name if one.value is None else one.value for one in variants([entry])}
            members = lines.setdefault((entry.plot, entry.line or "", entry.x), {})
            for name, value in {**entry.also, **own}.items():
                members.setdefault(name, {"recipe": name, "value": value, "x": place(entry.x, value, recipes[name])})
    fitted = [entry.fit.key for entry in entries if entry.fit]
    return [{"plot": plot, "line": line, "x": x, "members": list(members.values()),
             "differ": differing([recipes[name] for name in members], fitted)}
            for (plot, line, x), members in lines.items()]


def place(axis: Axis, value: Value, recipe: Recipe) -> float | None:
    """Where a model stands on a plot's axis; None for a value that is no number."""
    about = describe(recipe)
    if axis == "value":
        return float(value) if isinstance(value, (int, float)) else None
    if axis in SHARES:
        return float(about["shares"][axis])
    return float(about["non_embedding"] if axis == "parameters" else about["flops_per_token"] * about["tokens"])
