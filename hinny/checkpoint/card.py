"""The model card of an exported run: README.md, filled from the run's own files and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hinny import __version__
from hinny.checkpoint.formats import SELF_WRITTEN
from hinny.checkpoint.store import flat
from hinny.run import Run, command_line, commit

COLUMNS = ("what", "shape", "value", "unit", "commit", "machine")
LIBRARY = "library_name: transformers\n"
"""What tells a reader that transformers opens the folder."""

SHOWN = 60
"""Rows of evaluations that a card lists."""


def card(run: Run, meta: Mapping[str, Any], source: Mapping[str, Any] | None, to: str,
         record: Mapping[str, Any]) -> str:
    """README.md of what is written as format `to`.

    meta: of the checkpoint; source: what the run was converted from, if it was; record: of the export.
    """
    recipe = run.recipe
    parts = [
        f"---\n{'' if to in SELF_WRITTEN else LIBRARY}pipeline_tag: text-generation\n---",
        f"# {recipe.name}",
        recipe.description.strip(),
        "## Architecture",
        _table({"class": to, "parameters": f"{record['parameters']:,}", **flat(recipe.model.model_dump(
            mode="json", exclude_none=True))}),
        *_origin(run, meta, source),
        *_evaluations(run),
        *_notes(record),
        "## Made with",
        _table({"command": f"`{command_line()}`", "commit": commit(), "hinny": __version__}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(run: Run, meta: Mapping[str, Any], source: Mapping[str, Any] | None) -> list[str]:
    """Where the weights come from: a conversion, a training, or a training that began with converted weights."""
    parts = []
    if source is not None:
        parts += ["## Source", _table({"converted from": source["source"], "format": source["format"],
                                       **source["facts"]})]
    if meta["step"] > 0:
        recipe = run.recipe
        seen = {"steps": f"{meta['step']:,} of {recipe.train.steps:,}", "tokens": f"{meta['tokens']:,}",
                "data fingerprint": meta["data_fingerprint"], "command": f"`{run.env['command']}`",
                "commit": run.env["commit"], "machine": run.env["machine"]}
        settings = {**flat(recipe.optim.model_dump(mode="json", exclude_none=True)),
                    **flat(recipe.train.model_dump(mode="json", exclude_none=True)),
                    "boundaries": recipe.data.boundaries}
        parts += ["## Training", _table(seen | {key: value for key, value in settings.items() if key not in seen})]
    return parts


def _evaluations(run: Run) -> list[str]:
    rows = run.rows()
    if not rows:
        return []
    more = f"\n\n{len(rows) - SHOWN:,} more rows are in the run." if len(rows) > SHOWN else ""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows[:SHOWN]:
        cells = [f"{row[name]:.6g}" if name == "value" else _cell(row[name]) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return ["## Evaluation", "\n".join(lines) + more]


def _notes(record: Mapping[str, Any]) -> list[str]:
    return ["## Notes", "\n".join(f"- {note}" for note in record["notes"])] if record["notes"] else []


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
