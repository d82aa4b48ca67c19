"""hinny: Mamba, Mamba-2, Transformer and Mamba-2-Hybrid language models, side by side.

The public names are below, loaded when first used: `import hinny` alone imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Engine": "hinny.infer.engine:Engine",
    "Model": "hinny.model:Model",
    "bench": "hinny.bench",
    "convert": "hinny.checkpoint.convert:convert",
    "evaluate": "hinny.evals:evaluate",
    "generate": "hinny.infer.engine:generate",
    "load": "hinny.infer.engine:load",
    "load_recipe": "hinny.config:load_recipe",
    "prepare": "hinny.data.prepare:prepare",
    "report": "hinny.study.report:report",
    "serve": "hinny.infer.serve:serve",
    "show": "hinny.show",
    "study": "hinny.study",
    "train": "hinny.train",
    "tune": "hinny.tune",
}

__all__ = [
    "Engine", "Model", "bench", "convert", "evaluate", "generate", "load", "load_recipe", "prepare", "report", "serve",
    "show", "study", "train", "tune",
]

if TYPE_CHECKING:
    from hinny.bench import bench
    from hinny.checkpoint.convert import convert
    from hinny.config import load_recipe
    from hinny.data.prepare import prepare
    from hinny.evals import evaluate
    from hinny.infer.engine import Engine, generate, load
    from hinny.infer.serve import serve
    from hinny.model import Model
    from hinny.show import show
    from hinny.study.conduct import study
    from hinny.study.report import report
    from hinny.train.loop import train
    from hinny.tune import tune


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hinny' has no attribute {name!r}; public: {', '.join(__all__)}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
