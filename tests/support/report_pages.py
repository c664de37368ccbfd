"""Runs as a job leaves them, written without training, and report pages as a browser sees them."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[bytes] = []
        self.alts: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.best: list[int] = []
        self.in_cell = False
        self.charts: dict[str, str] = {}  # the words for those who do not see it, by name
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            head, _, content = str(values["src"]).partition(",")
            assert head in ("data:image/png;base64", "data:image/jpeg;base64")
            self.images.append(base64.b64decode(content))
            self.alts.append(str(values["alt"]))
        if tag == "figure":
            self.charts[str(values["id"])] = ""
        if tag == "svg":
            self.charts[list(self.charts)[-1]] = str(values["aria-label"])
        self.links += [str(values[key]) for key in ("href", "action") if key in values]
        if tag == "tr":
            self.rows.append([])
            if values.get("class") == "best":
                self.best.append(len(self.rows) - 1)
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def page(path: Path) -> Page:
    """A report that needs nothing but itself: one script, ours, and no link."""
    text = path.read_text("utf-8")
    found = Page(text)
    assert not {"link", "iframe", "object", "form", "b>"} & set(found.tags)
    assert found.tags.count("script") == 1
    assert not found.links
    assert all(len(words) > 20 for words in found.charts.values())
    for image in found.images:
        assert max(Image.open(io.BytesIO(image)).size) <= 96
    return found


def check_figures(found: Page, folder: Path) -> None:
    """Every chart of the page is a file of ``folder``, and the other way round."""
    files = sorted(file for file in folder.iterdir() if file.name != "comparison.png")
    assert [file.stem for file in files] == sorted(found.charts)
    for file in files:
        assert Image.open(file).size == (640, 400)


def entry(number: int, accuracy: float, params: int, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "width": 0.9**number, "channels": 100 - number, "params": params,
        "macs": params * 40, "bytes": params * 4, "valid_acc": accuracy, "valid_loss": 0.5,
        "best_epoch": 1, "step": 20 * (number + 1), "seconds": 3.25,
        **({"valid_acc_pruned": accuracy - 0.1} if number else {}), **more,
    }  # fmt: skip


ENTRIES = (entry(0, 0.9, 1000), entry(1, 0.91, 800), entry(2, 0.895, 600), entry(3, 0.8, 400))


def make_run(
    folder: Path, entries: tuple[dict[str, Any], ...] = ENTRIES, best: int = 2, **more: Any
) -> Path:
    """A run folder as a job leaves it."""
    folder.mkdir(parents=True)
    reason = more.get("reason", "the fewest parameters within 1 point of the base")
    (folder / "config.toml").write_text(
        f'[prune]\nmodel = "student"\nrate = 0.9\n[dataset]\nfingerprint = "{more.get("data", 7)}"'
    )
    status = {"state": more.get("state", "finished"), "exit_code": more.get("code", 0)}
    at = {"round": max(0, len(entries) - 1), "epoch": 1, "step": 80, "time": 1.7e9}
    (folder / "status.json").write_text(json.dumps(status | at))
    lines = []
    for number, e in enumerate(entries):
        for epoch in (0, 1):
            scores = {"train_loss": 1.5, "train_acc": 0.5, "valid_loss": 1.0, "valid_acc": 0.6}
            scores |= {"lr": 0.001, "images_per_second": 900.0, "seconds": 1.5}
            costs = {key: e[key] for key in ("width", "params", "macs")}
            where = {"round": number, "epoch": epoch, "step": 20 * number + 10 * (epoch + 1)}
            lines.append({"event": "epoch", **where, **scores, **costs})
        lines.append({"event": "round", **e})
        model = folder / "rounds" / f"{number:02d}"
        model.mkdir(parents=True)
        name = more.get("layer", "cnn.0")
        widths = {"widths": {name: 10 - number, "fc": 3}, "base": {"widths": {name: 10, "fc": 3}}}
        (model / "model.json").write_text(json.dumps(widths))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if entries:
        summary = {"format": 1, "state": "finished", "base": entries[0], "rounds": entries[1:]}
        chosen = {"recommended": f"rounds/{best:02d}", "reason": reason, "seconds": 123.4}
        (folder / "summary.json").write_text(json.dumps(summary | chosen))
    return folder


def small_image(color: tuple[int, int, int]) -> str:
    """An image as a data URL."""
    content = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def write_evaluations(folder: Path, best: int = 2, **more: Any) -> None:
    """Add what the base and the recommended model got wrong to a run, and how long they took."""
    gamma = {"count": 10, "zeros": 1, "max": 2.0, "bins": [1, 4, 5]}
    base = {
        "counts": [4, 4, 2],
        "gamma": gamma,
        "errors": {"index": [0, 5], "label": [0, 1], "predicted": [1, 0]},
    }
    slim = {"counts": [4, 4, 2], "gamma": gamma | {"count": 8, "max": 1.0}, "lost": 2, "won": 1,
            "errors": {"index": [0, 8, 9], "label": [0, 2, 2], "predicted": [2, 0, 1]},
            "examples": [
                {"name": "8.png <b>", "label": 2, "base": 2, "predicted": 0,
                 "image": small_image((255, 0, 0))},
                {"name": "5.png", "label": 1, "base": 0, "predicted": 1,
                 "image": small_image((0, 255, 0))}]}  # fmt: skip
    for number, record, seconds in ((0, base, 0.02), (best, slim | more, 0.0125)):
        place = folder / "rounds" / f"{number:02d}"
        (place / "evaluation.json").write_text(json.dumps({**record, "format": 1}))
        (place / "latency.json").write_text(json.dumps({"seconds": seconds, "device": "cpu"}))
        card = json.loads((place / "model.json").read_text())
        card["class_names"] = ["T-shirt <b>", "trouser", "wide\nbag"]
        (place / "model.json").write_text(json.dumps(card))
