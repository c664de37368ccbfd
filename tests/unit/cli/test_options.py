"""Options are declared once: click, TOML, the other commands and the documents follow."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import pytest
from click.testing import CliRunner

from job.cli.command_options import EvaluateOptions, ModelOptions, PredictOptions, SlimOptions
from job.cli.main import gammaslim
from job.cli.option_table import option_table
from job.config import SECTIONS, PruneConfig
from job.data.preprocessing_options import PreprocessingOptions
from job.options import options_of

HINTS = get_type_hints(PruneConfig)


def click_option(command: str, name: str) -> click.Option:
    (found,) = (p for p in gammaslim.commands[command].params if p.name == name)
    assert isinstance(found, click.Option)
    return found


def test_each_field_of_the_configuration_is_an_option_of_one_section() -> None:
    names = [name for record in SECTIONS.values() for name in options_of(record)]
    assert names == [field.name for field in fields(PruneConfig)]
    assert len(set(names)) == len(names)
    given = {p.name for p in gammaslim.commands["prune"].params}
    assert given == {*names, "config", "debug"}


@pytest.mark.parametrize("name", options_of(PruneConfig))
def test_click_takes_what_the_annotation_says(name: str) -> None:
    option, default = click_option("prune", name), getattr(PruneConfig(), name)
    hint = HINTS[name]
    choices = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
    if choices and int not in get_args(hint):
        assert isinstance(option.type, click.Choice)
        assert tuple(option.type.choices) == get_args(choices)
    if choices and default is not None:
        values = set(default) if isinstance(default, tuple) else {default}
        assert values <= set(get_args(choices)) or isinstance(default, int)
    declared = options_of(PruneConfig)[name]
    for bound, change in ((declared.at_least, -1), (declared.above, 0), (declared.at_most, 1)):
        if bound is not None:
            with pytest.raises(click.BadParameter), click.Context(click.Command("prune")) as ctx:
                option.type_cast_value(ctx, str(bound + change))


@pytest.mark.parametrize("record", [ModelOptions, EvaluateOptions, PredictOptions, SlimOptions])
def test_an_option_of_another_command_has_the_type_that_it_has_in_prune(record: type) -> None:
    def plain(hint: Any) -> set[Any]:
        members = get_args(hint) if get_origin(hint) is not Literal else (hint,)
        return {member for member in members or (hint,) if member is not type(None)}

    hints = get_type_hints(record)
    for name in options_of(record):
        if name in HINTS:
            assert plain(hints[name]) == plain(HINTS[name]), name


def test_the_options_of_preprocessing_are_those_of_the_configuration() -> None:
    section = [field.name for field in fields(SECTIONS["Preprocessing"])]
    assert [field.name for field in fields(PreprocessingOptions)] == section


def test_the_table_has_a_row_for_each_option() -> None:
    rows = option_table().splitlines()
    for name in options_of(PruneConfig):
        assert sum(row.startswith(f"| `--{name.replace('_', '-')}` |") for row in rows) == 1
    assert all(row.replace(r"\|", "").count("|") == 5 for row in rows)
    assert "| `--lr` | `X` > 0 | `0.001` | " in option_table()
    assert "| `--dry-run` |  |  | " in option_table()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["export", "m", "--output", "s3://b/one/m.onnx"],
         "give a local path, e.g. m.onnx, and copy it afterwards: aws s3 cp m.onnx s3://b/one/m"),
        (["slim", "m", "--output", "gs://b/slim/"], "afterwards: gcloud storage cp slim gs://b/slim"),
        (["predict", "m", "--data", "d", "--output", "file:///x/p.csv"], "cp -r p.csv file:///x/p"),
        (["report", "r", "--output", "s3://b/r.html"], "e.g. r.html, and copy it afterwards"),
        (["report", "r", "--csv", "s3://b/r.csv"], "e.g. r.csv, and copy it afterwards"),
        (["prune", "--weights", "s3://b/a b.pt"],
         "copy it first, and give --weights 'a b.pt': aws s3 cp 's3://b/a b.pt' 'a b.pt'"),
        (["prune", "--teacher", "s3://b/run"], "copy it first, and give --teacher run"),
    ],
)  # fmt: skip
def test_a_url_where_a_local_path_is_needed_is_refused_at_once(
    words: list[str], advice: str
) -> None:
    done = CliRunner().invoke(gammaslim, words)
    assert done.exit_code == 2
    assert "is a URL: " in done.stderr
    assert advice in done.stderr


@pytest.mark.parametrize("name", ["weights.safetensors", "folder", "a b/model.safetensors"])
def test_an_error_names_the_url_that_was_given(tmp_path: Path, name: str) -> None:
    file = tmp_path / name if name.endswith("tensors") else tmp_path / name / "x.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("no weights")
    url = f"file://{tmp_path}/{name}"
    done = CliRunner().invoke(gammaslim, ["evaluate", url])
    assert done.exit_code != 0
    assert f"Error: {url} " in done.stderr
    assert "/gammaslim-" not in done.stderr
