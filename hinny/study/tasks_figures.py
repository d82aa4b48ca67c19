"""The report's plots of RULER, of multiple choice and of the synthetic tasks, and their lines of the short table."""

from __future__ import annotations

from collections.abc import Iterable

from hinny.study.collect import Figure, Table
from hinny.study.colours import drawn
from hinny.study.draw import Panel, Point, Series
from hinny.study.figures import Plot, models, seeds_note, ticks
from hinny.study.rules import percent
from hinny.study.tasks import CHOICE, RECALL, RULER, RULER_MEAN

LIMITS = (-0.03, 1.03)
CHANCE_LEVEL = 0.25
"""Of four choices."""
FORMS = {"choice-letter": "letter", "choice-text": "text", "choice-cloze": "cloze"}
HEADLINES = {"fact-cards": "match"} | {
    name: "tokens" for name in RECALL if name.startswith("mqar") or name.endswith("running")}
"""The figure of a synthetic task that is drawn, the first that `hinny eval --list` has; "exact" of those not here."""


def ruler_plot(table: Table) -> Plot | None:
    """The mean over RULER's tasks by length."""
    series = _by_length(table, RULER_MEAN)
    if not series:
        return None
    figures = table.find(RULER_MEAN)
    tasks = ", ".join(sorted({f.shape["tasks"] for f in figures}, key=int))
    caption = (f"RULER: mean over {tasks} tasks of the share of the answers that the model wrote, by the length of "
               "prompt and answer; higher is better. The dashed line is the longest sequence seen in training. A "
               f"length at which one of the tasks cannot be made has no mean. {_questions(figures)} "
               f"{seeds_note(figures)}")
    panel = _panel(table, "", "answers written", series)
    return Plot("ruler", "RULER by length", caption, [panel], figures)


def ruler_tasks_plot(table: Table) -> Plot | None:
    """Every task of RULER by itself."""
    parts = [(name, f"{name}.string_match_all") for name in RULER]
    caption = ("Each of RULER's tasks: share of the answers that the model wrote, by the length of prompt and answer; "
               "higher is better. niah: a needle in a haystack; vt: variable tracking; cwe and fwe: common and "
               "frequent words.")
    return _panels(table, "ruler_tasks", "RULER, task by task", caption, "answers written", parts, "ruler-")


def synthetic_plot(table: Table) -> Plot | None:
    """The synthetic tasks that are made at lengths, a panel each."""
    parts = [(name, f"{name}.{HEADLINES.get(name, 'exact')}") for name in RECALL]
    caption = ("Synthetic tasks: share of the answers right, of whole answers, or of their tokens in the tasks that "
               "ask for many, by length; higher is better.")
    return _panels(table, "synthetic", "Synthetic tasks by length", caption, "answers right", parts, "")


def choice_plot(table: Table) -> Plot | None:
    """The forms of multiple choice side by side, a line from form to form for each model."""
    asked = [name for name in CHOICE if table.find(f"{name}.acc")]
    if not asked:
        return None
    places = {name: CHOICE.index(name) + 1 for name in asked}
    series = []
    for name in table.about["recipes"]:
        found = [(places[task], table.one(f"{task}.acc", name)) for task in asked]
        if points := [Point(place, f.value, f.low, f.high) for place, f in found if f is not None]:
            series.append(drawn(table, name, points))
    ends = [Point(x, CHANCE_LEVEL, CHANCE_LEVEL, CHANCE_LEVEL) for x in (min(places.values()) - 0.25,
                                                                       max(places.values()) + 0.25)]
    series.append(Series("chance", ends, 0, dashed=True, ink=True))
    forms = {place: FORMS[name] for name, place in places.items()}
    figures = [f for name in asked for f in table.find(f"{name}.acc")]
    caption = ("The same questions of four choices, half lookups and half sums, in MMLU's forms: the choices are shown "
               "and their letters are scored (letter), shown and their texts are scored (text), not shown and their "
               "texts are scored (cloze). Share right, higher is better; lines join one model's forms. "
               f"{_questions(figures)} {seeds_note(figures)}")
    panel = Panel("", "form of the question", "questions right", series, limits=LIMITS, format_y=percent,
                  format_x=lambda place: forms.get(round(place), ""), ticks=[float(place) for place in forms],
                  higher=True)
    return Plot("choice", "Multiple choice in three forms", caption, [panel], figures)


TASK_PLOTS = (ruler_plot, ruler_tasks_plot, choice_plot, synthetic_plot)
"""In the order of the page."""


def ruler_means(table: Table, name: str, beyond: bool) -> list[Figure]:
    """RULER's means at lengths within the training length, or beyond it."""
    return [f for f in table.curve(RULER_MEAN, name, "length") if (f.number("length") > _trained(table)) == beyond]


def _panels(table: Table, plot: str, title: str, caption: str, y: str, parts: list[tuple[str, str]],
            prefix: str) -> Plot | None:
    """A panel for each task that has the figure named beside it."""
    panels, figures = [], []
    for name, what in parts:
        if series := _by_length(table, what):
            panels.append(_panel(table, name.removeprefix(prefix), y, series))
            figures += table.find(what)
    if not panels:
        return None
    return Plot(plot, title, f"{caption} {_questions(figures)} {seeds_note(figures)}", panels, figures)


def _panel(table: Table, title: str, y: str, series: list[Series]) -> Panel:
    return Panel(title, "length, tokens", y, series, log_x=True, limits=LIMITS, mark=(_trained(table),
                 "trained length"), format_y=percent, ticks=ticks(series), higher=True)


def _by_length(table: Table, what: str) -> list[Series]:
    return [drawn(table, name, [Point(f.number("length"), f.value, f.low, f.high)
                                for f in table.curve(what, name, "length")]) for name in models(table, what)]


def _trained(table: Table) -> int:
    return min(recipe["seq_len"] for recipe in table.about["recipes"].values())


def _questions(figures: Iterable[Figure]) -> str:
    """How many questions of one seed a figure is made of."""
    numbers = sorted({int(f.shape["n"]) for f in figures})
    number = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{number} questions a point, the same for every model and seed."
