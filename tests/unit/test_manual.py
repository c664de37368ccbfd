"""The manual of the job names what exists: options, files to change, links."""

from __future__ import annotations

import ast
import re

import pytest

from job import errors
from job.cli.option_table import option_table
from support.commands import ROOT
from support.manifests import COUNTED, HOPELESS, RETRY_AT_ONCE

MANUAL = (ROOT / "job" / "README.md").read_text("utf-8")
DOCUMENTS = [
    "README.md", "job/README.md", "job/slimming/README.md", "job/slimming/training_loops.md",
    "slurm/README.md", "k8s/README.md",
    "tests/benchmarks/README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md",
]  # fmt: skip


def test_the_table_of_options_is_the_generated_one() -> None:
    """To renew it, paste the output of ``python -m job.cli.option_table``."""
    begin, end = "<!-- options: begin -->\n", "<!-- options: end -->"
    assert MANUAL.partition(begin)[2].partition(end)[0] == option_table()


def changes() -> list[tuple[str, str, str]]:
    rows = MANUAL.partition("## Where to change what")[2].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if "| `" in row]
    return [(change, edit, test) for change, edit, test in cells]


@pytest.mark.parametrize(("change", "edit", "test"), changes())
def test_the_files_of_a_change_exist(change: str, edit: str, test: str) -> None:
    """A change is in two files of the package at most, and so are the names that it extends."""
    places = re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", edit)
    assert 1 <= len(places) <= 2, change
    for file, name in places:
        tree = ast.parse((ROOT / "job" / file).read_text("utf-8"))
        names = {
            getattr(target, "id", "")
            for node in tree.body
            for target in (getattr(node, "targets", None) or [getattr(node, "target", node)])
        } | {getattr(node, "name", "") for node in tree.body}
        assert not name or name in names, f"{file} has no {name}"
    assert (ROOT / "tests" / test.strip("`")).exists(), test


def test_every_kind_of_change_has_its_row() -> None:
    kinds = " ".join(change for change, _, _ in changes())
    for kind in (
        "criterion", "compensation", "layout", "penalty", "option", "torch op", "kind of layer",
        "figure", "W&B", "checkpointed", "launcher", "metric", "schedule", "exit code",
    ):  # fmt: skip
        assert kind in kinds, kind


def test_each_exit_code_is_in_the_manual_and_known_to_the_clusters() -> None:
    kinds = [errors.GammaslimError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    codes = {kind.exit_code for kind in kinds}
    table = MANUAL.partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {0} | codes
    job = (ROOT / "slurm" / "prune.sh").read_text("utf-8")
    (final,) = re.findall(r"^  (0 \| [\d |]+)\) ;;", job, re.MULTILINE)
    assert set(map(int, final.split(" | "))) == {0} | codes - RETRY_AT_ONCE - {1}
    assert codes == HOPELESS | RETRY_AT_ONCE | COUNTED  # as in the rules of each manifest


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 12 * 1024
