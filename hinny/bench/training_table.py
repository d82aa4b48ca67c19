"""Rows of `hinny bench train` as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from hinny.bench.kernel_table import Row
from hinny.config import Recipe

HEAD = """\
# Training, timed

Written by `hinny bench train`. Tokens a second of all GPUs together: median, lowest and highest optimiser step. MFU
counts the model's arithmetic by `hinny show` without any recomputation, over the dense bfloat16 peak of the GPU's data
sheet; beside it the share of that peak which a product of two 8192 x 8192 matrices reached in the same process. Memory
is the most that PyTorch's allocator had handed out on the first GPU, beside what `hinny show` predicts. Loss: of the
first and the last step.

| recipe | shape | tokens/s | low … high | MFU | product | memory, GB | predicted | loss | peer | ratio |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |
"""


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows the same figure, of which the newer one stays."""
    return row["what"], row["variant"], row["shape"]


def options_of(recipe: Recipe) -> dict[str, object]:
    """What of [parallel] and [train] makes another figure, beside the sizes of mesh and batch."""
    parallel = recipe.parallel
    given = {"recompute": parallel.recompute, "schedule": parallel.schedule, "compile": parallel.compile,
             "float8": parallel.float8, "cuda_graphs": recipe.train.cuda_graphs,
             "segment_len": recipe.train.segment_len}
    return {name: "".join(value) if isinstance(value, list) else value for name, value in given.items() if value}


def render_training(rows: Sequence[Row]) -> str:
    """A line for each timed training: speed, share of the peak, memory beside its prediction, loss, peer; then what
    made them.
    """
    lines = HEAD.splitlines()
    found = {key(row): row for row in rows}
    timed = [row for row in rows if row["what"] == "train"]
    for row in timed:
        mfu, memory, loss = (found.get((what, row["variant"], row["shape"]))
                             for what in ("train.mfu", "train.peak_memory", "train.loss"))
        cells = [row["variant"], row["shape"], f"{row['value']:,.0f}", f"{row['low']:,.0f} … {row['high']:,.0f}",
                 "" if mfu is None else f"**{mfu['value']:.1%}**", "" if mfu is None else f"{mfu['bound']:.0%}",
                 "" if memory is None else f"{memory['value']:.1f}",
                 "" if memory is None else f"{memory['bound']:.1f} ({memory['value'] / memory['bound'] - 1:+.1%})",
                 "" if loss is None else f"{loss['high']:.2f} → {loss['value']:.2f}",
                 "" if row["peer"] is None else f"{row['peer']}: {row['peer_value']:,.0f}",
                 "" if row["ratio"] is None else f"{row['ratio']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Made by:", ""]
    for made in dict.fromkeys((row["machine"], row["commit"], row["command"]) for row in rows):
        lines.append("- {}, commit {}: `{}`".format(*made))
    return "\n".join([*lines, ""])
