"""Tasks that are a function of the run's model and the options: what a study asks, and loss by position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hinny.data.folder import read_record
from hinny.errors import DataError
from hinny.evals.entry import Entry, Length, Outcome, Rows, Subject, contents
from hinny.evals.options import EvalOptions, Sizes
from hinny.infer.reading.requests import Progress
from hinny.run import machine

if TYPE_CHECKING:
    from hinny.infer.engine import Engine

Function = Callable[["Engine", EvalOptions, Progress], Rows]


class StudiedTask(Entry):
    """One function that writes all rows of a task at once. It makes its own requests, so no reader can be given."""

    version = "1"
    shots = 0

    def __init__(self, name: str, metrics: tuple[str, ...], uses: tuple[str, ...], function: Function, *,
                 text: str | None = None, defaults: Mapping[str, Any] | None = None) -> None:
        """text: what it reads besides what it makes: "held-out", the run's data; "haystack", a text that is named.

        defaults: of options, which are the same result as the option given.
        """
        self.name, self.metrics, self.uses, self.function, self.text = name, metrics, frozenset(uses), function, text
        self.defaults = defaults or {}

    def missing(self, subject: Subject) -> list[str]:
        if self.text == "haystack" and subject.options.haystack is None:
            return self.needs()
        if self.text != "held-out":
            return []
        folders = subject.recipe.data.folders
        if not folders:
            return [f"{self.name}: {subject.run.path}: its recipe names no data.path, so there is no held-out text; "
                    "`hinny prepare` makes such a folder and a training names it"]
        absent = []
        for folder in folders:
            try:
                read_record(folder)
            except DataError as fault:
                absent.append(f"{self.name}: {fault}")
        return absent

    def needs(self) -> list[str]:
        return {"held-out": ["held-out text of the data folder that the run was trained on"],
                "haystack": [f"{self.name}: no text is named; give a file or a folder, --haystack FILE"],
                None: []}[self.text]

    def lengths(self, subject: Subject) -> tuple[list[Length], list[str]]:
        return [None], []

    def check(self, subject: Subject, lengths: Sequence[Length]) -> None:
        """Its samples have the lengths that it is asked for, and it may be asked for any."""

    def key(self, subject: Subject) -> dict[str, Any]:
        # the text has a fingerprint, and how many tokens are read at once changes nothing
        deciding = sorted(self.uses - {"haystack", "batch_tokens"})
        chosen = {name: getattr(subject.options, name) for name in deciding}
        return {"version": self.version, **{name: self.defaults.get(name) if value is None else value
                                            for name, value in chosen.items()}}

    def fingerprint(self, subject: Subject, length: Length) -> str:
        if self.text == "haystack":
            assert subject.options.haystack is not None, "what is missing was found before"
            return contents(Path(subject.options.haystack))
        folders = subject.recipe.data.folders if self.text == "held-out" else []
        prints = [read_record(folder)["fingerprint"] for folder in folders]
        return hashlib.sha256(json.dumps(prints).encode()).hexdigest()

    def measure(self, subject: Subject, length: Length, progress: Progress) -> Outcome:
        rows = self.function(subject.engine, subject.options, progress)
        if subject.accelerator is not None:
            rows = [{**row, "machine": machine(subject.accelerator)} for row in rows]
        return Outcome(rows)


def _held_out(engine: Engine, options: EvalOptions, progress: Progress) -> Rows:
    from hinny.evals.perplexity import held_out

    return held_out(engine, options)


def _recall(name: str) -> Function:
    def measure(engine: Engine, options: EvalOptions, progress: Progress) -> Rows:
        from hinny.evals import recall

        functions = {"phonebook": recall.phonebook, "mqar": recall.mqar, "copy": recall.copying,
                     "depths": recall.phonebook_depths}
        return functions[name](engine, options)

    return measure


def _positions(name: str) -> Function:
    def measure(engine: Engine, options: EvalOptions, progress: Progress) -> Rows:
        from hinny.evals import norms, positions, windows

        functions = {"joined": positions.joined, "text": positions.own_text, "chains": positions.chains,
                     "windows": windows.window_loss, "norms": norms.state_norms}
        return functions[name](engine, options, progress)

    return measure


SIZES = asdict(Sizes())
STUDY = (
    StudiedTask("heldout", ("held_out_loss", "bits_per_byte", "loss_by_position"), ("windows",), _held_out,
                text="held-out", defaults=SIZES),
    StudiedTask("phonebook", ("phonebook.exact", "phonebook.digits", "phonebook.chance_digits"),
                ("samples", "lengths", "seed"), _recall("phonebook"), defaults=SIZES),
    StudiedTask("mqar", ("mqar.accuracy",), ("samples", "pairs", "seed"), _recall("mqar"), defaults=SIZES),
    StudiedTask("copy", ("copy.accuracy",), ("samples", "lengths", "seed"), _recall("copy"), defaults=SIZES),
)
"""What `hinny study` asks of every run."""

POSITIONS = (
    StudiedTask("position-joined", ("joined_loss", "joined_bits_per_byte", "joined_loss_by_position"),
                ("samples", "lengths", "batch_tokens"), _positions("joined"), text="held-out"),
    StudiedTask("position-text", ("text_loss", "text_bits_per_byte", "text_loss_by_position"),
                ("samples", "lengths", "batch_tokens", "haystack"), _positions("text"), text="haystack"),
    StudiedTask("position-chains", ("chain_loss", "chain_excess"), ("samples", "lengths", "seed", "batch_tokens"),
                _positions("chains")),
    StudiedTask("window-loss", ("window_loss",), ("samples", "lengths", "batch_tokens"), _positions("windows"),
                text="held-out"),
    StudiedTask("phonebook-depth", ("phonebook_depth.exact",), ("samples", "lengths", "seed"), _recall("depths")),
    StudiedTask("state-norms", ("state_norm.rms", "state_norm.largest"), ("samples", "lengths"), _positions("norms"),
                text="held-out"),
)
"""What long contexts do: loss by position and by the length of the context, recall by depth, norms of states."""
