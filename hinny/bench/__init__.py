"""Speed, measured: kernels, the training step, evaluation, generation. Correct first, then timed, beside a peer.

And what shorter numbers cost in quality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hinny.bench.evaluation import bench_eval
from hinny.bench.generation import bench_generate
from hinny.bench.kernels import bench_kernels
from hinny.bench.quality import bench_quality
from hinny.bench.training import bench_train
from hinny.errors import ConfigError
from hinny.verb import make_callable

BENCHES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "eval": bench_eval, "generate": bench_generate, "kernels": bench_kernels, "quality": bench_quality,
    "train": bench_train}
"""What can be measured → function; each returns rows of `hinny.run.row`."""


def bench(what: str, **options: Any) -> list[dict[str, Any]]:
    """Measure `what`: "kernels", "train", "eval", "generate" or "quality"; options are those of `bench_kernels` and the
    like.
    """
    if what not in BENCHES:
        raise ConfigError(f"unknown bench {what!r}; known: {', '.join(BENCHES)}.")
    return BENCHES[what](**options)


make_callable(__name__, "hinny.bench:bench")
