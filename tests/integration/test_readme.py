"""The documents are true: commands and Python lines run, options and links exist."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

import job.cli.main
import job.gammaslim
from job.models.factory import build_network
from support.commands import ROOT, Result, gammaslim, run
from support.datasets import write_flat

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *sorted(ROOT.glob("job/**/README.md")),
    *(ROOT / folder / "README.md" for folder in ("slurm", "k8s", "tests/benchmarks")),
    ROOT / ".github" / "CONTRIBUTING.md",
]
MODULES = {"accelerate launch": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
NETS = """
from torch import nn

def tiny(num_classes):
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, num_classes))
"""


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in fenced if named == language]


@dataclass(frozen=True)
class Command:
    """A command line of a document that needs no cluster and no container."""

    document: Path
    text: str

    def run(self, folder: Path, **env: str) -> Result:
        """Run it in ``folder``, by two processes in place of four."""
        words = shlex.split(self.text.replace(" 4 ", " 2 "), comments=True)
        for name, module in MODULES.items():
            if self.text.startswith(name):
                command = [sys.executable, "-m", module, *words[len(name.split()) :]]
                return run(*command, cwd=folder, env=env)
        return gammaslim(*words[1:], cwd=folder, env=env)


def commands(document: Path) -> list[Command]:
    """The commands of Gammaslim, also those after ``&&``, and those that start it."""
    found = []
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in map(str.strip, line.split("&&")):
                text = part.removeprefix(".venv/bin/")
                if text.startswith(("gammaslim ", *MODULES)):
                    found.append(Command(document, text))
    return found


FIRST, *OTHERS = [command for document in DOCUMENTS for command in commands(document)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents name: data sets, weights, a network, and finished runs.

    The run is that of the first command, with one epoch of the base and of one round.
    """
    folder = tmp_path_factory.mktemp("user")
    for name in ("path/to/images", "food-11", "D"):
        write_flat(folder / name, {"training": 8, "validation": 4, "testing": 2})
    (folder / "nets.py").write_text(NETS)
    text = (ROOT / "job" / "README.md").read_text()
    (task,) = re.findall(r"<!-- task: begin -->\n```python\n(.*?)^```", text, re.M | re.S)
    (folder / "shapes.py").write_text(task)
    torch.save(build_network("resnet18", 3, {}).state_dict(), folder / "resnet18.pt")
    state = build_network("timm:resnet18", 3, {}).state_dict()
    save_file(state, folder / "model.safetensors")  # as the Hub names the weights of timm
    short = {f"GAMMASLIM_PRUNE_{name}": "1" for name in ("BASE_EPOCHS", "EPOCHS", "ROUNDS")}
    done = FIRST.run(folder, **short)
    assert done.code == 0, done
    (folder / "stdout").write_text(done.out)
    for name in ("a", "b"):
        shutil.copytree(folder / "runs" / "student-fashion-mnist", folder / "runs" / name)
    return folder


def test_the_first_command_prints_what_the_readme_shows(folder: Path) -> None:
    assert Command(README, "gammaslim prune") == FIRST
    shown, printed = blocks(README, "")[0].splitlines(), (folder / "stdout").read_text()
    assert all(line in printed for line in shown[:2])  # the data and the run
    heads = [  # a column is as wide as its latencies
        [re.split(" {2,}", line) for line in lines if re.match("round +width", line)]
        for lines in (shown, printed.splitlines())
    ]
    assert heads[0] == heads[1] != []
    epoch = re.compile(r"^rate 1.0000 epoch   0: train loss: \d.\d{4}, acc .* acc \d.\d{4}", re.M)
    assert epoch.search(printed)
    assert epoch.search("\n".join(shown))


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: command.text.partition("  #")[0])
def test_a_command_of_the_documents_ends_well(folder: Path, command: Command) -> None:
    """Those that would train check everything, for one round on small batches: a dry run."""
    small = {f"GAMMASLIM_PRUNE_{name}": "1" for name in ("DRY_RUN", "ROUNDS")}
    done = command.run(folder, GAMMASLIM_PRUNE_BATCH_SIZE="8", **small)
    assert done.code == 0, done


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_lines_of_a_document_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gammaslim", job.gammaslim)
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), names)
    if document == README:
        assert isinstance(names["narrow"], torch.nn.Module)
        assert (tmp_path / "slim" / "model.safetensors").is_file()


def known_options() -> set[str]:
    """The options of all commands, and those of the programs that the documents also name."""
    group = job.cli.main.gammaslim
    params = [param for command in [group, *group.commands.values()] for param in command.params]
    options = [param for param in params if isinstance(param, click.Option)]
    return {name for o in options for name in (*o.opts, *o.secondary_opts)} | {"--help", "--all"}


@pytest.mark.parametrize("document", [README, ROOT / "job" / "README.md"], ids=["", "job"])
def test_options_that_are_named_alone_exist(document: Path) -> None:
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", document.read_text()))
    assert len(named) > 10
    assert named <= known_options()


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text())
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 12 * 1024
