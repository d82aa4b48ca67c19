"""Many ranks write one checkpoint and read one that any other ranks wrote; what fails on one of them fails on all."""

import pytest
from rank_journeys import LAYOUTS, journeys
from ranks import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four ranks found."""
    return run_ranks(4, journeys, tmp_path_factory.mktemp("ranks"))


def same(found, *keys):
    """What all ranks found alike."""
    for key in keys:
        found = [one[key] for one in found]
    assert all(one == found[0] for one in found)
    return found[0]


def test_two_ranks_then_one_then_four_have_the_same_weights_moments_and_steps_bit_for_bit(found):
    assert found[0]["resumed"]["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert found[0]["resumed"]["one"] == []
    for layout in LAYOUTS:
        assert found[0]["resumed"][f"{layout}, one process"] == []
        for one in found:
            assert one["resumed"][f"{layout}, loaded"] == []
            assert one["resumed"][f"{layout}, loaded again"] == []


def test_stages_with_different_weights_make_one_checkpoint_that_other_stages_load(found):
    assert found[0]["stages"]["one"] == []
    names = [name for one in found for name in one["stages"]["names"]]
    assert len(set(names)) == len(names)  # disjoint
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2", "3"}
    assert all(one["stages"]["quarters"] == [] for one in found)
    assert "is not a checkpoint of this model" in same(found, "stages", "lacking")


def test_plain_tensors_that_all_ranks_have_are_stored_once(found):
    assert same(found, "replicas") == []


def test_converted_weights_fill_any_cut_of_the_model(found):
    assert [same(found, "converted", layout) for layout in LAYOUTS] == [[], [], []]
    assert "holds converted weights and no optimiser state" in same(found, "converted", "optimiser")
    assert "size of embedding.weight is (37, 16), and the model's is (38, 16)" in same(found, "converted", "wider")


def test_what_is_saved_is_the_state_at_the_start_though_training_goes_on(found):
    assert same(found, "saver", "at first") == (True, None, None)
    for step in (2, 3):
        assert same(found, "saver", f"not agreed {step}") is None
        assert same(found, "saver", f"path {step}") == f"step-{step:08d}"
        assert same(found, "saver", f"saved {step}") == []
    assert same(found, "saver", "folders") == ["step-00000004", "step-00000005"]
    assert same(found, "saver", "kept") is True


@pytest.mark.parametrize("way", ["now", "later"])
def test_a_full_disk_of_one_rank_is_told_by_all_and_leaves_the_last_good_checkpoint(found, way):
    said = same(found, f"full disk, {way}")
    for part in ("checkpoint of step 4 could not be written", "File too large (rank 1 of 4).",
                 "good checkpoint is step-00000002."):
        assert part in said
    assert same(found, f"left, {way}") == ["step-00000002"]


def test_a_folder_that_the_ranks_do_not_share_is_refused(found):
    said = same([one for one in found if one is not found[2]], "unseen")
    assert "__2_0.distcp was written by another rank and is not seen by rank 0" in said
    assert "a disk that all nodes share" in said


@pytest.mark.parametrize(("case", "file"), [
    ("flipped", "__1_0.distcp"), ("cut", "__1_0.distcp"), ("gone", "__1_0.distcp"), ("index", ".metadata"),
    ("meta", "meta.json"), ("torn", "meta.json")])
def test_a_damaged_file_of_any_rank_is_named_by_all_with_the_whole_checkpoint_before(found, case, file):
    said = same(found, "damage", case)
    assert f"step-00000004/{file} is damaged" in said
    assert "The checkpoint before it, step-00000002, is whole" in said


def test_the_restored_file_and_the_checkpoint_before_can_be_loaded(found):
    assert same(found, "damage", "restored") == []
    assert same(found, "damage", "the one before") == []
