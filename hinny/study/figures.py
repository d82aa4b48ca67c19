"""The report's plots: which figures of the table each shows, and a caption that can be read without the text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from hinny.study.collect import Figure, Table
from hinny.study.colours import drawn
from hinny.study.draw import Panel, Point, Series, short
from hinny.study.rows import as_rows
from hinny.study.rules import percent
from hinny.study.speed_rules import predicted_pair

FORMS = {"standard": "Standard: question last", "reversed": "Reversed: question first"}
LEVEL = ", both axes logarithmic. A level line does not grow with the context."


@dataclass(frozen=True)
class Facts:
    """A small table below a plot; `raw_head` and `raw` are its sheet, `id` the end of the sheet's name."""

    id: str
    title: str
    head: list[str]
    rows: list[list[str]]
    raw_head: list[str]
    raw: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """Panels side by side under one caption, and the figures that they show."""

    id: str
    title: str
    caption: str
    panels: list[Panel]
    figures: list[Figure]
    facts: Facts | None = None


def plots(table: Table) -> list[Plot]:
    """Every plot for which the study has figures."""
    # here, for it draws with what this module has
    from hinny.study.tasks_figures import TASK_PLOTS

    return [plot for make in (_learning, _positions, _phonebook, _digits, _recall, *TASK_PLOTS, _speed, _memory,
                             _predicted, _predicted_prompt)
            if (plot := make(table)) is not None]


def models(table: Table, what: str) -> list[str]:
    """The recipes that have a figure `what`, in the study's order, then the predicted ones."""
    have = {figure.variant for figure in table.find(what)}
    return [name for name in [*table.about["recipes"], *table.about["predicted"]] if name in have]


def series_of(table: Table, what: str, axis: str, **shape: object) -> list[Series]:
    """A line along `axis` for each model that has the figures."""
    found = []
    for name in models(table, what):
        if points := [_point(f, axis) for f in table.curve(what, name, axis, **shape)]:
            found.append(drawn(table, name, points))
    return found


def _point(figure: Figure, axis: str) -> Point:
    return Point(figure.number(axis), figure.value, figure.low, figure.high, figure.shape.get("fits") != "no")


def ticks(series: list[Series]) -> list[float]:
    """Where a logarithmic axis has labels: powers of two if there are some, a fifth of the axis or more apart."""
    ticks = sorted({p.x for one in series for p in one.points})
    powers = [tick for tick in ticks if math.log2(tick).is_integer()]
    kept: list[float] = []
    for tick in reversed(powers if len(powers) > 2 else ticks):
        if not kept or kept[-1] / tick >= (ticks[-1] / ticks[0]) ** 0.2:
            kept.append(tick)
    return kept


def limits(panels: list[list[Series]], pad: float = 0.05) -> tuple[float, float]:
    """One range of y for several panels, so that they can be compared by eye."""
    values = [v for series in panels for one in series for p in one.points for v in (p.low, p.high)]
    room = pad * ((max(values) - min(values)) or 1.0)
    return min(values) - room, max(values) + room


def seeds_note(figures: list[Figure]) -> str:
    """What the bands of a plot are."""
    seeds = {f.seeds for f in figures}
    if seeds == {1}:
        return "One seed; bands are 95 % intervals where the evaluation gives them."
    number = "two" if seeds == {2} else str(max(seeds))
    return f"Lines are means over {number} seeds, bands run from the lowest to the highest seed."


def trained(table: Table) -> tuple[float, str]:
    """The mark of the longest sequence seen in training."""
    return min(recipe["seq_len"] for recipe in table.about["recipes"].values()), "trained length"


def _learning(table: Table) -> Plot | None:
    train, held = (series_of(table, what, "tokens") for what in ("train_loss", "held_out_curve"))
    train = [replace(s, points=s.points[_settled(s.points):]) for s in train]
    parts = [(title, series) for title, series in (("Held-out text", held), ("Training stream", train)) if series]
    if not parts:
        return None
    panels = [Panel(title, "tokens seen", "loss, nats/token", series, limits=limits([series]), by_end=True)
              for title, series in parts]
    figures = table.find("held_out_curve") + table.find("train_loss")
    share = "The training stream includes the synthetic recall sequences, so its level differs from that of the text."
    caption = f"Loss while training, lower is better. {share if train else ''} {seeds_note(figures)}"
    return Plot("learning", "Learning curves", caption, panels, figures)


def _settled(points: list[Point]) -> int:
    """Index past the first tenth of training, whose fall from chance would flatten all the rest."""
    return len(points) // 10


def _positions(table: Table) -> Plot | None:
    series = series_of(table, "loss_by_position", "position")
    if not series:
        return None
    # position 0 has no place on a logarithmic axis: the first range is drawn at 1
    series = [replace(s, points=[replace(p, x=max(1, p.x)) for p in s.points]) for s in series]
    figures = table.find("loss_by_position")
    caption = ("Held-out loss by the number of the document's tokens already read (start of each range), lower is "
               f"better. A falling line means that the model uses longer context. {seeds_note(figures)}")
    panel = Panel("", "tokens of context", "loss, nats/token", series, log_x=True, ticks=ticks(series))
    return Plot("positions", "Use of context on text", caption, [panel], figures)


def _phonebook(table: Table) -> Plot | None:
    panels = [Panel(title, "prompt, tokens", "numbers exactly right", series, log_x=True, limits=(-0.03, 1.03),
                    mark=trained(table), format_y=percent, ticks=ticks(series), higher=True)
              for form, title in FORMS.items() if (series := series_of(table, "phonebook.exact", "length", form=form))]
    if not panels:
        return None
    figures = table.find("phonebook.exact")
    samples = table.about["samples"]
    caption = ("Phonebook: share of phone numbers recalled exactly from a list in the prompt, by the length of the "
               f"prompt; higher is better. The dashed line is the longest prompt seen in training. {samples} questions "
               f"at each length and form. {seeds_note(figures)}")
    return Plot("phonebook", "Phonebook: exact recall by length", caption, panels, figures)


def _digits(table: Table) -> Plot | None:
    panels, figures = [], table.find("phonebook.wrong_digits") + table.find("phonebook.chance_digits")
    for form, title in FORMS.items():
        series = series_of(table, "phonebook.wrong_digits", "length", form=form)
        chance = [p for s in series_of(table, "phonebook.chance_digits", "length", form=form) for p in s.points]
        if series and chance:
            means = {x: [p.value for p in chance if p.x == x] for x in sorted({p.x for p in chance})}
            line = [Point(x, m, m, m) for x, values in means.items() for m in [sum(values) / len(values)]]
            panels.append(Panel(title, "prompt, tokens", "digits right in wrong numbers", [*series, Series(
                "chance", line, 0, dashed=True, ink=True)], log_x=True, limits=(-0.03, 1.03), mark=trained(table),
                format_y=percent, ticks=ticks(series), higher=True))
    if not panels:
        return None
    caption = ("Fuzzy memory: where the recalled number is wrong, the share of its digits that are right all the same; "
               "each digit is scored given the true digits in front of it, not the model's own. "
               "Chance is the share that agrees with the number of another prompt, mean over the models. A model "
               f"without a point gave no wrong number there. {seeds_note(figures)}")
    return Plot("digits", "Phonebook: digits of wrong numbers", caption, panels, figures)


def _recall(table: Table) -> Plot | None:
    pairs, copied = series_of(table, "mqar.accuracy", "pairs"), series_of(table, "copy.accuracy", "length")
    panels = [Panel(title, x, y, series, log_x=True, limits=(-0.03, 1.03), format_y=percent, ticks=ticks(series),
                    higher=True)
              for title, x, y, series in (
                  ("Multi-query recall", "key-value pairs", "values right", pairs),
                  ("Copying", "length, tokens", "tokens right", copied)) if series]
    if not panels:
        return None
    figures = table.find("mqar.accuracy") + table.find("copy.accuracy")
    asked = [name for name, series in (("the values of all keys of a list, by the number of pairs", pairs),
                                       ("a random string repeated, by length", copied)) if series]
    caption = f"Synthetic recall: {'; '.join(asked)}. Higher is better. {seeds_note(figures)}"
    return Plot("recall", "Multi-query recall and copying", caption, panels, figures)


def _speed(table: Table) -> Plot | None:
    parts = [("Decode", series_of(table, "decode", "context")), ("Prefill", series_of(table, "prefill", "context"))]
    panels = [Panel(title, "context, tokens", "tokens/s", series, log_x=True, ticks=ticks(series),
                    limits=(0, limits([series])[1]), higher=True, by_end=True) for title, series in parts if series]
    panels = [as_rows(panel, behind(panel.series)) for panel in panels]
    if not panels:
        return None
    figures = table.find("decode") + table.find("prefill")
    batch = ", ".join(sorted({f.shape.get("batch", "1") for f in figures}))
    caption = ("Generation, measured on this machine: tokens per second one at a time behind a context (decode), and "
               f"while reading a prompt (prefill), batch {batch}; higher is better. Ranges are from the slowest to the "
               "fastest of repeated timings of one trained model.")
    title = "Generation speed" if panels[0].rows else "Generation speed by context"
    return Plot("speed", title, caption, panels, figures)


def _memory(table: Table) -> Plot | None:
    series = series_of(table, "state_bytes", "context")
    if not series:
        return None
    several = len({p.x for one in series for p in one.points}) > 1
    caption = ("Memory that one sequence carries: keys and values of attention, states of Mamba layers, counted from "
               f"the tensors; lower is better{LEVEL if several else '.'}")
    panel = Panel("", "context, tokens", "bytes per sequence", series, log_x=True, log_y=True,
                  ticks=ticks(series), by_end=True)
    panel = as_rows(panel, behind(series), from_zero=True)
    title = "State and cache" if panel.rows else "State and cache by context"
    return Plot("memory", title, caption, [panel], table.find("state_bytes"))


def behind(series: list[Series]) -> str:
    """The first context of these lines, in words."""
    return f"after {series[0].points[0].x:,.0f} tokens"


def _predicted(table: Table) -> Plot | None:
    figures = table.find("predicted_decode")
    if not figures:
        return None
    panels = _by_hardware(table, "predicted_decode", "{}", "context, tokens")
    batch = ", ".join(sorted({f.shape["batch"] for f in figures}))
    caption = (f"Predicted, not measured: decode speed of the {_sized(table)} at batch {batch} from bytes moved and "
               "FLOPs against each GPU's data sheet, an upper bound. Dotted where weights and caches exceed its "
               f"memory. Both axes logarithmic. {ratio_sentence(table)}")
    return Plot("predicted", _title(table, " on named GPUs, predicted"), caption.strip(), panels, figures)


def _predicted_prompt(table: Table) -> Plot | None:
    figures, held = table.find("predicted_prefill"), table.find("predicted_sequence")
    if not figures or not held:
        return None
    series = series_of(table, "predicted_sequence", "context")
    panels = [*_by_hardware(table, "predicted_prefill", "Prefill, {}", "prompt, tokens"),
              Panel("State and cache, any hardware", "context, tokens", "bytes per sequence", series, log_x=True,
                    log_y=True, ticks=ticks(series))]
    batch, share = (", ".join(sorted({f.shape[key] for f in figures})) for key in ("batch", "mfu"))
    caption = (f"Predicted, not measured: tokens per second while {batch} prompts are read (prefill, higher is "
               f"better), from FLOPs at an assumed share of {share} of each GPU's peak rate, the same for every model, "
               "dotted where weights and caches exceed its memory; and the bytes that one sequence then holds (lower "
               "is better): keys and values in bfloat16, states in float32. All axes logarithmic.")
    title = _title(table, ": prefill, state and cache, predicted")
    return Plot("predicted_prompt", title, caption, panels, figures + held)


def _by_hardware(table: Table, what: str, title: str, x: str) -> list[Panel]:
    """A panel for each hardware of the figures `what`, all with one range of y."""
    hardware = list(dict.fromkeys(f.shape["hardware"] for f in table.find(what)))
    parts = [(name, series_of(table, what, "context", hardware=name)) for name in hardware]
    bounds = _log_limits([series for _, series in parts])
    return [Panel(title.format(name), x, "tokens/s, all sequences", series, log_x=True, log_y=True,
                  ticks=ticks(series), limits=bounds) for name, series in parts]


def _log_limits(panels: list[list[Series]]) -> tuple[float, float]:
    values = [p.value for series in panels for one in series for p in one.points]
    return min(values) / 1.4, max(values) * 1.4


def predicted_size(table: Table) -> str:
    """What the names of all predicted models begin with, such as "8B" of 8b-hybrid; "" where they differ."""
    sizes = {name.partition("-")[0].upper() for name in table.about["predicted"]}
    return next(iter(sizes)) if len(sizes) == 1 and re.fullmatch(r"[\d.]+[MB]", *sizes) else ""


def _sized(table: Table) -> str:
    return f"{predicted_size(table)} models".strip()


def _title(table: Table, rest: str) -> str:
    words = _sized(table)
    return f"{words[0].upper()}{words[1:]}{rest}"


def ratio_sentence(table: Table) -> str:
    """How many times faster the predicted hybrid decodes than the predicted Transformer, by context."""
    if (names := predicted_pair(table)) is None or not (ours := table.curve("predicted_decode", names[0], "context")):
        return ""
    hardware, parts = ours[0].shape["hardware"], []
    for figure in (f for f in ours if f.shape["hardware"] == hardware):
        base = table.find("predicted_decode", names[1], hardware=hardware,
                          context=figure.shape["context"], batch=figure.shape["batch"])
        parts += [f"{figure.value / base[0].value:.1f}× at {short(figure.number('context'))}"] if base else []
    batch = ours[0].shape["batch"]
    return (f"Hybrid over Transformer on {hardware}, batch {batch}, memory limits aside: {', '.join(parts)}."
            if parts else "")
