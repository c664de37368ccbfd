"""What the command line says before it runs: help in sections, variables that nothing reads."""

from __future__ import annotations

import os
import re

import click
import pytest
from click.testing import CliRunner, Result

from job.cli.help import FIRST, LAST, sections
from job.cli.main import gammaslim
from job.config import SECTIONS

SECTIONED = sorted(FIRST)


def invoke(*args: str, **env: str) -> Result:
    """A command line in this process; the caller's own variables are left out."""
    ours = {name: None for name in os.environ if name.startswith("GAMMASLIM_")}
    return CliRunner().invoke(
        gammaslim, args, env={**ours, **env}, prog_name="gammaslim", terminal_width=80
    )


def options_of(command: str) -> list[click.Parameter]:
    ctx = click.Context(gammaslim.commands[command], info_name=command)
    return [p for p in ctx.command.get_params(ctx) if isinstance(p, click.Option)]


@pytest.mark.parametrize("command", SECTIONED)
def test_each_option_is_shown_once(command: str) -> None:
    options = options_of(command)
    shown = [option for members in sections(command, options).values() for option in members]
    assert sorted(map(id, shown)) == sorted(map(id, options))
    stranger = click.Option(["--stranger"], help="Of nobody.")
    assert sections(command, [*options, stranger])[LAST][-1] is stranger


def test_the_help_of_prune_begins_with_examples_and_ten_options() -> None:
    shown = invoke("prune", "--help").output
    titles = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert titles[:2] == ["Examples", "Most used options"]
    assert titles[2:] == [title for title in SECTIONS if title in titles]
    first = shown.split("Most used options:")[1].split("\n\n")[0]
    assert len(re.findall(r"^  --", first, re.MULTILINE)) == 10
    assert max(map(len, shown.splitlines())) <= 88
    for name in ("--help", "--debug", "--wandb", "--sparsity-weight"):
        assert f"  {name} " in shown or f", {name} " in shown


def test_each_command_has_its_examples_and_each_example_is_understood() -> None:
    for name in gammaslim.commands:
        shown = invoke(name, "--help").output
        assert re.search(rf"^Examples:\n  gammaslim .*{name}", shown, re.MULTILINE), name
        for line in re.findall(r"^  gammaslim (.*?)(?:  #.*)?$", shown, re.MULTILINE):
            command, *args = line.split()
            if command == "launch":
                command, *args = args[args.index("--") + 1 :]
            gammaslim.commands[command].make_context(command, args, resilient_parsing=False)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GAMMASLIM_RATE", "GAMMASLIM_PRUNE_RATE"),
        ("GAMMASLIM_EVALUTE_SPLIT", "GAMMASLIM_EVALUATE_SPLIT"),
        ("GAMMASLIM_PRUNE_LEARNING_RATE", "GAMMASLIM_PRUNE_RATE"),
        ("GAMMASLIM_FOO", None),
    ],
)
def test_a_variable_that_nothing_reads_is_warned_of(name: str, meant: str | None) -> None:
    done = invoke("prune", "--rate", "7", **{name: "0.5"})
    (warning,) = [line for line in done.output.splitlines() if line.startswith("Warning")]
    hint = f"; did you mean {meant}?" if meant else ""
    assert warning == f"Warning: nothing reads the variable {name}{hint}"
    again = invoke("launch", "--nproc", "2", "--", "prune", "--rate", "7", **{name: "0.5"})
    assert "Warning" not in again.output  # process 0 of those launched says it
    other = invoke("prune", "--rate", "7", RANK="1", WORLD_SIZE="2", **{name: "0.5"})
    assert "Warning" not in other.output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GAMMASLIM_EVALUATE_SPLIT", "training"),
        ("GAMMASLIM_PRUNE_MODEL_ARG", "base=4"),
        ("GAMMASLIM_PRUNE_DEBUG", "1"),
        ("GAMMASLIM_PRUNE_CONFIG", "demo"),
        ("GAMMASLIM_SERVICE_HOST", "10.0.0.1"),
        ("GAMMASLIM_WEB_SERVICE_PORT_HTTP", "80"),
        ("GAMMASLIM_WEB_PORT", "tcp://10.0.0.1:80"),
        ("GAMMASLIM_WEB_PORT_80_TCP_PROTO", "tcp"),
    ],
)
def test_variables_of_ours_and_of_kubernetes_are_no_surprise(name: str, value: str) -> None:
    done = invoke("prune", "--rate", "7", **{name: value})
    assert done.exit_code == 2
    assert "Warning" not in done.output


def test_a_variable_with_the_version_is_not_taken_for_an_option() -> None:
    done = invoke("prune", "--help", GAMMASLIM_VERSION="1.2")
    assert done.exit_code == 0, done.output


def test_the_list_of_commands_shows_whole_sentences() -> None:
    listed = invoke("--help").output.split("Commands:\n")[1]
    assert len(listed.splitlines()) == len(gammaslim.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed.splitlines())


def test_the_summary_of_each_command_is_whole() -> None:
    listing = CliRunner().invoke(gammaslim, ["--help"]).output.partition("Commands:")[2]
    assert "sensitivity" in listing
    assert "..." not in listing
