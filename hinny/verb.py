"""Makes a package that carries a verb's name callable: `hinny.train(...)` beside `hinny.train.loop`.

`train`, `bench`, `show` and `study` are both rooms of the house and verbs of the user (docs/decisions/0002).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__verb__.partition(":")
        return getattr(import_module(module), function)(*args, **kwargs)


def make_callable(package: str, verb: str) -> None:
    """Calling the imported module `package` calls `verb`, "module:function", imported at that moment."""
    module = sys.modules[package]
    module.__dict__["__verb__"] = verb
    module.__class__ = _Verb
