"""How images become inputs: presets, single options, and what other packages state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.models import get_weight
from torchvision.transforms import functional as F

from job.artifacts.export import export_metadata
from job.artifacts.model_card import ModelCard, read_card, save_model
from job.cli.command_options import ModelOptions
from job.cli.main import gammaslim as program
from job.cli.open_model import open_model
from job.config import InterpolationName, PresetName, PruneConfig, WeightsPackage
from job.data import pretrained as packages
from job.data.augmentation import resampling
from job.data.batches import AugmentedImages, PlainImages
from job.data.geometry import Resize
from job.data.preprocessing import Preprocessing
from job.data.preprocessing_options import PreprocessingOptions
from job.data.presets import PRESETS, Preset
from job.data.sample_order import Draw, epoch_table
from job.data.splits import ArraySplit
from job.errors import DataError, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(61, 97), (96, 96), (230, 229), (95, 96)]  # heights and widths


def photos() -> list[Image.Image]:
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in SHAPES]


def inputs(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(preprocessing.evaluate(image)).copy()
    return preprocessing.to_input(torch.from_numpy(pixels)[None])[0]


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",  # bicubic, 0.95
        "resnet18.tv_in1k",  # bilinear, 0.875
        "inception_v3.tf_in1k",  # 299, mean 0.5
        "coat_lite_medium_384",  # both sides, 1.0
        "volo_d4_448",  # 1.15: padded
    ],
)
def test_inputs_equal_those_of_timms_own_transform(name: str) -> None:
    stated = timm.get_pretrained_cfg(name)
    assert stated
    theirs = create_transform(**resolve_data_config(pretrained_cfg=stated.to_dict()))
    ours = PreprocessingOptions(transform=f"timm:{name}").resolve(0)
    for image in photos():
        assert torch.equal(inputs(ours, image), theirs(image)), (ours.describe(), image.size)


@pytest.mark.parametrize(("crop_mode", "fit"), packages.TIMM_FITS.items())
@pytest.mark.parametrize("share", [0.875, 0.95, 1.0])
def test_each_of_timms_ways_to_crop(crop_mode: str, fit: str, share: float) -> None:
    theirs = create_transform(
        (3, 96, 96), crop_pct=share, crop_mode=crop_mode, interpolation="bicubic",
        mean=(0.5, 0.4, 0.3), std=STD,
    )  # fmt: skip
    resize = Resize(int(96 / share), fit)
    ours = Preprocessing.of("small", 96, resize, "bicubic", (0.5, 0.4, 0.3), STD)
    for image in photos():
        assert torch.equal(inputs(ours, image), theirs(image)), image.size


@pytest.mark.parametrize(
    "name",
    [
        "ResNet50_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.DEFAULT",
        "EfficientNet_B1_Weights.IMAGENET1K_V2",
        "Inception_V3_Weights.DEFAULT",
    ],
)
def test_inputs_equal_those_of_torchvisions_own_transform(name: str) -> None:
    theirs = get_weight(name).transforms()
    ours = PreprocessingOptions(transform=f"torchvision:{name}").resolve(0)
    for image in photos():
        assert torch.equal(inputs(ours, image), theirs(image)), (ours.describe(), image.size)


def test_a_packages_transform_at_another_size() -> None:
    """timm keeps the share of the crop; a single option wins over what the package states."""
    stated = timm.get_pretrained_cfg("resnet50")
    assert stated
    config = resolve_data_config({"input_size": (3, 96, 96)}, pretrained_cfg=stated.to_dict())
    theirs = create_transform(**config)
    options = PreprocessingOptions(transform="timm:resnet50", image_size=96)
    for image in photos():
        assert torch.equal(inputs(options.resolve(0), image), theirs(image))
    changed = replace(options, interpolation="nearest", crop=1.0, std=(1.0, 1.0, 1.0)).resolve(0)
    assert (changed.resize, changed.interpolation) == (Resize(96), "nearest")
    assert (changed.mean, changed.std) == (MEAN, (1.0, 1.0, 1.0))
    small = PreprocessingOptions(
        transform="torchvision:ResNet50_Weights.IMAGENET1K_V2", image_size=112
    )
    assert small.resolve(0).resize == Resize(116)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("timm:resnet5", "did you mean resnet50"),
        ("timm:resnet18.tv_in", "it has .*resnet18.tv_in1k"),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V3", "did you mean ResNet50_Weights.IMAGENET1K"),
        (
            "torchvision:resnet50",
            "name the weights .*ResNet50_Weights.DEFAULT",
        ),
        ("torchvision:FCN_ResNet50_Weights.DEFAULT", "not belong to an image classification"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(transform: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PreprocessingOptions(transform=transform).check()


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="needs the package timm: pip install timm"):
        PreprocessingOptions(transform="timm:resnet26").check()


def parse(*args: str, command: str = "prune", env: dict[str, str] | None = None) -> dict[str, Any]:
    """What the command line makes of ``args``."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (env or {}).items():
            patch.setenv(key, value)
        parent = click.Context(program, auto_envvar_prefix="GAMMASLIM")
        return program.commands[command].make_context(command, list(args), parent).params


@pytest.mark.parametrize(
    "words",
    [
        ["--mean", "0.485", "0.456", "0.406"],
        ["--mean", "0.485 0.456 0.406"],
        ["--mean", "0.485,0.456,0.406"],
        ["--mean=[0.485, 0.456, 0.406]"],
    ],
)
def test_three_numbers_in_whatever_form(words: list[str]) -> None:
    assert parse(*words, "--seed", "3")["mean"] == MEAN
    values = parse(*words, "runs/x", "--std", "0.5", command="evaluate")
    assert (values["path"], values["mean"], values["std"]) == ("runs/x", MEAN, (0.5, 0.5, 0.5))


def test_a_file_and_the_environment_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'mean = [0.485, 0.456, 0.406]\nstd = 0.5\nresize = 40\ncrop = 0.8\ninterpolation = "box"'
    )
    values = parse("--config", str(file), "--std", "0.25")
    assert (values["mean"], values["std"]) == (MEAN, (0.25, 0.25, 0.25))
    assert (values["resize"], values["crop"], values["interpolation"]) == ("40", 0.8, "box")
    env = {"GAMMASLIM_PRUNE_MEAN": "0.1 0.2 0.3", "GAMMASLIM_PRUNE_RESIZE": "32x32"}
    values = parse(env=env)
    assert (values["mean"], values["resize"]) == ((0.1, 0.2, 0.3), "32x32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean", "123.675", "116.28", "103.53"], "divide by 255, which gives 0.485 0.456 0.406"),
        (["--std", "58.395 57.12 57.375"], "divide by 255, which gives 0.229 0.224 0.225"),
        (["--std", "0"], "from 0.0001 to 1"),
        (["--std", "1e-300"], "from 0.0001 to 1"),  # 0 in float32
        (["--mean", "-0.5"], "from 0 to 1"),
        (["--mean", "nan"], "from 0 to 1"),
        (["--mean", "0.5 0.5"], "neither one number nor three"),
        (["--mean", "grey"], "neither one number nor three"),
        (["--resize", "256x224"], "not square"),
        (["--resize", "big"], "the form 256"),
        (["--resize", "0"], "the form 256"),
        (["--crop", "-1"], "share of the resized side"),
        (["--crop", "224.5"], "share of the resized side"),
        (["--transform", "imagnet"], "did you mean imagenet"),
        (["--transform", "timm:"], "timm:NAME"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("given", "largest", "expected"),
    [
        ({"mean": MEAN, "std": STD}, 32, Preprocessing.of("small", 32, mean=MEAN, std=STD)),
        ({"resize": "40"}, 300, Preprocessing.of("small", 40, Resize(40))),
        ({"resize": "200"}, 900, Preprocessing.of("homework", 200, Resize(200))),
        (
            {"resize": "288", "transform": "imagenet"},
            0,
            Preprocessing.of("imagenet", 224, Resize(288)),
        ),
        ({"resize": "256", "crop": 0.875}, 900, Preprocessing.of("homework", 224, Resize(256))),
        ({"crop": 0.8, "image_size": 32}, 32, Preprocessing.of("small", 32, Resize(40))),
        ({"crop": 48.0}, 60, Preprocessing.of("small", 48)),
        (
            {"resize": "none", "transform": "imagenet"},
            0,
            Preprocessing.of("imagenet", 224, Resize()),
        ),
    ],
)
def test_single_options_override_a_preset(
    given: dict[str, Any], largest: int, expected: Preprocessing
) -> None:
    options = PreprocessingOptions(**given)
    options.check()
    assert options.resolve(largest) == expected
    config = PruneConfig(**given)
    assert PreprocessingOptions.of(config) == options
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()  # as config.toml has it


@pytest.mark.parametrize(
    "given",
    [
        {"crop": 200.0, "image_size": 224},
        {"crop": 0.5, "resize": "100", "image_size": 60},
        {"crop": 0.5, "resize": "none"},
    ],
)
def test_sizes_that_contradict_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--crop"):
        PreprocessingOptions(**given).check()


@pytest.mark.parametrize("preset", ["homework", "small"])
def test_training_sees_images_of_the_size_that_evaluation_does(preset: str) -> None:
    resized = Preprocessing.of(preset, 32, Resize(36), "bicubic")
    plain = Preprocessing.of(preset, 32)
    for image, draw in zip(photos(), epoch_table(4, 0, 0, 0).rows(range(4)), strict=True):
        shrunk = F.resize(image, 36, F.InterpolationMode.BICUBIC)
        assert resized.train(image, draw) == plain.train(shrunk, draw)
        assert resized.evaluate(image) == F.center_crop(shrunk, [32, 32])


def test_the_names_on_the_command_line_are_those_of_the_tables() -> None:
    assert get_args(PresetName) == tuple(PRESETS)
    assert get_args(WeightsPackage) == tuple(packages.SOURCES)
    for name in get_args(InterpolationName):
        assert resampling(name) in Image.Resampling


def test_an_entry_in_the_table_adds_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(image: Image.Image, _draw: Draw, size: int, _: Image.Resampling) -> Image.Image:
        return F.hflip(F.center_crop(image, [size, size]))

    preset = Preset("mirrored", mirrored, default_size=lambda _: 48, scale=(MEAN, STD))
    monkeypatch.setitem(PRESETS, "mirrored", preset)
    preprocessing = PreprocessingOptions(transform="mirrored").resolve(largest=300)
    assert preprocessing == Preprocessing("mirrored", 48, Resize(), "bilinear", MEAN, STD)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    (draw,) = epoch_table(1, 0, 0, 0).rows(range(1))
    for image in photos():
        assert preprocessing.train(image, draw) == F.hflip(preprocessing.evaluate(image))


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
@pytest.mark.parametrize("resize", [Resize(), Resize(40, "both")])
def test_arrays_in_memory_grey_too_are_resized_and_normalised(
    shape: tuple[int, ...], resize: Resize
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    split = ArraySplit(images, np.arange(5))
    preprocessing = Preprocessing.of("small", 32, resize, "bicubic", MEAN, STD)
    batch, _ = PlainImages(split, preprocessing).__getitems__([4, 0])  # type: ignore[misc]
    for row, index in zip(preprocessing.to_input(batch), (4, 0), strict=True):
        image = Image.fromarray(images[index]).convert("RGB")
        if resize.side:
            image = F.resize(image, [40, 40], F.InterpolationMode.BICUBIC)
        wanted = F.normalize(F.to_tensor(F.center_crop(image, [32, 32])), list(MEAN), list(STD))
        assert torch.equal(row, wanted)
    draws = epoch_table(5, 0, 0, 0).rows(range(5))
    batch, _ = AugmentedImages(split, preprocessing).__getitems__(draws)  # type: ignore[misc]
    single = [np.asarray(preprocessing.train(split.image(d.index), d)) for d in draws]
    assert np.array_equal(batch.numpy(), np.stack(single))


def saved(folder: Path, preprocessing: Preprocessing) -> ModelCard:
    card = ModelCard("student", {"base": 2}, 3, preprocessing=preprocessing)
    save_model(folder, card.build(), card)
    return card


def test_model_json_and_exports_hold_it_and_options_change_it(tmp_path: Path) -> None:
    squash = Preprocessing.of("small", 32, Resize(36, "both"), "bicubic", MEAN, STD)
    card = saved(tmp_path / "m", squash)
    assert read_card(tmp_path / "m").preprocessing == squash
    assert json.loads(json.dumps(export_metadata(card)))["input"] == {
        "preset": "small", "size": 32, "resize": 36, "fit": "both", "interpolation": "bicubic",
        "mean": list(MEAN), "std": list(STD),
    }  # fmt: skip
    path = str(tmp_path / "m")
    assert open_model(ModelOptions(path))[1].preprocessing == squash
    changed = open_model(ModelOptions(path, mean=(0.5,) * 3, crop=0.5))[1].preprocessing
    assert changed == replace(squash, mean=(0.5, 0.5, 0.5), resize=Resize(64, "both"))
    larger = open_model(ModelOptions(path, image_size=64))[1].preprocessing
    assert (larger.size, larger.resize) == (64, Resize(72, "both"))


def test_a_model_of_before_there_were_these_keys_loads(tmp_path: Path) -> None:
    for preset in ("homework", "small", "imagenet"):
        card = saved(tmp_path / preset, Preprocessing.of(preset, 32))
        file = tmp_path / preset / "model.json"
        content = json.loads(file.read_text())
        for key in ("resize", "fit", "interpolation"):
            del content["input"][key]
        file.write_text(json.dumps(content))
        assert read_card(tmp_path / preset).preprocessing == card.preprocessing


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [0.5, 0.5]}, {"mean": [123.0, 116.0, 103.0]}, {"std": [0, 0, 0]}, {"std": "x"},
        {"resize": 10**6}, {"resize": -1}, {"resize": "36"}, {"fit": "x"}, {"interpolation": "x"},
        {"interpolation": ["box"]}, {"mean": None},
    ],
)  # fmt: skip
def test_a_damaged_model_json_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    saved(tmp_path / "m", Preprocessing.of("small", 32, Resize(36)))
    file = tmp_path / "m" / "model.json"
    content = json.loads(file.read_text())
    content["input"] |= wrong
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.json: unknown preprocessing"):
        read_card(tmp_path / "m")


@pytest.mark.parametrize("name", ["timm:resnet50", "torchvision:ResNet50_Weights.IMAGENET1K_V2"])
def test_inputs_of_any_size_have_a_resizing(name: str) -> None:
    """At least a pixel, since 0 is no resizing at all, and at most the most that there is."""
    large = PreprocessingOptions(transform=name, image_size=8192).resolve(0)
    assert (large.size, large.resize) == (8192, Resize(8192))
    padded = Preprocessing.of("small", 48, Resize(20))
    assert PreprocessingOptions(image_size=1).override(padded).resize == Resize(1)
    assert PreprocessingOptions(image_size=8192).override(padded).resize == Resize(3413)
    grown = Preprocessing.of("small", 32, Resize(40))
    assert PreprocessingOptions(image_size=8000).override(grown).resize == Resize(8192)
