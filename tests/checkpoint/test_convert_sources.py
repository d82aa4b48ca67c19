"""A Hub id is downloaded at one commit, what makes up its checkpoint and nothing else."""

import sys
import types

import pytest

import hinny
from hinny.checkpoint import sources
from hinny.errors import CheckpointError
from hinny.run import Run


class Hub(types.ModuleType):
    """Stands for huggingface_hub: one repository, in a folder."""

    def __init__(self, folder, files):
        super().__init__("huggingface_hub")
        self.folder, self.files, self.asked = folder, files, []
        self.HfApi = lambda: self

    def model_info(self, name, revision=None):
        self.asked.append((name, revision))
        if name == "no/such":
            raise RuntimeError("404 Client Error.\nmore")
        return types.SimpleNamespace(sha="abc123", siblings=[types.SimpleNamespace(rfilename=f) for f in self.files])

    def snapshot_download(self, name, revision, allow_patterns):
        self.asked.append((revision, allow_patterns))
        return str(self.folder)


def test_a_hub_id_is_downloaded_at_one_commit(source, tmp_path, monkeypatch):
    hub = Hub(source, ["README.md", "fake.txt", "config.json", "model.safetensors", "pytorch_model.bin"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    record = hinny.convert("owner/name@v2", tmp_path / "run")
    assert hub.asked == [("owner/name", "v2"), ("abc123", ["config.json", "model.safetensors"])]
    assert (record["hub"], record["revision"]) == ("owner/name", "abc123")
    assert "owner/name@abc123" in Run(tmp_path / "run").recipe.description
    with pytest.raises(CheckpointError, match=r"cannot be downloaded.*404 Client Error.*hf download no/such --loc"):
        hinny.convert("no/such", tmp_path / "other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'hinny\[hub\]'.*download a/b --revision c --local-dir b"):
        hinny.convert("a/b@c", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no folder, and no Hub id"):
        hinny.convert("no-such-folder", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no folder, and no Hub id"):
        hinny.convert("../absent", tmp_path / "other")
    with pytest.raises(CheckpointError, match="is a file"):
        hinny.convert(source / "fake.txt", tmp_path / "other")


def test_of_a_repository_one_kind_of_weights_is_taken():
    megatron = ["README.md", "latest_checkpointed_iteration.txt", "words.model",
                "release/mp_rank_00/model_optim_rng.pt"]
    assert sources.chosen(megatron) == megatron[1:]
    both = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "original/consolidated.pth", "onnx/model.safetensors", "optimizer.pt", "tokenizer.json"]
    assert sources.chosen(both) == ["config.json", "model.safetensors.index.json", "tokenizer.json",
                                    "model-1.safetensors"]
    twice = ["model-1.safetensors", "consolidated.safetensors", "iter_0000100/.metadata", "optimizer.pt"]
    assert sources.chosen(twice) == twice[:1]
    parts = ["iter_0000100/.metadata", "iter_0000100/__0_0.distcp", "iter_0000100/common.pt",
             "iter_0000100/metadata.json"]
    assert sorted(sources.chosen([*parts, "optimizer.pt"])) == sorted(parts)
