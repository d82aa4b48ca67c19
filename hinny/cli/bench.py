"""The verb that measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hinny.cli.shared import Json, Threads, numbers, print_rows, set_threads

ACTING = {
    "train": {"recipe", "against", "steps", "batch", "length", "precision", "threads", "micro_batches", "data",
              "overrides", "markdown"},
    "eval": {"recipe", "against", "steps", "batch", "items", "length", "precision", "only", "threads", "overrides"},
    "generate": {"run", "recipe", "contexts", "batch", "tokens", "threads", "overrides", "prefill", "prompts", "piece",
                 "tensor", "precision", "state_dtype", "against", "peer_context", "calibrate"},
    "kernels": {"against", "only", "markdown"},
    "quality": {"run", "weights", "states", "windows", "length", "threads", "markdown"},
}
"""Bench → options that act on it; what they act on in turn is for the bench to say."""

RECIPES = {"train", "eval"}
"""Benches that need a recipe."""

FILES = {*RECIPES, "quality"}
"""Benches that save into a file whose name ends in .json, and else into a run directory."""


def bench(
    what: Annotated[str, typer.Argument(help="kernels, train, eval, generate or quality.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                          help="With --recipe: changes to it.")] = None,
    recipe: Annotated[str | None, typer.Option(help="train, eval, generate: a recipe's file or shipped name.")] = None,
    run: Annotated[Path | None, typer.Option(help="generate, quality: a run directory, for generate in place of a "
                                                     "recipe.")] = None,
    against: Annotated[str | None, typer.Option(help="train: transformers (extra oracle); generate: transformers, or "
                                                     "transformers-static; kernels: mamba_ssm; eval: lm-eval (extras "
                                                     "eval and oracle).")] = None,
    steps: Annotated[int | None, typer.Option(help="train: steps timed; eval: passes.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="train, generate: sequences at once, for a recipe's "
                                                         "generation may be repeated; eval: the peer's.")] = None,
    items: Annotated[int | None, typer.Option(help="eval: questions of a case.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="train: micro-batches of a rank in a step.")] = None,
    data: Annotated[str | None, typer.Option(help="train: folder made by hinny prepare; else random tokens.")] = None,
    length: Annotated[int | None, typer.Option(help="train, eval, quality: tokens a sequence.")] = None,
    precision: Annotated[str | None, typer.Option(help="With --recipe: fp32 or bf16; generate: also int8, fp8 or "
                                                             "int4, of the layers' projections.")] = None,
    contexts: Annotated[str | None, typer.Option(help="generate: context lengths, such as 64,256,1024.")] = None,
    tokens: Annotated[int | None, typer.Option(help="generate: tokens decoded at each context.")] = None,
    prefill: Annotated[str | None, typer.Option(help="generate: lengths of one prompt that is read.")] = None,
    prompts: Annotated[str | None, typer.Option(help="generate: lengths of prompts that are answered, --batch at "
                                                     "once, by the whole engine.")] = None,
    piece: Annotated[int | None, typer.Option(help="generate: tokens of a prompt read in one pass.")] = None,
    tensor: Annotated[int | None, typer.Option(help="generate: GPUs that the model is cut over, by torchrun.")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="generate: fp32, bf16 or fp16, of the SSM states.")] = None,
    peer_context: Annotated[int | None, typer.Option(help="generate: the longest context of the peer.")] = None,
    calibrate: Annotated[list[Path] | None, typer.Option(help="generate: a file of rows to fit the "
                                                              "prediction's constants to; may be repeated.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="quality: fp32, bf16, int8, fp8 or int4; may be "
                                                           "repeated.")] = None,
    states: Annotated[list[str] | None, typer.Option(help="quality: fp32, bf16 or fp16, of the SSM states; may be "
                                                          "repeated.")] = None,
    windows: Annotated[int | None, typer.Option(help="quality: windows of held-out text.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="kernels: cases, such as 'ssd.*'; eval: choices, "
                                                        "five-shot, distinct, needle; may be repeated.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="kernels, train, quality: a file to write the "
                                                          "table to.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the rows: to this run directory; kernels, and the "
                                                   "others if the name ends in .json: into this file.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time kernels on a GPU, the training step, an evaluation or generation, or measure what shorter weights and states
    cost in quality. Options of another bench are refused.
    """
    from hinny.bench import bench as go

    given: dict[str, Any] = {
        "recipe": recipe, "run": None if run is None else str(run), "against": against, "steps": steps,
        "batch": batch or None, "length": length, "precision": precision, "tokens": tokens, "only": only or None,
        "markdown": markdown, "threads": threads, "micro_batches": micro_batches, "data": data,
        "overrides": overrides or None, "items": items, "piece": piece, "tensor": tensor, "state_dtype": state_dtype,
        "peer_context": peer_context, "calibrate": calibrate or None,
        "weights": weights or None, "states": states or None, "windows": windows,
        **{name: None if value is None else numbers(value, f"--{name}")
           for name, value in (("contexts", contexts), ("prefill", prefill), ("prompts", prompts))}}
    options = {name: value for name, value in given.items() if value is not None}
    _check(what, options)
    set_threads(options.pop("threads", None))
    in_file = save is not None and save.suffix == ".json"
    into_file = what == "kernels" or (what in FILES and in_file) or ("recipe" in options and what == "generate")
    if into_file and what == "generate" and save is not None and not in_file:
        raise typer.BadParameter(f"--save of a recipe's generation is a file whose name ends in .json, not {save}.")
    rows = go(what, **options, **({"save": save} if into_file else {}))
    if not rows:
        return  # of several processes the first has them
    if save is not None and not into_file:
        from hinny.run import Run

        Run(save).save_rows(what, rows)
    print_rows(rows, as_json)


def _check(what: str, options: dict[str, Any]) -> None:
    """Refuses what another bench has, and takes the one batch out of its list for those that have one."""
    if what not in ACTING:
        return  # the bench says which there are
    if idle := sorted(set(options) - ACTING[what]):
        raise typer.BadParameter(f"--{idle[0].replace('_', '-')} has no effect on bench {what}; drop it.")
    if what in RECIPES and "recipe" not in options:
        raise typer.BadParameter(f"bench {what} needs --recipe.")
    if what == "generate" and not {"run", "recipe", "calibrate"} & {*options}:
        raise typer.BadParameter("bench generate needs --run, --recipe or --calibrate.")
    if what == "quality" and "run" not in options:
        raise typer.BadParameter("bench quality needs --run.")
    if what in RECIPES and "batch" in options:
        if len(options["batch"]) > 1:
            raise typer.BadParameter(f"bench {what} has one --batch.")
        (options["batch"],) = options["batch"]
