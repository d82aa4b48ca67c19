"""Two GPUs that share a model answer as one does, by one-shot sums and by NCCL's, recorded in graphs or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("pydantic", reason="hinny.model reads recipes")

from ranks import run_ranks
from small import small_config
from torch import Tensor

from hinny import load_recipe
from hinny.infer.head import logits
from hinny.infer.parts import Part
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.runner import ModelRunner
from hinny.infer.sums import ONE_SHOT_BYTES, How, Sums
from hinny.infer.tensor import Head, random_model, tensor_parallel
from hinny.model import Model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
V = 64
STEPS = 40
HOWS: tuple[How, ...] = ("one-shot", "collective")


def _made(how: How) -> Sums:
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    return Sums(dist.new_group(backend="nccl"), device, how)


def _model(pattern: str) -> Model:
    model = Model(small_config(pattern, d_model=128, vocab_size=V))
    model.init_weights(0)
    return model.eval().requires_grad_(False)


def _answers() -> dict[str, Any]:
    """The largest relative difference of logits to one GPU's, over prompts and single tokens, in float32."""
    found = {}
    for how in HOWS:
        sums = _made(how)
        for pattern in ("1", "M", "*-", "M-M*-"):
            whole, part = _model(pattern).to(sums.device), _model(pattern)
            tensor_parallel(part, sums)
            part.to(sums.device)
            head, states = Head(part, V - 3, sums), (whole.init_state(2), part.init_state(2))
            tokens = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(0)).to(sums.device)
            gaps = []
            for piece in tokens.split([7, 3, 1, 1], 1):
                expected = logits(whole.hidden(piece, states[0])[:, -1], whole.output_weight[:V - 3])
                answer = head(part.hidden(piece, states[1])[:, -1])
                gaps.append(((answer - expected).abs().max() / expected.abs().max()).item())
            found[f"{pattern} {how}"] = max(gaps)
    return found


def _recorded() -> dict[str, bool]:
    """Whether chains of sums, recorded and replayed with new numbers, find what their parts add up to, bit for bit."""
    found = {}
    for how in HOWS:
        sums = _made(how)
        for count in (4096, ONE_SHOT_BYTES // 2, ONE_SHOT_BYTES):
            x = torch.zeros(count, dtype=torch.bfloat16, device=sums.device)

            def chain(x: Tensor = x, sums: Sums = sums) -> list[Tensor]:
                # the second sum begins while another rank may still be at the end of the first
                return [sums(x * factor) for factor in (1, 2, 4)]

            chain()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                totals = chain()
            right = True
            for replay in range(20):
                parts = [torch.randn(count, generator=torch.Generator().manual_seed(2 * replay + rank)).bfloat16()
                         for rank in range(2)]
                x.copy_(parts[sums.rank])
                graph.replay()
                expected = parts[0] + parts[1]
                right &= all(torch.equal(total.cpu(), expected * factor)
                             for total, factor in zip(totals, (1, 2, 4), strict=True))
            found[f"{how} {count}"] = right
    return found


def _gathered() -> bool:
    """Whether columns gathered in a graph, replayed with new numbers, are those of both ranks: 32 rows of 128,000."""
    sums = _made("one-shot")
    x = torch.zeros(32, 128000, device=sums.device)
    sums.gather(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = [sums.gather(x).clone(), sums.gather(-x)]
    right = True
    for replay in range(20):
        x.normal_(generator=torch.Generator(sums.device).manual_seed(2 * replay + sums.rank))
        graph.replay()
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x, group=sums.group)
        right &= torch.equal(found[0], torch.cat(parts, 1)) and torch.equal(found[1], -torch.cat(parts, 1))
    return right


def _odd() -> bool:
    """Sums that one kernel cannot do: a number of bytes that threads do not move, a type that it does not know."""
    sums = _made("one-shot")
    totals = [sums(torch.ones(3, device=sums.device)), sums(torch.ones(8, dtype=torch.float64, device=sums.device)),
              sums(torch.ones(9, device=sums.device)[1:])]
    return all(bool((total == 2).all()) for total in totals)


def _made_apart() -> dict[str, Any]:
    """A model that was never whole, and what is held of it on this GPU."""
    sums = _made("auto")
    before = torch.cuda.memory_allocated()
    model = random_model(small_config("M-M*-", d_model=256, vocab_size=4096), sums)
    held = torch.cuda.memory_allocated() - before
    hidden = model.hidden(torch.arange(8, device=sums.device)[None])
    return {"finite": bool(hidden.isfinite().all()), "type": hidden.dtype, "one-shot": sums.one_shot,
            "bytes": held, "needed": sum(p.nbytes for p in model.parameters())}


def _decoded() -> dict[str, tuple[float, float]]:
    """How far recorded steps over pools are from one GPU in float32: those of two GPUs, and a plain pass in bfloat16.

    Few rows a step: the ranks' sums are made together with the norms behind them.
    """
    found = {}
    for how in HOWS:
        sums = _made(how)
        for name in ("130m-hybrid", "130m-transformer", "130m-mamba"):
            config = load_recipe(name, ["model.vocab_size=1024"]).model
            exact = Model(config)
            exact.init_weights(0)
            exact.requires_grad_(False)
            short = copy.deepcopy(exact)
            to_bfloat16(short)
            part = copy.deepcopy(short)
            tensor_parallel(part, sums)
            prepare(part.to(sums.device))
            exact, short = exact.to(sums.device), short.to(sums.device)
            runner = ModelRunner(part, slots=4, pages=12, head=Head(part, 1024, sums), sums=sums, words=1024)
            texts = torch.randint(1024, (3, STEPS), generator=torch.Generator().manual_seed(5)).tolist()
            answers = []
            for slot in range(3):
                runner.clear_slot(slot)
            for step in range(STEPS):
                rows = runner.run([Part(i, [3 * i, 3 * i + 1], step, [text[step]]) for i, text in enumerate(texts)])
                answers.append(rows.clone())
            tokens = torch.tensor(texts, device=sums.device)
            wanted, got = exact(tokens), torch.stack(answers, 1)
            found[f"{name} {how}"] = tuple(((x.float() - wanted).norm() / wanted.norm()).item()
                                           for x in (got, short(tokens)))
    return found


def test_recorded_steps_of_two_gpus_are_as_near_to_float32_as_a_plain_pass() -> None:
    for found in run_ranks(2, _decoded):
        for name, (far, near) in found.items():
            assert far < 1.5 * near + 1e-3, (name, far, near)


def test_two_gpus_answer_as_one() -> None:
    for found in run_ranks(2, _answers):
        # sums of other orders in float32, TF32 off
        assert max(found.values()) < 1e-4, found


def test_recorded_sums_are_those_of_the_parts() -> None:
    for found in run_ranks(2, _recorded):
        assert all(found.values()), found
    assert run_ranks(2, _odd) == [True, True]
    assert run_ranks(2, _gathered) == [True, True]


def test_a_part_is_made_without_the_whole() -> None:
    for found in run_ranks(2, _made_apart):
        assert found["finite"]
        assert found["type"] == torch.bfloat16
        assert found["one-shot"]
        # the allocator rounds up every tensor
        assert found["bytes"] < 1.2 * found["needed"] + (1 << 16)
