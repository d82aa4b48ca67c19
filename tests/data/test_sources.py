"""Texts are taken in a fixed order, and each kind of bad text is refused by name and place."""

import json
import pathlib
import sys

import pytest

from hinny.data.sources import JSONLines, StandardLibrary, TextFiles, open_source
from hinny.errors import ConfigError, DataError


def names(source):
    return [document.name for document in source.documents()]


def test_the_standard_library_gives_its_modules_and_help_topics_but_no_tests_or_packages():
    source = StandardLibrary()
    documents = {d.name: d.data for d in source.documents()}
    assert documents["dataclasses.py"] == pathlib.Path(sys.modules["dataclasses"].__file__).read_bytes()
    assert b"else" in documents["pydoc topic if"]
    assert not any({"test", "tests", "site-packages", "pydoc_data"} & set(name.split("/")) for name in documents)
    assert list(documents) == names(source)
    assert sum(map(len, documents.values())) > 5_000_000
    found = source.description()
    assert found["files"] + found["topics"] == len(documents)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_folder_gives_its_text_files_in_order_and_nothing_hidden(tmp_path):
    for name in ("b/z.md", "b/a.txt", "c.PY", "a.txt", "picture.png", ".git/x.txt", "b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [pathlib.Path(n).relative_to(tmp_path).as_posix() for n in names(TextFiles([tmp_path]))] == [
        "a.txt", "b/a.txt", "b/z.md", "c.PY"]
    # a file that is named itself may end in anything
    assert names(TextFiles([tmp_path / "picture.png"])) == [str(tmp_path / "picture.png")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert [d.data for d in TextFiles([tmp_path]).documents()] == [b"abc"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b" \n\t\n", "is empty"),
    (b"text\x00more", "NUL byte at offset 4: binary, not text"),
    (b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8"),
])
def test_empty_and_binary_files_are_refused_by_name_and_place(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        TextFiles([tmp_path / "bad.txt"])
    assert "bad.txt" in str(refusal.value)


def test_a_binary_file_in_a_folder_is_refused_too(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.txt").write_bytes(b"\x89PNG\x00")
    with pytest.raises(DataError, match=r"bad\.txt: NUL byte at offset 4"):
        names(TextFiles([tmp_path]))


def test_missing_paths_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        TextFiles([tmp_path / "absent.txt"])
    with pytest.raises(DataError, match="no text in this folder"):
        TextFiles([tmp_path])
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        names(JSONLines([tmp_path / "absent.jsonl"], "text"))


def test_a_file_without_read_permission_is_refused(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("text")
    source = TextFiles([tmp_path / "secret.txt"])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"secret\.txt: cannot be read: Permission denied"):
        names(source)


def test_a_folder_without_read_permission_is_refused_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    scandir = __import__("os").scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"locked: cannot be read: Permission denied"):
        TextFiles([tmp_path])


def test_json_lines_give_the_named_field(tmp_path):
    lines = [{"text": "one é", "id": 1}, {"id": 2, "text": "two\nlines"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    source = JSONLines([tmp_path / "a.jsonl"], "text")
    assert [d.data.decode() for d in source.documents()] == ["one é", "two\nlines"]


@pytest.mark.parametrize(("line", "message"), [
    (b'{"text": "a"', "line 2: not JSON"),
    (b'["text"]', "line 2: a JSON list, expected an object with field 'text'"),
    (b'{"body": "a", "id": 3}', "line 2: no field 'text'; it has 'body', 'id'"),
    (b'{"text": 7}', "line 2: field 'text' is a int, expected text"),
    (b'{"text": "a\\u0000b"}', "line 2: field 'text' has a NUL character at 1"),
    (b'{"text": "\\ud800"}', "line 2: field 'text' has half a surrogate pair at character 0"),
    (b'{"text": "\xe9"}', "line 2: byte 0xe9 at offset 10 is not UTF-8"),
])
def test_a_bad_json_line_is_refused_by_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as refusal:
        names(JSONLines([tmp_path / "a.jsonl"], "text"))
    assert "a.jsonl" in str(refusal.value)


@pytest.mark.parametrize(("arguments", "message"), [
    ((["a"], ["b"], "text"), "text and jsonl are both given"),
    ((None, ["b"], None), "jsonl needs field"),
    ((["a"], None, "text"), "field 'text' has no effect without jsonl or hf"),
])
def test_arguments_that_exclude_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        open_source(*arguments)
