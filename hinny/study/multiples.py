"""Figures of many models as small multiples: a panel for each size, or for each thing that a study varies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hinny.study.collect import Table
from hinny.study.draw import Panel, Series, short
from hinny.study.figures import Plot, limits
from hinny.study.rules import percent

MANY = 6
"""Lines up to which one panel shows each in colour, with its name."""
KEPT = 3
SHARES = ("attention", "mlp")
LOGARITHMIC = ("parameters", "flops")
"""What an axis of a plot of what is varied may be: shares of layers, sizes."""
LEAST_SHADE = 0.35
"""How strong the first of several lines of one colour is; the last is 1."""


@dataclass(frozen=True)
class _Group:
    """Models that share a panel, with the names that they have in it; shaded: of one line, in its order."""

    title: str
    names: dict[str, str]
    shaded: bool = False


def split(table: Table, plot: Plot) -> Plot:
    """The plot with its panels of more than MANY models taken apart; of one measure all have the same axes."""
    if not any(_crowded(panel) for panel in plot.panels):
        return plot
    groups = groups_of(table)
    if not groups:
        note = f" In colour the best {KEPT} and the last; the CSV has all."
        return replace(plot, panels=[thinned(p) for p in plot.panels], caption=f"{plot.caption}{note}")
    panels = [part for group in groups for panel in plot.panels if (part := _part(panel, group)) is not None]
    what = "size" if not groups[0].shaded else "thing that is varied"
    shades = " Of lines of one colour the fainter have less of it, or come first." if groups[0].shaded else ""
    note = f" A panel for each {what}; those of one measure have the same axes.{shades}"
    return replace(plot, panels=panels, caption=f"{plot.caption}{note}")


def groups_of(table: Table) -> list[_Group]:
    """By size where the lines run over sizes, else by what is varied; none where not every model is varied."""
    lines, recipes = table.about.get("sweeps", []), table.about["recipes"]
    if {member["recipe"] for line in lines for member in line["members"]} != set(recipes):
        return []
    of_line = {member["recipe"]: line["line"] for line in lines for member in line["members"]}
    sizes: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        sizes.setdefault(recipe.get("group", ""), []).append(name)
    if len(sizes) > 1 and all(len({of_line[name] for name in names}) == len(names) for names in sizes.values()):
        return [_Group(_size(table, names), {name: of_line[name] for name in names}) for names in sizes.values()]
    several = {line["plot"] for line in lines if sum(other["plot"] == line["plot"] for other in lines) > 1}
    return [_Group(f"{line['plot']}, {line['line']}" if line["plot"] in several else line["plot"], {
        member["recipe"]: value_of(line["x"], member) for member in sorted(
            line["members"], key=lambda one: one["x"] is not None and one["x"])}, shaded=True) for line in lines]


def lower(title: str) -> str:
    """The title within a sentence; a word of capitals stays as it is."""
    return title if title[:2].isupper() else f"{title[0].lower()}{title[1:]}"


def value_of(axis: str, member: dict[str, object]) -> str:
    """What is varied in a model, in few characters."""
    if axis in SHARES:
        return percent(float(str(member["x"])))
    return short(float(str(member["x"]))) if axis in LOGARITHMIC else str(member["value"])


def _size(table: Table, names: list[str]) -> str:
    """The sizes of these models, from the least to the largest where that shows."""
    sizes = [float(table.about["recipes"][name]["non_embedding"]) for name in names]
    low, high = (short(float(f"{size:.2g}")) for size in (min(sizes), max(sizes)))
    return f"{low} parameters" if low == high else f"{low} to {high} parameters"


def _crowded(panel: Panel) -> bool:
    return panel.front is None and not panel.rows and sum(bool(series.model) for series in panel.series) > MANY


def _part(panel: Panel, group: _Group) -> Panel | None:
    """The panel with the models of one group, and what belongs to no model."""
    own = {series.model: series for series in panel.series}
    # where colours differ, so do markers
    colours = [series.colour for series in panel.series if series.model in group.names]
    found = [replace(own[name], label=label, mark=own[name].mark if group.shaded else None,
                     # one of another colour is told from the rest as it is
                     shade=_shade(group, place) if colours.count(own[name].colour) > 1 else 1.0)
             for place, (name, label) in enumerate(group.names.items()) if name in own]
    if not found:
        return None
    rest = [series for series in panel.series if not series.model]
    # of "Standard: question last" what tells it from the other form
    measure = panel.title.partition(": ")[2] or panel.title
    title = f"{group.title}, {lower(measure)}" if measure else group.title
    return replace(panel, title=title, series=[*found, *rest], limits=panel.limits or _bounds(panel),
                   across=panel.across or _across(panel))


def _shade(group: _Group, place: int) -> float:
    last = len(group.names) - 1
    return LEAST_SHADE + (1 - LEAST_SHADE) * place / last if group.shaded and last else 1.0


def _bounds(panel: Panel) -> tuple[float, float]:
    if not panel.log_y:
        return limits([panel.series])
    values = [value for series in panel.series for p in series.points for value in (p.low, p.high)]
    return min(values) / 1.3, max(values) * 1.3


def _across(panel: Panel) -> tuple[float, float]:
    places = [p.x for series in panel.series for p in series.points]
    low, high = min(places), max(places)
    if panel.log_x:
        room = (high / low) ** 0.04 if high > low else 1.5
        return low / room, high * room
    return low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)


def thinned(panel: Panel) -> Panel:
    """The panel with the best KEPT and the last in colour where there are many: by where the lines end if that is what
    it is about, else by their means, up to the mark of what was trained if there is one.
    """
    if not _crowded(panel):
        return panel

    def score(series: Series) -> float:
        values = [p.value for p in series.points]
        if panel.by_end:
            return values[-1]
        asked = [p.value for p in series.points if panel.mark is None or p.x <= panel.mark[0]] or values
        return sum(asked) / len(asked)

    ranked = sorted((s for s in panel.series if s.model), key=score, reverse=panel.higher)
    kept = [*ranked[:KEPT], ranked[-1]]
    grey = [replace(s, label="", muted=True) for s in ranked if s not in kept]
    return replace(panel, series=[*grey, *(s for s in panel.series if s not in grey and (s in kept or not s.model))])
