"""The wheel: built as users get it, installed alone, used far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], check=True,
                   capture_output=True)
    return next(out.glob("hinny-*.whl"))


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # the dependencies of this environment, but not its hinny: a .pth file inside it is not followed
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=clean).stdout

    where = run(python, "-c", "import hinny; print(hinny.__file__)").strip()
    assert where.startswith(str(environment))
    command = environment / "bin" / "hinny"
    for recipe in ("8b-hybrid", "long/8b-hybrid-128k"):
        assert json.loads(run(command, "show", recipe, "--json"))["parameters"] == 8_654_517_248
    studies = run(python, "-c", "from hinny.config import shipped_names as s; print(*s('studies'), *s('recipes'))")
    assert {"quick", "tiny-mamba", "8b-transformer", "long/8b-transformer-32k"} <= set(studies.split())


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        names = archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)
    others = {str(path.relative_to(ROOT)) for path in (ROOT / "hinny").rglob("*")
              if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {"hinny/py.typed", "hinny/infer/server/page.html"} <= others <= set(names)
    assert "Requires-Dist: torch>=2.11\n" in metadata
