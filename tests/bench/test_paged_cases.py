"""The cases of attention over pages: they call the ops with what fits, and their bytes are those of the keys."""

from __future__ import annotations

import pytest
import torch

from hinny.bench.kernel_cases import Case, paged
from hinny.bench.kernel_cases.case import Draw
from hinny.bench.kernel_check import results_of
from hinny.ops import attention

CPU = torch.device("cpu")


def test_a_case_attends_to_all_keys_of_its_rows() -> None:
    case = paged.attention_case(b=2, h=4, g=2, p=8, keys=10, page=4)
    inputs = case.inputs(Draw(CPU, 1))
    assert inputs["lengths"].tolist() == [10, 10]
    assert inputs["tables"].flatten().sort().values.tolist() == list(range(6))
    found = results_of(case, case.ours, inputs)["output 0"]
    for row, table in enumerate(inputs["tables"].tolist()):
        k, v = (torch.cat([inputs[name][page] for page in table], 1)[:, :10].transpose(0, 1)[None]
                for name in ("k_pages", "v_pages"))
        torch.testing.assert_close(found[row:row + 1], attention(inputs["q"][row:row + 1], k, v), rtol=0.02, atol=0.01)


def test_a_case_writes_every_key_once() -> None:
    case = paged.write_case(tokens=5, g=2, p=8, page=4)
    inputs = case.inputs(Draw(CPU, 1))
    assert len(set(inputs["places"].tolist())) == 5
    found = results_of(case, case.ours, inputs)
    changed = (found["the new v_pages"] != inputs["v_pages"]).any(-1).any(1)  # (pages page)
    assert changed.flatten().nonzero().flatten().tolist() == sorted(inputs["places"].tolist())


@pytest.mark.parametrize("case", paged.cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_a_floor_is_that_of_the_bytes_of_the_keys(case: Case) -> None:
    sizes = {key: int(value) for key, value in (part.split("=") for part in case.shape.split())}
    if case.what == "paged_attention":
        keys = 2 * 2 * sizes["b"] * sizes["keys"] * sizes["g"] * sizes["p"]
        assert keys < case.moved < 1.01 * keys
    else:
        assert case.moved == 8 * sizes["tokens"] * sizes["g"] * sizes["p"]
