"""Networks to measure with ``bench``: each MODEL, and the base of the first one."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.artifacts.export_onnx import onnx_bytes
from job.artifacts.model_card import find_model
from job.cli.open_model import open_model
from job.errors import DataError, GammaslimError, InputNotFound, UsageError, shown
from job.files import is_file, read_bytes
from job.models.input_size import input_shape
from job.slimming.latency.benchmark import Subject
from job.slimming.latency.runtimes import NotMeasured
from job.slimming.planning.cost import Cost, layer_costs, network_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from job.artifacts.model_card import ModelCard
    from job.cli.command_options import ModelOptions

ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True, eq=False)
class BenchNetwork:
    """Network to measure, with its ``path``, and its width and costs if they are known."""

    subject: Subject
    path: str
    width: float | None = None
    cost: Cost | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.subject.name


def open_networks(
    options: ModelOptions, paths: Sequence[str], *, export: bool
) -> list[BenchNetwork]:
    """Open each MODEL; the first network is the base of the first MODEL if it has one.

    With ``export``, torch networks can be converted to ONNX. Raises InputNotFound, DataError
    or UsageError.
    """
    seen: set[Path] = set()
    networks = []
    for name, path, network, card in _opened(options, paths):
        place = Path(path).resolve()
        if name is None and place in seen:
            continue
        if name is None:
            seen.add(place)
        if network is None or card is None:
            networks.append(BenchNetwork(_onnx_subject(options, Path(path)), path))
        else:
            networks.append(_torch_network(name or shown(path), path, network, card, export))
    names = Counter(network.name for network in networks)
    assert all(count == 1 for count in names.values()), names
    return networks


Opened = tuple["str | None", str, "nn.Module | None", "ModelCard | None"]


def _opened(options: ModelOptions, paths: Sequence[str]) -> Iterator[Opened]:
    """Yield the name (None: the path), the path, and the network and card (None: an ONNX file)."""
    for number, path in enumerate(paths):
        file = Path(path)
        if file.suffix.lower() == ONNX_SUFFIX:
            if not is_file(file):
                raise InputNotFound(f"{shown(path)} does not exist")
            yield None, path, None, None
            continue
        folder = find_model(file) if file.is_dir() or not file.exists() else file
        network, card = open_model(replace(options, path=path))
        if number == 0 and (base := _base_folder(folder)):
            yield None, str(base), *open_model(replace(options, path=str(base)))
        elif number == 0 and card.layers:
            uncut = replace(card, layers={}, width=1.0)
            yield f"{shown(folder)} before its cuts", str(folder), uncut.build().eval(), uncut
        yield None, str(folder), network, card


def _base_folder(folder: Path) -> Path | None:
    """Return the base of a round's folder; None for the base itself, or another folder."""
    base = folder.parent / "00"
    is_round = folder.absolute().parent.name == "rounds" and is_file(base / "model.json")
    return base if is_round and base.resolve() != folder.resolve() else None


def _torch_network(
    name: str, path: str, network: nn.Module, card: ModelCard, export: bool
) -> BenchNetwork:
    size = card.preprocessing.input_size
    macs: Counter[str] = Counter()
    for layer in layer_costs(network, size):
        macs[layer.name] += layer.macs
    onnx = _exporter(network, card) if export else None
    subject = Subject(name, input_shape(size), network, macs, onnx)
    return BenchNetwork(subject, path, card.width, network_cost(network, size))


def _exporter(network: nn.Module, card: ModelCard) -> Callable[[], bytes]:
    def export() -> bytes:
        try:
            return onnx_bytes(network, card)[0]
        except GammaslimError as error:
            raise NotMeasured(str(error)) from error

    return export


def _onnx_subject(options: ModelOptions, path: Path) -> Subject:
    """Open the ONNX file ``path``; raises UsageError without onnxruntime, or DataError."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(f"{shown(path)} needs onnxruntime: pip install 'gammaslim[onnx]'")
    import onnxruntime

    content = read_bytes(path)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            content, settings, providers=["CPUExecutionProvider"]
        )
        inputs = session.get_inputs()
    except Exception as error:  # onnxruntime has its own exceptions
        raise DataError(f"{shown(path)} is not an ONNX model") from error
    shape: list[Any] = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] != 3:
        raise DataError(f"{shown(path)} does not take one batch of images (B, 3, H, W)")
    sides = [side if isinstance(side, int) else options.image_size for side in shape[2:]]
    if None in sides:
        raise UsageError(f"{shown(path)} takes images of any size: give --image-size")
    return Subject(shown(path), (3, *(side for side in sides if side)), None, {}, lambda: content)
