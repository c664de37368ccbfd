"""Names from outside in a model card: as Markdown renders them, they are what they were."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from job.artifacts.export_card import ExportedModel, as_markdown, export_readme
from job.artifacts.model_card import read_card
from job.artifacts.records import Lineage
from support.cuts import save_slim_student

NAMES = (
    "bird <b>", "a|b", "*star*", "_x_ __y__", "[link](http://a.b)", "back`tick``", "&amp;",
    "1. one", "- item", "# head", "\\*", "~~gone~~", "$x$", "![i](j)", "= =", "a\nb", "<!-- c",
    "2) two",
)  # fmt: skip


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_rendered_as_it_is(name: str) -> None:
    line = name.replace("\n", "\\n")
    assert unescape(rendered(as_markdown(name))) == f"<p>{line}</p>\n"
    table = rendered(f"| a | b |\n|---|---|\n| {as_markdown(name)} | c |")
    assert f"<td>{line}</td>" in unescape(table)


def test_the_names_of_a_card_are_neither_markup_nor_cells(tmp_path: Path) -> None:
    card = read_card(save_slim_student(tmp_path / "model"))
    classes = NAMES[: card.num_classes]
    card = replace(
        card, class_names=classes, model="my_module:make_it_", lineage=Lineage(run="/a/my|run <b>")
    )
    exported = ExportedModel("m`x.onnx", "onnx", card, {"root": "/d/- <i>data", "training": 3})
    page = rendered(export_readme(exported).split("---\n", 2)[2])
    text = unescape(re.sub(r"<[^>]*>", "", page))
    assert "Classes: " + ", ".join(f"{n} {name}" for n, name in enumerate(classes)) in text
    assert "<h1>my_module:make_it_ at width" in page
    assert "<code>m`x.onnx</code> is an ONNX model" in page
    assert "- <i>data: 3 training images" in text
    assert "<td>my|run &lt;b&gt;</td>" in page
    assert not {"<b>", "<i>", "<em>", "<ul>"} & set(re.findall("<[a-z]*>", page))
