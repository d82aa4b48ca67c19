"""Hugging Face data sets, by a stand-in for the package: rows as documents, and what is refused."""

from __future__ import annotations

import os
import sys

import pytest
from stand_in_hub import OPTIONS, ROWS, Stream, Table, shards

from hinny.data import hub
from hinny.data.prepare import prepare
from hinny.errors import ConfigError, DataError


def test_rows_are_documents_in_pieces_of_any_size(datasets) -> None:
    source = hub.open_hub(hub.HubOptions("some/name", "sample", "train"), "text")
    assert datasets.calls == [("some/name", "sample", "train", False)]
    for piece_bytes in (1, 500, 3000, 10**6):
        pieces = list(source.pieces(piece_bytes))
        documents = [document for piece in pieces for document in piece.documents()]
        assert [document.data.decode() for document in documents] == [row["text"] for row in ROWS]
        assert documents[33].name == "some/name row 33"
        assert sum(piece.size for piece in pieces) == source.size()
    assert [len(list(source.pieces(n))) for n in (1, 10**6)] == [60, 1]


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"hf_split": "train"}])
def test_the_shards_are_those_of_the_same_json_lines(datasets, expected, tmp_path, monkeypatch, options) -> None:
    monkeypatch.setattr("hinny.data.hub.STREAM_BYTES", 900)
    monkeypatch.setattr("hinny.data.hub.ROWS_TOLD", 5)
    seen = []
    record = prepare(tmp_path / "d", hf="some/name", **options, **OPTIONS,
                     progress=lambda stage, share: seen.append((stage, share)))
    assert shards(tmp_path / "d") == expected
    assert record["source"] == {"kind": "hf", "name": "some/name", "config": None, "split": "train", "rows": None,
                                "stream": "stream" in options, "field": "text", "documents": 60, "empty": 0}
    shares = [share for stage, share in seen if stage == "stream"]
    assert shares == sorted(shares)
    assert (len(shares) > 8) == ("stream" in options)
    assert sorted(os.listdir(tmp_path)) == ["d", "same", "same.jsonl"]


@pytest.mark.parametrize(("marker", "split", "documents"), [("state.json", None, 60), ("dataset_dict.json", None, 60),
                                                            ("dataset_dict.json", "validation", 40)])
def test_a_folder_of_save_to_disk_is_opened_as_one(datasets, tmp_path, marker, split, documents) -> None:
    (tmp_path / marker).write_text("{}")
    source = hub.open_hub(hub.HubOptions(str(tmp_path), split=split), "text")
    assert datasets.calls == []
    assert len(list(source.documents())) == documents


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_rows_alone_are_taken(datasets, tmp_path, stream) -> None:
    record = prepare(tmp_path / "d", hf="some/name", hf_rows=25, stream=stream, **OPTIONS)
    assert record["source"]["documents"] == 25
    # and not a row more is asked for
    assert datasets.stream.served == (list(range(25)) if stream else [])


def test_another_data_set_is_refused_beside_the_parts_of_one(datasets, tmp_path) -> None:
    def stop(stage: str, share: float) -> None:
        if stage == "join":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "d", hf="some/name", **OPTIONS, progress=stop)
    with pytest.raises(DataError, match="split: 'train' there, 'validation' now; rows in all: 60 there, 40 now"):
        prepare(tmp_path / "d", hf="some/name", hf_split="validation", **OPTIONS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("row", "message"), [
    ({"text": None, "id": 3}, "some/name row 2: field 'text' is a NoneType, expected text"),
    ({"text": "a\0b", "id": 3}, "some/name row 2: field 'text' has a NUL character at 1"),
])
def test_a_row_without_text_is_refused_by_its_number(datasets, tmp_path, stream, row, message) -> None:
    rows = [*ROWS[:2], row, *ROWS[3:]]
    datasets.stream = Stream(rows)
    datasets.load_dataset = lambda *names, streaming, **more: datasets.stream if streaming else Table(rows)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "d", hf="some/name", stream=stream, **OPTIONS)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(("options", "message"), [
    ({"hf": "some/name", "hf_split": "tset"}, r"hf some/name cannot be opened: ValueError: Unknown split 'tset'"),
    ({"hf": "some/name", "field": "body"}, "some/name: no field 'body'; its rows have 'text', 'id'"),
    ({"hf": "some/name", "field": "body", "stream": True}, "row 0: no field 'body'; it has 'text', 'id'"),
    ({"hf": "DICT", "hf_split": "tset"}, "has no split 'tset'; it has 'train', 'validation'"),
])
def test_what_a_data_set_has_not_is_refused_by_name(tmp_path, options, message) -> None:
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    options["hf"] = options["hf"].replace("DICT", str(tmp_path / "dict"))
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "d", **options, **OPTIONS)
    assert os.listdir(tmp_path) == ["dict"]


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(("options", "message"), [
    ({"hf_config": "c"}, r"hf_config \(c\) has no effect without hf"),
    ({"hf_split": "train"}, r"hf_split \(train\) has no effect without hf"),
    ({"hf_rows": 9}, r"hf_rows \(9\) has no effect without hf"),
    ({"stream": True}, r"stream \(True\) has no effect without hf"),
    ({"hf": "a", "hf_rows": 0}, "hf_rows is 0; it must be at least 1"),
    ({"hf": "a", "text": ["b"]}, "text and hf are both given"),
    ({"hf": "SAVED", "stream": True}, r"stream \(True\) has no effect on .*saved"),
    ({"hf": "SAVED", "hf_split": "train"}, r"hf_split \(train\) has no effect on .*saved"),
    ({"hf": "SAVED", "hf_config": "c"}, r"hf_config \(c\) has no effect on .*saved"),
    ({"hf": "a", "megatron": "b"}, r"hf \(a\) has no effect with megatron"),
    ({"workers": 2, "megatron": "b"}, r"workers \(2\) has no effect with megatron"),
])
def test_options_that_have_no_say_are_refused(tmp_path, options, message) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    if "hf" in options:
        options["hf"] = options["hf"].replace("SAVED", str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "d", **options, **OPTIONS)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf some/name needs the package datasets: pip install 'hinny\[data\]'"):
        prepare(tmp_path / "d", hf="some/name", **OPTIONS)
