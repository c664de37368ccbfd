"""Names of points, and markers at nearly the same place: each of them is seen."""

from __future__ import annotations

import re
from pathlib import Path

from job.artifacts.run_reader import read_run
from job.report.chart import ticks
from job.report.figures import accuracy_chart, throughput_chart, training_chart
from job.report.labels import HEIGHT, LETTER
from job.report.svg import LEFT, RIGHT, WIDTH, to_svg
from support.report_pages import entry, make_run

LABEL = re.compile(
    r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="small name">([^<]+)'
)
MARKER = re.compile(r'<path class="(dot|open) (\w+)" transform="translate\(([\d.]+) ([\d.]+)\)')


def test_neither_a_name_nor_a_marker_covers_a_point(tmp_path: Path) -> None:
    """The accuracies after the cut are a little below those after fine-tuning."""
    entries = tuple(
        entry(n, tuned, params, **({"valid_acc_pruned": cut} if n else {}))
        for n, (params, tuned, cut) in enumerate(
            ((31_850_000, 0.8883, 0), (25_000_000, 0.8867, 0.8800), (18_900_000, 0.8833, 0.8783),
             (18_200_000, 0.8830, 0.8790), (12_900_000, 0.84, 0.70), (9_000_000, 0.80, 0.45))
        )
    )  # fmt: skip
    chart = accuracy_chart(read_run(make_run(tmp_path / "run", entries)), "params")
    assert chart
    svg = str(to_svg(chart))
    plot = svg.rpartition('class="small name"')[0]
    markers = [(kind, float(x), float(y)) for kind, _, x, y in MARKER.findall(plot)]
    labels = [(float(x), float(y), anchor, text) for x, y, anchor, text in LABEL.findall(svg)]
    assert {text for *_, text in labels} == {"base", "1", "2", "3", "4", "5"}
    assert len(markers) == 6 + 5 + 1
    for x, y, anchor, text in labels:
        wide = LETTER * len(text)
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[anchor]
        for _, marker_x, marker_y in markers:
            beside = marker_x + 3 < left or left + wide < marker_x - 3
            assert beside or marker_y + 3 < y - HEIGHT or y < marker_y - 3, text
    kinds = [kind for kind, *_ in markers]
    assert kinds == sorted(kinds)  # the open ones, which are not filled, are on top


def test_the_mark_of_a_base_without_training_is_in_the_plot(tmp_path: Path) -> None:
    """With --weights the base ends at step 0, before the first epoch."""
    folder = make_run(tmp_path / "run", (entry(0, 0.9, 1000, step=0), entry(1, 0.8, 500, step=940)))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"event": "epoch", "round": 0' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept).replace('"step": 30', '"step": 470'))
    history = read_run(folder)
    for chart in (training_chart(history, "acc"), throughput_chart(history)):
        assert chart
        assert [text for _, text in chart.marks] == ["base", "1"]
        marks = re.findall(r'<path class="mark" d="M([\d.]+) ', str(to_svg(chart)))
        assert all(LEFT < float(x) < WIDTH - RIGHT for x in marks)


def test_ticks_of_nearly_equal_values_have_texts_of_their_own(tmp_path: Path) -> None:
    entries = tuple(
        entry(n, 0.9, params, **({"valid_acc_pruned": 0.9} if n else {}))
        for n, params in enumerate((2_307_400, 2_307_300, 2_307_150))
    )
    chart = accuracy_chart(read_run(make_run(tmp_path / "run", entries)), "params")
    assert chart
    for number, axis in enumerate((chart.x, chart.y)):
        texts = [axis.text(value) for value in ticks(axis, *chart.range(number))]
        assert len(set(texts)) == len(texts) > 1
