"""Hugging Face data sets, through the package `datasets`: from the Hub or a folder, at once or as a stream.

A data set on disk is cut into ranges of rows, which workers read from its memory-mapped files. A stream is first laid
down as JSON lines in the folder of parts, for the text is read twice; the state of the stream goes with every part of
it, so that a stopped download goes on behind the last one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hinny.data.lines import JSONLines, LineRange, fields_of
from hinny.data.pieces import Document, Piece, Source
from hinny.data.work import Unfinished, Work, damaged, put
from hinny.errors import ConfigError, DataError

STREAM_BYTES = 16_000_000
"""Text in a part of a stream."""

ROWS_TOLD = 1000
"""Rows between two reports of a stream's progress."""

FIELD, SOURCE_FIELD = "text", "source"
"""Where the parts of a stream have the text, and where it is from."""


@dataclass(frozen=True)
class HubOptions:
    """Which data set: the name on the Hub or a folder; configuration and split as `datasets` has them; the first rows
    only; as a stream or not. None where not given."""

    name: str
    config: str | None = None
    split: str | None = None
    rows: int | None = None
    stream: bool = False


@dataclass(frozen=True)
class Rows(Piece):
    """Some rows of a data set on disk; they are sent as names of files and read by whoever asks."""

    rows: Any
    field: str
    source: str
    first: int
    size: int
    source_field: str | None

    def documents(self) -> Iterator[Document]:
        for place, record in enumerate(self.rows):
            data, source = fields_of(record, self.field, self.source_field, partial(self.name, place))
            yield Document(data, self, place, source)

    def name(self, place: int) -> str:
        return _row(self.source, self.first + place)


class HubRows(Source):
    """A data set on disk."""

    def __init__(self, options: HubOptions, field: str, rows: Any, source_field: str | None) -> None:
        wanted = {"--field": field} | ({} if source_field is None else {"--source-field": source_field})
        for option, name in wanted.items():
            if name not in rows.column_names:
                raise DataError(f"{options.name}: no field {name!r}; its rows have "
                                f"{', '.join(map(repr, rows.column_names))}. Name one with {option}.")
        rows = rows.with_format(None).select_columns(list(wanted.values()))
        self._rows = rows if options.rows is None else rows.select(range(min(options.rows, len(rows))))
        self._options = options
        self._field = field
        self._source_field = source_field

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        n, size = len(self._rows), self.size()
        step = max(1, n * piece_bytes // max(size, 1))
        for first in range(0, n, step):
            stop = min(first + step, n)
            yield Rows(self._rows.select(range(first, stop)), self._field, self._options.name, first,
                       size * stop // n - size * first // n, self._source_field)

    def size(self) -> int:
        return int(self._rows.data.nbytes)

    def description(self) -> dict[str, Any]:
        return _description(self._options, self._field)

    def inputs(self) -> dict[str, Any]:
        return {**self.description(), "rows in all": len(self._rows), "bytes": self.size()}


@dataclass(frozen=True)
class LaidDown(LineRange):
    """Lines of a part of a stream: what is wrong with them is not the data's fault."""

    def documents(self) -> Iterator[Document]:
        try:
            yield from super().documents()
        except DataError as fault:
            raise damaged(self.path, fault) from None


class HubStream(Source):
    """A data set that is read as a stream; `fetch` lays it down, and must come before anything is read."""

    def __init__(self, options: HubOptions, field: str, rows: Any, source_field: str | None) -> None:
        self._options = options
        self._field = field
        self._source_field = source_field
        self._rows = rows
        self._files: list[Path] = []

    def fetch(self, work: Work, report: Callable[[float], None]) -> None:
        """Write what is missing of the stream into `work`; Unfinished if it breaks off."""
        self._files, rows, state, ended = _laid_down(work)
        total = self._expected()
        report(min(rows / total, 1.0) if total else 0.0)
        if not ended:
            if state is not None:
                self._rows.load_state_dict(state)
            self._lay_down(work, rows, lambda done: report(min(done / total, 1.0) if total else 0.0))
        report(1.0)

    def _expected(self) -> int | None:
        """How many rows will come, where that is known."""
        if self._options.rows is not None:
            return self._options.rows
        known = (self._rows.info.splits or {}).get(self._options.split or "train")
        return None if known is None else int(known.num_examples or 0) or None

    def _lay_down(self, work: Work, rows: int, report: Callable[[int], None]) -> None:
        lines: list[bytes] = []
        size = 0
        for record in self._read(rows):
            text, source = fields_of(record, self._field, self._source_field, partial(_row, self._options.name, rows))
            kept = {FIELD: text.decode()} | ({} if source is None else {SOURCE_FIELD: source})
            lines.append(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            size += len(lines[-1])
            rows += 1
            if rows % ROWS_TOLD == 0:
                report(rows)
            if size >= STREAM_BYTES:
                self._put(work, lines, rows, ended=False)
                lines, size = [], 0
        self._put(work, lines, rows, ended=True)

    def _read(self, rows: int) -> Iterator[dict[str, Any]]:
        """The records behind the first `rows`, up to as many as were asked for."""
        records = iter(self._rows)
        while self._options.rows is None or rows < self._options.rows:
            try:
                record = next(records)
            except StopIteration:
                return
            # the network, the Hub, a file of it: whatever stands between
            except Exception as fault:
                raise Unfinished(f"{self._options.name}: the stream broke off at row {rows}: "
                                 f"{type(fault).__name__}: {fault}.") from None
            rows += 1
            yield record

    def _put(self, work: Work, lines: list[bytes], rows: int, *, ended: bool) -> None:
        number = len(self._files)
        lines_file, state_file = _names(number)
        put(work.path, lines_file, lambda file: file.writelines(lines))
        state = json.dumps({"rows": rows, "ended": ended, "stream": self._rows.state_dict()})
        # the second file says that the first is whole
        put(work.path, state_file, lambda file: file.write(state.encode()))
        self._files.append(work.path / lines_file)

    def pieces(self, piece_bytes: int) -> Iterator[Piece]:
        source_field = None if self._source_field is None else SOURCE_FIELD
        for piece in JSONLines(self._files, FIELD, source_field).pieces(piece_bytes):
            assert isinstance(piece, LineRange)
            yield LaidDown(piece.path, piece.field, piece.start, piece.size, piece.source_field)

    def size(self) -> int:
        return JSONLines(self._files, FIELD).size()

    def description(self) -> dict[str, Any]:
        return _description(self._options, self._field)

    def inputs(self) -> dict[str, Any]:
        return self.description()


def open_hub(options: HubOptions, field: str, source_field: str | None = None) -> Source:
    """The data set; ConfigError for options that don't go together, DataError if it cannot be opened."""
    if options.rows is not None and options.rows < 1:
        raise ConfigError(f"hf_rows is {options.rows}; it must be at least 1.")
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf {options.name} needs the package datasets: pip install 'hinny[data]'.") from None
    try:
        rows = _open(datasets, options)
    except (DataError, ConfigError):
        raise
    # datasets raises what it, the network and its readers raise
    except Exception as fault:
        raise DataError(f"hf {options.name} cannot be opened: {type(fault).__name__}: {fault}") from None
    return (HubStream if options.stream else HubRows)(options, field, rows, source_field)


def _open(datasets: Any, options: HubOptions) -> Any:
    folder = Path(options.name)
    saved_dict, saved = ((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not (saved or saved_dict):
        return datasets.load_dataset(options.name, options.config, split=options.split or "train",
                                     streaming=options.stream)
    for name, value in (("hf_config", options.config), ("stream", options.stream or None),
                        ("hf_split", None if saved_dict else options.split)):
        if value is not None:
            raise ConfigError(f"{name} ({value}) has no effect on {folder}, which `save_to_disk` wrote; remove it.")
    found = datasets.load_from_disk(str(folder))
    if saved:
        return found
    split = options.split or "train"
    if split not in found:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(repr, found))}. Name one with "
                        "--hf-split.")
    return found[split]


def _description(options: HubOptions, field: str) -> dict[str, Any]:
    return {"kind": "hf", "name": options.name, "config": options.config, "split": options.split or "train",
            "rows": options.rows, "stream": options.stream, "field": field}


def _row(source: str, number: int) -> str:
    return f"{source} row {number}"


def _names(number: int) -> tuple[str, str]:
    return f"stream-{number:06d}.jsonl", f"stream-{number:06d}.json"


def _laid_down(work: Work) -> tuple[list[Path], int, Any, bool]:
    """The stream's whole parts; rows in them; the state of the stream behind them; whether that is its end.

    A damaged state takes its part along: the stream goes on behind the part before.
    """
    files: list[Path] = []
    while all(work.has(name) for name in _names(len(files))):
        files.append(work.path / _names(len(files))[0])
    if not files:
        return files, 0, None, False
    path = work.path / _names(len(files) - 1)[1]
    try:
        known = json.loads(path.read_bytes())
        return files, int(known["rows"]), known["stream"], bool(known["ended"])
    except (ValueError, KeyError, TypeError) as fault:
        raise damaged(path, f"{type(fault).__name__}: {fault}") from None
