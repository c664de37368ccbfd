"""The folders of ``job/`` are layers in the order of the data; no import runs against it."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

from support.commands import ROOT

# lowest first: a module imports from its own folder and from those before it
LAYERS = [
    "job", "distributed", "data", "models", "slimming.inputs", "slimming.graph",
    "slimming.calibration", "slimming.importance", "slimming.latency", "slimming.planning",
    "slimming.surgery", "slimming.compensation", "slimming.sensitivity", "slimming.recovery",
    "slimming", "training", "tasks", "artifacts", "tracking", "report", "pipeline", "cli",
]  # fmt: skip
ENTRIES = {"job", "job.__main__", "job.gammaslim", "job.gammaslim.__main__"}  # above everything
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "job").rglob("*.py"))
}


@cache
def trees() -> dict[str, ast.Module]:
    """The code of each module."""
    return {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def layer(module: str) -> int:
    """The place of a module in ``LAYERS``: of the longest folder that holds it."""
    inside = module.removeprefix("job.")
    if module == "job" or ("." not in inside and not (ROOT / "job" / inside).is_dir()):
        return 0
    folders = [entry for entry in LAYERS if inside == entry or inside.startswith(f"{entry}.")]
    return LAYERS.index(max(folders, key=len))


def imports(module: str) -> set[str]:
    """The modules of ``job`` that ``module`` imports anywhere, for types only too."""
    names = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES and name != module} - ENTRIES


def is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == "TypeVar"


def test_no_import_runs_against_the_order_of_the_layers() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in sorted(imports(module))
        if module not in ENTRIES and layer(other) > layer(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str]:
        if state.get(module) == 2:
            return []
        if state.get(module) == 1:
            return [*path[path.index(module) :], module]
        state[module] = 1
        for other in sorted(imports(module)):
            circle = visit(other, [*path, module])
            if circle:
                state[module] = 2
                return circle
        state[module] = 2
        return []

    circles = [visit(module, []) for module in MODULES if module not in ENTRIES]
    assert not any(circles), [" -> ".join(circle) for circle in circles if circle]


def test_a_public_name_is_defined_once() -> None:
    homes = defaultdict(list)
    for module, tree in trees().items():
        for node in tree.body:
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and not is_type_variable(node.value):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in names:
                if not name.startswith("_") and name != "main":
                    homes[name].append(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in twice.items())


def test_the_package_itself_has_at_most_eight_modules() -> None:
    own = [path.name for path in (ROOT / "job").glob("*.py")]
    assert len(own) <= 8, own


def test_modules_hold_one_concept() -> None:
    """Of at most 320 lines; the table of options has a line or more for each."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES.values()
        if (lines := len(path.read_text("utf-8").splitlines())) > 320 and path.name != "config.py"
    }
    assert not long, long


def test_every_folder_says_what_it_holds() -> None:
    silent = [name for name, tree in trees().items() if not ast.get_docstring(tree)]
    assert not silent, silent
    assert Path(ROOT / "job" / "py.typed").is_file()


def test_no_test_imports_another() -> None:
    found = {
        str(path.relative_to(ROOT)): node.module
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and ".test_" in f".{node.module}"
    }
    assert not found, found
