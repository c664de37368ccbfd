"""README of an exported model: metrics, data, input, how to load it, origin.

Its head is the metadata of a model card as model hubs read it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job import __version__
from job.artifacts.accuracy import accuracy_change, score_name, signed_points
from job.artifacts.export import INPUT_NAME, OUTPUT_NAME
from job.artifacts.export_coreml import MAX_BATCH
from job.artifacts.export_loading import loading_section
from job.artifacts.json_records import from_json
from job.artifacts.records import RoundRecord
from job.artifacts.versions import package_versions
from job.config import DETECTION
from job.console import counted
from job.data.layout import BUILT_IN
from job.errors import printable, shown
from job.files import read_json
from job.models.input_size import input_shape
from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from job.artifacts.model_card import ModelCard
    from job.artifacts.records import Lineage
    from job.files import JsonObject

CARD_NAME = "README.md"
MARK = "<!-- written by gammaslim export -->"  # a README without it is the user's own
SHOWN_CLASSES = 50
CARD_TAGS = '"channel-pruning", "network-slimming", "gammaslim"'
LIBRARIES = {
    "onnx": "onnx", "openvino": "openvino", "coreml": "coreml", "torch-export": "pytorch",
    "state-dict": "pytorch",
}  # fmt: skip
MIT_DATA = "a sample of Fashion-MNIST (MIT licence, Zalando SE)"


@dataclass(frozen=True)
class Quantisation:
    """Quantisation of a file: how, and its size and accuracy before and after.

    ``sizes`` are in bytes. ``scores`` are accuracies on the ``split`` of ``data``, by default the
    data of the run; None where they were not measured.
    """

    how: str
    sizes: tuple[int, int]
    scores: tuple[float, float] | None = None
    split: str = ""
    data: JsonObject | None = None

    @property
    def is_comparable(self) -> bool:
        """Whether the accuracies are those of the images that the run was validated on."""
        return self.split == "validation" and self.data is None


@dataclass(frozen=True)
class ExportedModel:
    """An exported file: its name and format, the card of its network, and what is known of its run.

    ``data`` is the table [dataset] of the run, ``base`` the record of the run's base, ``outputs``
    the names of the outputs in the file.
    """

    file: str
    format: str
    card: ModelCard
    data: JsonObject | None = None
    base: RoundRecord | None = None
    int8: Quantisation | None = None
    outputs: tuple[str, ...] = (OUTPUT_NAME,)

    @property
    def record(self) -> RoundRecord | None:
        """Metrics of the model on the validation split; None if it was not evaluated in a run."""
        try:
            return from_json(RoundRecord, dict(self.card.metrics), lenient=True)
        except ValueError:
            return None

    @property
    def score(self) -> float | None:
        """Metric of the file itself; None where it was not measured."""
        if self.int8:
            return self.int8.scores[1] if self.int8.scores else None
        return self.record.valid_acc if self.record else None


def export_readme(model: ExportedModel) -> str:
    """Return the README of an exported model, in Markdown."""
    parts = [
        _metadata(model), MARK, f"# {as_markdown(_title(model))}", _summary(model), _metrics(model),
        _data(model), _input(model), "## Load", loading_section(
            model.format, model.file, input_shape(model.card.preprocessing.input_size),
            model.outputs,
        ), _origin(model.card.lineage),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def card_path(output: Path) -> Path:
    """Return the file for the README next to ``output``.

    A README of the user's own, or of another exported model, is kept.
    """
    path = output.with_name(CARD_NAME)
    try:
        text = path.read_text("utf-8", errors="replace") if path.exists() else None
        free = text is None or (MARK in text and f"\n{_subject(output.name)} " in text)
    except OSError:
        free = False
    return path if free else output.with_name(f"{output.name}.{CARD_NAME}")


def base_of_run(folder: Path) -> RoundRecord | None:
    """Return the record of the base of the run whose round is in ``folder``, if there is one."""
    path = folder.absolute().parent / "00" / "model.json"
    try:
        return from_json(RoundRecord, read_json(path)["metrics"], lenient=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_markdown(text: str) -> str:
    """Return ``text`` on one line of Markdown that shows it as it is, in paragraphs and tables."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#!|~&$])", r"\\\1", printable(text))
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)  # no list, no heading


def _code(text: str) -> str:
    """Return ``text`` as code in Markdown; it can contain backticks."""
    marks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}" if "`" in text else f"{marks}{text}{marks}"


def _title(model: ExportedModel) -> str:
    return f"{model.card.model} at width {model.card.width:.4g}"


def _metadata(model: ExportedModel) -> str:
    """Return the YAML head; strings are quoted as in JSON, which is YAML."""
    record, data = model.record, model.data
    classifier = '"image-classification", ' if model.card.is_classifier else ""
    lines = [
        "---",
        f"library_name: {LIBRARIES[model.format]}",
        *(["pipeline_tag: image-classification"] if classifier else []),
        f"tags: [{classifier}{CARD_TAGS}]",
    ]
    lines += ['datasets: ["zalando-datasets/fashion_mnist"]'] if _is_built_in(data) else []
    metric = score_name(record.metric if record else ACCURACY)
    lines += [f"metrics: [{json.dumps(metric)}]"] if model.score is not None else []
    scored, split = data, "validation"
    if model.int8:
        scored, split = model.int8.data or data, model.int8.split
    if model.score is not None and scored and classifier:
        name = json.dumps(printable(_data_name(scored)))
        lines += [
            "model-index:", f"- name: {json.dumps(printable(_title(model)))}", "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {name}, type: image-folder, split: {split}}}",
            f"    metrics: [{{type: accuracy, value: {model.score}}}]",
        ]  # fmt: skip
    return "\n".join([*lines, "---"])


def _subject(file: str) -> str:
    return f"{_code(shown(file))} is"


def _summary(model: ExportedModel) -> str:
    how = {
        "onnx": "an ONNX model", "torch-export": "a program of `torch.export`",
        "openvino": "an OpenVINO model (its weights are in the `.bin` file of the same name)",
        "coreml": "a Core ML model, a folder with an ML program in float32 for up to "
        f"{MAX_BATCH} images",
        "state-dict": "a state dict",
    }[model.format]  # fmt: skip
    card = model.card
    what = f"an image classifier for {counted(card.num_classes, 'class')}"
    if not card.is_classifier:
        what = f"a network for the task {as_markdown(card.task)}"
    return (
        f"{_subject(model.file)} {how}: {what}, made smaller by Gammaslim {__version__} "
        "(channels removed, not masked)."
        + (f"\n\nIt is quantised: {model.int8.how}." if model.int8 else "")
    )


def _metrics(model: ExportedModel) -> str:
    """Return the table of metrics: of this file, before its quantisation, and of the base."""
    record, base, int8 = model.record, model.base, model.int8
    if not record and not int8:
        return ""
    rows = [_score_row(model)]
    costs = [("parameters", "params"), ("multiply-adds for one image", "macs")]
    costs += [] if int8 else [("bytes of all tensors", "bytes")]
    for name, key in costs if record else ():
        value, before = getattr(record, key), getattr(base, key) if base else None
        rows.append((name, f"{value:,}", f"{value:,}", f"{before:,}" if before else "",
                     f"{value / before:.1%}" if before else ""))  # fmt: skip
    if int8:
        plain, size = int8.sizes
        rows.append(("bytes of the file", f"{size:,}", f"{plain:,}", "", ""))
    header = ["", "this model", "before quantisation", "base", ""]
    table = [header, ["---"] * len(header), *map(list, rows)]
    if not int8:
        table = [[*row[:2], *row[3:]] for row in table]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    note = "The validation split chose the epoch and the round; the test split took no part."
    return f"## Metrics\n\n{lines}" + (f"\n\n{note}" if record else "")


def _score_row(model: ExportedModel) -> tuple[str, str, str, str, str]:
    """Return the row of the metric: this file, before its quantisation, the base, the change."""
    record, base, int8 = model.record, model.base, model.int8
    split, before = "validation split", record.valid_acc if record else None
    if int8 and int8.scores:
        before = int8.scores[0]
        split = f"{int8.split} split"
        split += f" of {as_markdown(_data_name(int8.data))}" if int8.data else ""
        base = base if int8.is_comparable else None
    change = ""
    if base and model.score is not None:
        change = f"{signed_points(accuracy_change(model.score, base.valid_acc))} points"
    return (
        f"{score_name(record.metric if record else ACCURACY)} on the {split}",
        "not measured" if model.score is None else f"{model.score:.2%}",
        "" if before is None else f"{before:.2%}",
        f"{base.valid_acc:.2%}" if base else "",
        change,
    )


def _data(model: ExportedModel) -> str:
    if not model.data:
        return ""
    counts = (f"{model.data[k]:,} {k} images" for k in ("training", "validation")
              if isinstance(model.data.get(k), int))  # fmt: skip
    licence = "" if _is_built_in(model.data) else " Its licence is not known to Gammaslim."
    text = f"{as_markdown(_data_name(model.data))}: {', '.join(counts)}.{licence}"
    fingerprint = model.data.get("fingerprint")
    if isinstance(fingerprint, str):
        text += f"\n\nFingerprint: {_code(printable(fingerprint))}"
    return f"## Data\n\n{text}"


def _is_built_in(data: Mapping[str, object] | None) -> bool:
    return bool(data) and data is not None and data.get("layout") == BUILT_IN


def _data_name(data: Mapping[str, object]) -> str:
    return MIT_DATA if _is_built_in(data) else Path(str(data.get("root", "unknown"))).name


def _input(model: ExportedModel) -> str:
    card, made = model.card, model.card.preprocessing
    if not card.is_classifier:
        return _task_input(card, model.outputs)
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (made.mean, made.std))
    resize = f"resize {made.resize} ({made.interpolation}), " if made.resize.side else ""
    steps = f"{resize}central crop of {made.size} x {made.size}, scale to [0, 1]"
    return (
        f"## Input and output\n\nInput: `{INPUT_NAME}` (B, 3, {made.size}, {made.size}) float32, "
        f"RGB: {steps}, subtract the mean {mean}, divide by {std}.\n\n"
        f"Output: `{OUTPUT_NAME}` (B, {card.num_classes})"
        + (f". Classes: {_classes(card)}" if card.class_names else "")
    )


_ANCHORS = " (B, anchors, N): class logits, then box regression, then centerness if there is any"


def _task_input(card: ModelCard, outputs: Sequence[str]) -> str:
    names = ", ".join(_code(printable(name)) for name in outputs)
    sides = ", ".join(map(str, input_shape(card.preprocessing.input_size)))
    return (
        f"## Input and output\n\nInput: `{INPUT_NAME}` (B, {sides}) float32, as the task makes it."
        "\n\n"
        f"Output: {names}{_ANCHORS if card.task == DETECTION else ''}"
        + (f". Classes: {_classes(card)}" if card.class_names else "")
    )


def _classes(card: ModelCard) -> str:
    names = [f"{number} {as_markdown(name)}" for number, name in enumerate(card.class_names)]
    return ", ".join(names[:SHOWN_CLASSES]) + (", …" if len(names) > SHOWN_CLASSES else "")


def _origin(lineage: Lineage) -> str:
    facts = (
        ("run", Path(lineage.run).name if lineage.run else None),
        ("round", lineage.round),
        ("seed", lineage.seed),
        ("weights of the base", Path(lineage.base_weights).name if lineage.base_weights else None),
        ("SHA-256 of the base", lineage.base_sha256),
        ("SHA-256 of the network before the last cut", lineage.wide_sha256),
    )
    rows = [f"| {name} | {as_markdown(str(value))} |" for name, value in facts if value is not None]
    rows += [f"| {name} | {version} |" for name, version in package_versions().items()]
    return "## Origin\n\n| | |\n|---|---|\n" + "\n".join(rows)
