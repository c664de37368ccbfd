"""The report in Debian's Chromium: on a phone and a desk, in the dark, printed, without network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pypdf import PdfReader

from job.report.page import write_run_report
from support.browser import CHROMIUM, Browser, browser
from support.commands import gammaslim
from support.report_pages import entry, make_run, write_evaluations

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (tests/run.sh installs it)"
)
LONG = "a-very-long-name-of-a-layer.that.cannot-be-broken.anywhere-0123456789"
LIGHTNESS = (
    "((c) => c.map(Number).slice(0, 3).reduce((a, b) => a + b))"
    "(getComputedStyle(document.body).{}.match(/[0-9.]+/g))"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run with everything, of one that has hardly begun, and of several runs."""
    root = tmp_path_factory.mktemp("pages")
    entries = tuple(
        entry(n, 0.9 - 0.01 * n, 987_654_321 - 9_000_000 * n, macs=123_456_789_012)
        for n in range(12)
    )
    full = make_run(root / LONG, entries, best=7, layer=LONG)
    write_evaluations(full, best=7)
    begun = make_run(root / "begun", (), state="running")
    # whose axes have a long number at their end
    numbers = tuple(entry(n, 0.8, 256_522 - 17_000 * n) for n in range(6))
    small = make_run(root / "small", numbers)
    for folder in (full, begun, small):
        write_run_report(folder)
    done = gammaslim("report", full, begun, "--output", root / "compared.html")
    assert done.code == 0, done
    return {
        "full": full / "report.html", "begun": begun / "report.html",
        "small": small / "report.html",
        "compared": root / "compared.html",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["full", "begun", "compared"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_screen_asks_for_nothing_and_reports_no_error(
    chromium: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    chromium.open(pages[name], width, prefers_color_scheme=scheme)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    text, page = (chromium.evaluate(LIGHTNESS.format(k)) for k in ("color", "backgroundColor"))
    assert (text < page) == (scheme == "light")
    assert abs(text - page) > 500
    assert chromium.console == []
    outside = [url for url in chromium.requests if not url.startswith(("file:", "data:"))]
    assert outside == []


def test_the_answer_and_the_curve_are_in_the_first_screen(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    place = "document.querySelector('{}').getBoundingClientRect().{}"
    chromium.open(pages["full"], 360)
    assert chromium.evaluate(place.format(".numbers", "bottom")) < 740
    assert chromium.evaluate(place.format("#accuracy-params", "top")) < 740 - 200
    chromium.open(pages["full"], 1200)
    assert chromium.evaluate(place.format("#accuracy-params", "bottom")) < 740


def test_no_column_head_breaks_inside_a_word(chromium: Browser, pages: dict[str, Path]) -> None:
    """A head is at least as wide as its longest word."""
    chromium.open(pages["full"], 1200)
    broken = chromium.evaluate("""[...document.querySelectorAll("table thead th")].filter((th) => {
        const style = getComputedStyle(th);
        return style.overflowWrap === "anywhere" || style.wordBreak !== "normal";
    }).length""")
    assert broken == 0


def test_a_phone_shows_every_number_of_a_round(chromium: Browser, pages: dict[str, Path]) -> None:
    """A row is a card there: no cell is beyond the edge, and each has its head."""
    chromium.open(pages["full"], 360)
    cells = chromium.evaluate("""[...document.querySelectorAll("table.cards td")]
        .filter((td) => td.textContent)
        .map((td) => [td.getBoundingClientRect().right, td.scrollWidth - td.clientWidth,
                      getComputedStyle(td, "::before").content])""")
    assert len(cells) > 100
    for right, hidden, head in cells:
        assert right <= 360
        assert hidden <= 1
        assert re.fullmatch(r'".+"', head)


def test_a_click_on_a_head_sorts_the_rows(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["full"], 1200)
    column = """[...document.querySelector("table.sortable").tBodies[0].rows]
        .map((row) => row.cells[1].textContent)"""
    before = chromium.evaluate(column)
    click = 'document.querySelectorAll("table.sortable th button")[1].click()'
    chromium.evaluate(click)
    assert chromium.evaluate(column) == sorted(before)
    chromium.evaluate(click)
    assert chromium.evaluate(column) == sorted(before, reverse=True)
    assert chromium.console == []


def test_numbers_are_sorted_by_their_values(chromium: Browser, tmp_path: Path) -> None:
    """Not by their digits: costs have units, and the recommended round a star."""
    costs = ((11_184_202, 1_777e6), (6_306_154, 1_256e6), (5_264_088, 888e6), (4_000_000, 0.9e6))
    entries = tuple(
        entry(n, 0.9 - 0.002 * n, params, macs=int(macs)) for n, (params, macs) in enumerate(costs)
    )
    folder = make_run(tmp_path / "run", entries)
    write_evaluations(folder)  # only the base and round 2 were timed
    write_run_report(folder)
    chromium.open(folder / "report.html", 1200)
    head = "[...document.querySelectorAll('table.sortable')[0].querySelectorAll('th button')]"
    order = """[...document.querySelector("table.sortable").tBodies[0].rows]
        .map((row) => row.cells[0].textContent)"""
    down = ["base", "1", "★ 2", "3"]
    for name in ("parameters", "MACs", "bytes", "round"):
        button = f"{head}.find((button) => button.textContent === '{name}')"
        orders = [chromium.evaluate(f"{button}.click(); {order}") for _ in range(2)]
        assert orders == ([down, down[::-1]] if name == "round" else [down[::-1], down]), name
    button = f"{head}.find((button) => button.textContent === 'latency')"
    orders = [chromium.evaluate(f"{button}.click(); {order}")[:2] for _ in range(2)]
    assert orders == [["★ 2", "base"], ["base", "★ 2"]]  # rounds without a latency are last


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_larger_share_of_a_confusion_matrix_has_the_stronger_colour(
    chromium: Browser, pages: dict[str, Path], scheme: str, width: int
) -> None:
    chromium.open(pages["full"], width, prefers_color_scheme=scheme)
    colors = """[...document.querySelectorAll(".matrix td.{}")].map((cell) => {{
        const canvas = Object.assign(document.createElement("canvas"), {{width: 1, height: 1}});
        const pen = canvas.getContext("2d");
        pen.fillStyle = getComputedStyle(cell).backgroundColor;
        pen.fillRect(0, 0, 1, 1);
        const rgb = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
        return [parseInt(cell.style.getPropertyValue("--share")),
                Math.max(...rgb) - Math.min(...rgb)];
    }})"""
    for kind in ("right", "wrong"):
        shares = sorted(chromium.evaluate(colors.format(kind)))
        assert len({share for share, _ in shares}) > 1
        assert [strength for _, strength in shares] == sorted(strength for _, strength in shares)
    text = chromium.evaluate("document.body.textContent")
    assert "The stronger the colour of a cell, the larger its share of the row." in text
    assert "darker" not in text  # larger shares are lighter in the dark mode
    cut = """[...document.querySelectorAll(".matrix th.corner")]
        .filter((head) => head.scrollWidth > head.clientWidth).length"""
    assert chromium.evaluate(cut) == 0


@pytest.mark.parametrize("width", [360, 1200])
def test_the_title_of_an_axis_is_below_its_names(
    chromium: Browser, pages: dict[str, Path], width: int
) -> None:
    chromium.open(pages["full"], width)
    boxes = """[...document.querySelectorAll("#channels svg text{}")].map((text) => {{
        const box = text.getBoundingClientRect();
        return [text.textContent, box.top, box.bottom];
    }})"""
    ((top, bottom),) = [
        box for name, *box in chromium.evaluate(boxes.format("")) if name == "layer"
    ]
    names = chromium.evaluate(boxes.format(".small[transform]"))
    assert names
    assert all(LONG.endswith(name.removeprefix("…")) or name == "fc" for name, *_ in names)
    assert all(name_bottom <= top for *_, name_bottom in names)
    place = 'document.querySelector("#channels svg").getBoundingClientRect().bottom'
    assert bottom <= chromium.evaluate(place) + 1


@pytest.mark.parametrize("name", ["full", "small", "compared"])
def test_no_text_of_a_chart_is_cut_off(
    chromium: Browser, pages: dict[str, Path], name: str
) -> None:
    chromium.open(pages[name], 1200)
    outside = """[...document.querySelectorAll("svg")].flatMap((svg) => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].filter((text) => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1;
        }).map((text) => text.textContent);
    })"""
    assert chromium.evaluate(outside) == []


def test_print_is_dark_on_white_in_the_dark_mode_too(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages["full"], 1200, prefers_color_scheme="dark")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert chromium.evaluate(LIGHTNESS.format("color")) == 0
    assert chromium.evaluate(LIGHTNESS.format("backgroundColor")) == 3 * 255
    hidden = """[...document.querySelectorAll(".wide")]
        .filter((box) => getComputedStyle(box).overflowX !== "visible").length"""
    assert chromium.evaluate(hidden) == 0
    chromium.call("Page.printToPDF")
    assert chromium.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)")


def test_no_printed_page_ends_with_a_heading(chromium: Browser, tmp_path: Path) -> None:
    """Whatever number of rounds moves the headings down the pages."""
    for count in (2, 5, 8, 11):
        entries = tuple(entry(n, 0.9, 31_850_000 - 2_000_000 * n) for n in range(count))
        folder = make_run(tmp_path / str(count), entries, best=1)
        write_evaluations(folder, best=1)
        write_run_report(folder)
        chromium.open(folder / "report.html", 1200)
        answer = chromium.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        headings = chromium.evaluate("""[...document.querySelectorAll("h1, h2, h3, summary")]
            .map((heading) => heading.textContent)""")
        pages = PdfReader(io.BytesIO(base64.b64decode(answer["data"]))).pages
        assert len(headings) > 15
        assert len(pages) > 3
        for page in pages:
            last = page.extract_text().strip().splitlines()[-1]
            assert all(not heading.endswith(last.strip()) for heading in headings), last


@pytest.mark.parametrize("name", ["full", "compared"])
@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_no_number_is_broken_from_its_unit(
    chromium: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    for media in ("", "print"):
        chromium.open(pages[name], width)
        chromium.call("Emulation.setEmulatedMedia", media=media)
        lines = chromium.evaluate("""[...document.querySelectorAll("[data-value]")].map((cell) => {
            const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), rows = [];
            for (let text; (text = texts.nextNode()); ) {
                const range = document.createRange();
                range.selectNodeContents(text);
                rows.push([text.textContent, range.getClientRects().length]);
            }
            return rows;
        })""")
        parts = [part for cell in lines for part in cell if part[0].strip()]
        assert any(text.endswith(" M") for text, _ in parts)
        assert [text for text, rows in parts if rows != 1] == []


def test_a_column_of_short_names_is_narrow(chromium: Browser, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name)
    done = gammaslim("report", tmp_path, "--output", tmp_path / "compared.html")
    assert done.code == 0, done
    chromium.open(tmp_path / "compared.html", 1280)
    column = "document.querySelector('table.cards thead th:nth-child(2)').offsetWidth"
    assert chromium.evaluate(column) < 60


def test_a_screen_reader_gets_every_chart_table_and_image(
    chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.open(pages["full"], 360)
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    images = names["image"] if "image" in names else names["img"]
    assert all(images)
    assert any("base: 987.7 M, 90.00%; round 1:" in name for name in images)
    assert len(names["heading"]) >= 8
    assert names["columnheader"].count("best epoch") == 1  # also where rows are cards
    assert chromium.evaluate("document.documentElement.lang") == "en"
