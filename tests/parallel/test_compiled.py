"""Compiled blocks: the same results, under the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small import small_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from hinny import counts
from hinny.config import ParallelConfig
from hinny.errors import ConfigError
from hinny.objective import Objective
from hinny.parallel.compiled import GRAPHS, apply_compile
from hinny.parallel.recompute import apply_recompute
from hinny.train.segments import in_segments

# the compiler looks at every attribute of what it traces, and PyTorch warns of some
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def _gradients(objective: Objective) -> dict[str, Tensor]:
    tokens = torch.arange(30).view(2, 15)
    segments = torch.tensor([0] * 6 + [1] * 9).expand(2, 15)
    for given in (None, segments):
        objective(tokens, tokens.flip(1), torch.ones(2, 15, dtype=torch.bool), given)[0].backward()
    return {name: p.grad for name, p in objective.named_parameters()}


@pytest.mark.parametrize("recompute", [None, "full"])
def test_compiled_blocks_have_the_gradients_of_plain_ones(recompute: str | None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    expected = _gradients(Objective(small_model("*-*-")))
    objective = Objective(small_model("*-*-"))
    if recompute is not None:
        apply_recompute(objective, recompute)
    apply_compile(objective, backend)
    found = _gradients(objective)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
    # blocks of one kind share their graphs
    assert 0 < len(graphs) < GRAPHS
    of_products = [graph for graph in graphs if any("linear" in str(node.target) for node in graph.graph.nodes)]
    assert of_products


def test_a_block_is_one_graph_forward_and_backward() -> None:
    # through the tracer of forward and backward together
    expected, found = (_gradients(Objective(small_model("--"))), Objective(small_model("--")))
    apply_compile(found, "aot_eager")
    assert "forward" in vars(found.model.blocks[0])
    for name, gradient in _gradients(found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_selective_recomputation_is_refused() -> None:
    objective = Objective(small_model("-"))
    apply_recompute(objective, "selective")
    with pytest.raises(ConfigError, match=r'parallel\.compile is true and parallel\.recompute is "selective"'):
        apply_compile(objective)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_compiled_blocks_carry_states_with_graphs_for_any_number_of_segments(recompute: str | None) -> None:
    def trained(objective: Objective, segments: int) -> dict[str, Tensor]:
        tokens = torch.arange(6 * segments).remainder(37).expand(2, -1)
        inputs = (tokens, tokens.flip(1), torch.ones_like(tokens, dtype=torch.bool), tokens // 4)
        for piece, carried in in_segments(inputs, 6, objective.model.carry()):
            objective(*piece, carried)[0].backward()
        return {name: p.grad for name, p in objective.named_parameters()}

    plain, objective = Objective(small_model("1-")), Objective(small_model("1-"))
    if recompute is not None:
        apply_recompute(objective, recompute)
    apply_compile(objective, "eager")
    for segments in (3, 6):
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        expected = trained(plain, segments)
        for name, gradient in trained(objective, segments).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    assert 0 < made == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_block_that_runs_again_makes_its_last_product_too() -> None:
    """As counts.recomputed_flops says; one that is not compiled leaves it out."""
    ran: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        products = sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)

        def run(*given: Any) -> Any:
            ran.append(products)
            return graph(*given)

        return run

    objective = Objective(small_model("-"))
    apply_recompute(objective, "full")
    apply_compile(objective, aot_autograd(fw_compiler=counted, bw_compiler=lambda graph, inputs: graph))
    tokens = torch.arange(30).view(2, 15)
    objective(tokens, tokens.flip(1), torch.ones(2, 15, dtype=torch.bool))[0].backward()
    assert ran == [2, 2]
    flops = [counts.recomputed_flops(objective.model.config, 15, ParallelConfig(recompute="full", compile=compile))
             for compile in (False, True)]
    assert flops == [2 * 16 * 24, 2 * 2 * 16 * 24]
