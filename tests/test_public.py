"""The public names: what README promises is there, lazily."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hinny


def test_every_public_name_is_there() -> None:
    for name in hinny.__all__:
        assert callable(getattr(hinny, name)), name


def test_verbs_are_callable_even_after_their_package_was_imported() -> None:
    import hinny.train.loop

    with pytest.raises(hinny.errors.ConfigError, match="no-such-recipe"):  # type: ignore[attr-defined]
        hinny.show(hinny.load_recipe("no-such-recipe"))
    assert callable(hinny.train)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="load_recipe"):
        _ = hinny.transform


def test_importing_hinny_is_light() -> None:
    code = "import sys, hinny; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
