"""What ``import gammaslim`` and ``import job`` give: the same names, from an installed package."""

from __future__ import annotations

import ast
import os
import pydoc
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import job
import job.gammaslim
from support.commands import ROOT

NAMES = {"slim", "save", "load", "Plan", "GammaslimError", "UsageError", "DataError", "__version__"}
ALONE = """
import sys, gammaslim, job
assert "torch" not in sys.modules
assert all(getattr(gammaslim, name) == getattr(job, name) for name in gammaslim.__all__)
print(gammaslim.__version__, gammaslim.__file__)
"""


@pytest.mark.parametrize("module", [job, job.gammaslim])
def test_dir_and_help_show_the_public_names_and_no_others(module: Any) -> None:
    assert set(dir(module)) == set(module.__all__) >= NAMES
    text = pydoc.plain(pydoc.render_doc(module))
    assert all(f"\n    {name}(" in text for name in ("slim", "save", "load"))
    assert all(f"class {name}(" in text for name in ("UsageError", "DataError", "InputNotFound"))
    entries = re.findall(r"^    (?:class )?([A-Za-z]\w*)\(", text, re.MULTILINE)
    assert set(entries) <= set(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        _ = module.prune


@pytest.mark.parametrize("module", [job, job.gammaslim])
def test_type_checkers_see_the_public_names_and_no_others(module: Any) -> None:
    """They read the imports, and believe in any name of a module with a ``__getattr__``."""
    tree = ast.parse(Path(module.__file__).read_text())
    checking = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n)]
    seen = [*tree.body, *(n for part in checking if is_checked(part.test) for n in part.body)]
    names = {alias.name for n in seen if isinstance(n, ast.ImportFrom) for alias in n.names}
    names |= {t.id for n in seen if isinstance(n, ast.Assign) for t in n.targets}  # type: ignore
    assert set(module.__all__) <= names
    assert not [n for n in seen if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"]


def is_checked(test: ast.expr) -> bool:
    """Whether a type checker takes the branch: TYPE_CHECKING, and not its negation."""
    return isinstance(test, ast.Name)


def test_the_installed_package_is_gammaslim(tmp_path: Path) -> None:
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    copy = tmp_path / "source"  # setuptools leaves folders behind
    copy.mkdir()
    for name in ("job", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    commands = {"site/gammaslim/__init__.py": ("-c", ALONE)}
    commands[f"gammaslim, version {job.__version__}"] = ("-m", "gammaslim", "--version")
    for wanted, args in commands.items():
        command = [sys.executable, *args]
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert wanted in done.stdout, done
