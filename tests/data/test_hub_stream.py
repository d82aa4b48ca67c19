"""Streams of Hugging Face data sets, by a stand-in for the package, go on where they broke off."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from stand_in_hub import OPTIONS, ROWS, Stream, shards

from hinny.data.prepare import prepare
from hinny.errors import DataError


def test_a_stream_that_breaks_off_goes_on_behind_its_last_part(datasets, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hinny.data.hub.STREAM_BYTES", 900)
    datasets.stream = Stream(ROWS, breaks_at=33)
    with pytest.raises(DataError, match=r"some/name: the stream broke off at row 33: TimeoutError: the Hub did not "
                                        r"answer\. What is finished stays in .*\.d\.parts"):
        prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    first = datasets.stream.served
    datasets.stream = again = Stream(ROWS)
    prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert shards(tmp_path / "d") == expected
    # parts are some six rows: only what lay behind the last one came twice
    assert len(first) == 33
    assert 20 < again.served[0] <= 33
    assert again.served == list(range(again.served[0], 60))


def test_a_stream_that_was_laid_down_is_not_asked_for_again(datasets, expected, tmp_path) -> None:
    def stop(stage: str, share: float) -> None:
        if stage == "join":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS, progress=stop)
    datasets.stream = again = Stream([])
    prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert again.served == []
    assert shards(tmp_path / "d") == expected


def _stopped(out: Path, at: str) -> None:
    """A stream that is on the disk, and no more than that or all but the last step."""
    def stop(stage: str, share: float) -> None:
        if stage == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(out, hf="some/name", stream=True, **OPTIONS, progress=stop)


@pytest.mark.parametrize("content", [b'{"rows": 1', b"[]", b"{}", b"\0" * 40])
def test_a_damaged_state_of_the_stream_costs_its_part_alone(datasets, expected, tmp_path, monkeypatch,
                                                            content) -> None:
    monkeypatch.setattr("hinny.data.hub.STREAM_BYTES", 900)
    _stopped(tmp_path / "d", "join")
    states = sorted((tmp_path / ".d.parts").glob("stream-*.json"))
    rows = json.loads(states[-2].read_bytes())["rows"]
    states[-1].write_bytes(content)
    left = set(os.listdir(tmp_path / ".d.parts"))
    datasets.stream = again = Stream(ROWS)
    with pytest.raises(DataError, match=rf"{states[-1].name}: damaged: .* the same command goes on"):
        prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert set(os.listdir(tmp_path / ".d.parts")) == left - {states[-1].name}
    assert again.served == []
    prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert again.served == list(range(rows, 60))
    assert shards(tmp_path / "d") == expected


def test_damaged_text_of_a_stream_is_read_again_from_there(datasets, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hinny.data.hub.STREAM_BYTES", 900)
    _stopped(tmp_path / "d", "read")
    kept = tmp_path / ".d.parts"
    rows = json.loads((kept / "stream-000002.json").read_bytes())["rows"]
    (kept / "stream-000003.jsonl").write_bytes(b"\0" * 900)
    datasets.stream = again = Stream(ROWS)
    with pytest.raises(DataError, match=r"stream-000003\.jsonl: damaged: .*line 1.* the same command goes on"):
        prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert again.served == list(range(rows, 60))
    assert shards(tmp_path / "d") == expected


def test_a_finished_stream_is_found_again_without_reading_it(datasets, tmp_path) -> None:
    first = prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    datasets.stream = again = Stream(ROWS)
    seen = []
    found = prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS,
                    progress=lambda stage, share: seen.append((stage, share)))
    assert (found, seen, again.served) == ({**first, "reused": True}, [("reused", 1.0)], [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other exists and is no data folder"):
        prepare(tmp_path / "other", hf="some/name", stream=True, **OPTIONS)
    assert again.served == []
    # in other words it may be the same or not: that is seen when it is there
    with pytest.raises(DataError, match="d holds other data"):
        prepare(tmp_path / "d", hf="some/name", stream=True, **{**OPTIONS, "held_out": 0.3})
    assert again.served == list(range(60))
    # a damaged folder is no finished one
    (tmp_path / "d" / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin: 0 bytes"):
        prepare(tmp_path / "d", hf="some/name", stream=True, **OPTIONS)
    assert sorted(os.listdir(tmp_path)) == ["d", "other"]
