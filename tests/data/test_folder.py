"""A data folder whose parts do not belong together, or not to the model, is refused."""

import shutil

import pytest

from hinny import tokenizer
from hinny.data.folder import DataFolder
from hinny.errors import ConfigError, DataError


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_tokenizer_that_does_not_match_the_shards_is_refused(folder, tmp_path):
    changed = copied(folder, tmp_path)
    tokenizer.ByteTokenizer().save(changed)
    with pytest.raises(DataError, match=r"its tokenizer .* is not the one its shards were made with"):
        DataFolder(str(changed), 600)


def test_a_model_with_too_small_a_vocabulary_is_refused(folder):
    assert DataFolder(str(folder), 601).record["vocab_size"] == 600
    with pytest.raises(DataError, match=r"has 600 tokens, but model.vocab_size is 599; set it to at least 600"):
        DataFolder(str(folder), 599)


def test_a_shard_of_other_data_is_refused(folder, tmp_path):
    changed = copied(folder, tmp_path)
    for ending in ("bin", "idx"):
        shutil.copy(folder / f"heldout.{ending}", changed / f"train.{ending}")
    with pytest.raises(DataError, match=r"train\.idx: tokens \d+, but data.json says \d+"):
        DataFolder(str(changed), 600).shard("train")


def test_a_missing_or_damaged_data_json_is_refused(folder, tmp_path):
    changed = copied(folder, tmp_path)
    (changed / "data.json").write_text('{"fingerprint": "x"}')
    with pytest.raises(DataError, match=r"data\.json: lacks .*vocab_size"):
        DataFolder(str(changed), 600)
    (changed / "data.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        DataFolder(str(changed), 600)
    (changed / "data.json").unlink()
    with pytest.raises(DataError, match=r"make a data folder with `hinny prepare`"):
        DataFolder(str(changed), 600)
    with pytest.raises(ConfigError, match=r"data.path is not set"):
        DataFolder(None, 600)
