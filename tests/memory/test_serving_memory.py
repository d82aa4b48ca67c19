"""What the pools of an engine are said to hold is what they hold."""

from __future__ import annotations

import pytest
import torch
from small import small_config, small_model

from hinny.errors import ConfigError
from hinny.infer.pool import Pool
from hinny.memory.serving import pool_sizes, slot_bytes

ASKED = {"sequences": 3, "context": 21, "snapshots": 2, "drafts": True, "page": 4, "width": 4}


@pytest.mark.parametrize("pattern", ["M-*-1", "*-", "M", "1-"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_predicted_pools_have_the_bytes_of_real_ones(pattern, state):
    sizes = pool_sizes(small_config(pattern), **ASKED, state_width=state.itemsize)
    pool = Pool(small_model(pattern).float(), sizes.slots, sizes.pages, sizes.page, state)
    assert (sizes.slot_bytes, sizes.page_bytes) == (pool.slot_bytes, pool.page_bytes)
    assert sizes.bytes == sum(tensor.nbytes for tensor in pool.tensors())


def test_slots_are_for_sequences_their_drafts_and_snapshots_and_pages_for_whole_contexts():
    sizes = pool_sizes(small_config("M*"), **ASKED)
    assert (sizes.slots, sizes.pages) == (3 + 3 + 2, 3 * 6)
    assert pool_sizes(small_config("M*"), **ASKED | {"drafts": False}).slots == 5
    assert pool_sizes(small_config("*"), **ASKED).slots == 3, "no state: a slot is a number"
    assert pool_sizes(small_config("M"), **ASKED).pages == 0


def test_a_budget_is_filled_with_pages_and_never_passed():
    config = small_config("M*")
    free = pool_sizes(config, **ASKED)
    for budget in (free.bytes, free.bytes + 3 * free.page_bytes + 1, free.bytes - 1):
        sizes = pool_sizes(config, **ASKED, budget=budget)
        assert sizes.bytes <= budget < sizes.bytes + sizes.page_bytes
    least = free.slots * free.slot_bytes + 6 * free.page_bytes
    assert pool_sizes(config, **ASKED, budget=least).pages == 6
    with pytest.raises(ConfigError, match=f"memory is {least - 1:,} bytes, .* need {least:,}"):
        pool_sizes(config, **ASKED, budget=least - 1)


def test_the_hybrids_state_is_the_papers_beside_its_convolutions():
    from hinny import load_recipe

    model = load_recipe("8b-hybrid").model
    # 24 layers of 128 heads of 64 x 128, and of 10,240 channels with three inputs
    assert slot_bytes(model) == 24 * 4 * (128 * 64 * 128 + 10240 * 3)
    assert slot_bytes(model, state_width=2) == 24 * (2 * 128 * 64 * 128 + 4 * 10240 * 3)
