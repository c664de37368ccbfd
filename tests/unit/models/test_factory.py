"""Networks by name are the paper's and torchvision's, and weights of others find their places."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path

import click
import pytest
import torch
import torchvision.models
from torch import nn

from job.artifacts.model_card import ModelCard, load_model, save_model
from job.cli.command_options import ModelOptions
from job.cli.open_model import open_model
from job.cli.option_types import KeyValue
from job.data.preprocessing import Preprocessing
from job.errors import DataError, UsageError
from job.models.classifier import find_head
from job.models.factory import (
    NETWORKS,
    BuiltInNetwork,
    build_network,
    build_with_note,
    builtin_name,
    nominal_size,
    nominal_width,
)
from job.models.input_size import check_size
from job.models.weights import load_state
from job.models.weights_file import read_state
from support.cuts import randomise

State = dict[str, torch.Tensor]

# Liu et al. 2017, table 1: millions of parameters for CIFAR-10 and CIFAR-100; weight layers
PAPER = {
    "vgg19-cifar": (20.04, 20.08, 17),  # 19 with VGG's three linear layers
    "resnet164-cifar": (1.70, 1.73, 164),
    "densenet40-cifar": (1.02, 1.06, 40),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_have_its_sizes_and_initialisation(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 10, {})
    params = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(params, 2) == PAPER[name][0]
    larger = sum(p.numel() for p in build_network(name, 100, {}).parameters()) / 1e6
    assert round(larger, 2) == PAPER[name][1]
    layers = [
        (key, layer)
        for key, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and "downsample" not in key
    ]
    assert len(layers) == PAPER[name][2]
    for _, layer in layers[:-1]:
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is None
        written = layer.out_channels * layer.kernel_size[0] ** 2
        tolerance = 6 / math.sqrt(2 * layer.weight.numel())
        spread = float(layer.weight.detach().std())
        assert spread == pytest.approx(math.sqrt(2 / written), rel=tolerance)
    gammas = [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((gamma == 0.5).all() for gamma in gammas)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_bottleneck_adds_its_branch_to_what_came_in() -> None:
    network = randomise(build_network("resnet164-cifar", 10, {}))
    block = network.get_submodule("layer2.3")
    x = torch.randn(2, 128, 16, 16)
    y = x
    for number in (1, 2, 3):  # BatchNorm, ReLU, convolution
        norm, conv = (block.get_submodule(f"{kind}{number}") for kind in ("bn", "conv"))
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        y = (y - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        y = (y + norm.bias.view(-1, 1, 1)).clamp_min(0)
        y = nn.functional.conv2d(y, conv.weight, padding=1 if number == 2 else 0)
    torch.testing.assert_close(block(x), x + y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "other"),
    [
        ("resnet18", {}, {}),
        ("squeezenet1_1", {}, {}),
        ("mobilenet_v2", {"width_mult": 0.5}, {}),
        ("googlenet", {}, {"aux_logits": False, "init_weights": True}),
        ("googlenet", {"aux_logits": True}, {"init_weights": True}),
    ],
)
def test_torchvisions_names_are_its_networks(
    name: str, args: dict[str, object], other: dict[str, object]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = build_network(name, 7, args)
    reference = torchvision.models.get_model(name, num_classes=7, **args, **other)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    assert nominal_width(name, args) == 1.0


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet81", {}, "did you mean resnet18"),
        ("vgg19-cifr", {}, "did you mean vgg19-cifar"),
        ("", {}, "module:factory"),
        ("convnext_atto", {}, "those of timm as timm:NAME"),
        (
            "timm:mobilenetv3_smal_050",
            {},
            "timm has no model .*; did you mean mobilenetv3_small_050",
        ),
        ("timm:", {}, "timm has no model ''"),
        ("timm:test_resnet", {"depth": 3}, "timm:test_resnet does not take --model-arg depth=3"),
        ("resnet18", {"depth": 3}, "resnet18 does not take --model-arg depth=3"),
        ("resnet18", {"weights": "DEFAULT"}, "its own option: --weights"),
        ("vgg19-cifar", {"num_classes": 3}, "its own option: --num-classes"),
    ],
)
@pytest.mark.sampled(2)
def test_unknown_networks_and_arguments_are_named(
    name: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_network(name, 3, args)
    assert "\n" not in str(caught.value)


def test_booleans_are_arguments() -> None:
    convert = KeyValue().convert
    assert convert("aux_logits=false", None, None) == ("aux_logits", False)
    assert convert("aux_logits=True", None, None) == ("aux_logits", True)
    assert convert("base=1", None, None) == ("base", 1)
    assert convert("kind=truest", None, None) == ("kind", "truest")
    with pytest.raises(click.BadParameter, match="K=V"):
        convert("=true", None, None)


NETS = """
import os, shutil
import torch
from torch import nn

def plain(width=8):  # ignores --num-classes
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = plain()
        self.body[5] = nn.Linear(8, num_classes)
    def forward(self, images):
        return self.body(images)

def headless(num_classes=5):
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def maps(num_classes):
    return nn.Conv2d(3, num_classes, 3)

def number():
    return 3

def crash():
    raise RuntimeError("first line\\nsecond line")

constant = 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gammaslim_nets.py").write_text(NETS)
    (tmp_path / "gammaslim_broken.py").write_text("import gammaslim_nowhere\n")
    (tmp_path / "gammaslim_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gammaslim_nets", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gammaslim_nets:plian", "no plian in gammaslim_nets; did you mean plain"),
        ("gammaslim_nets:", "not of the form module:factory"),
        (":plain", "not of the form module:factory"),
        ("gammaslim_net:plain", "no module gammaslim_net; run from the folder that has it"),
        ("gammaslim_nets.more:plain", r"no module gammaslim_nets\.more"),
        ("gammaslim_broken:plain", "importing gammaslim_broken fails: .*gammaslim_nowhere"),
        ("gammaslim_exits:plain", "importing gammaslim_exits fails: SystemExit"),
        ("gammaslim_nets:constant", "int, which cannot be called"),
        ("gammaslim_nets:number", "must return a torch.nn.Module"),
        ("gammaslim_nets:crash", "RuntimeError: first line$"),
        ("gammaslim_nets:headless", "7 logits for 3 classes.*let the factory take num_classes"),
        ("gammaslim_nets:maps", r"return logits \(B, N\)"),
        ("os:system", "module of Python itself"),
    ],
)
@pytest.mark.sampled(2)
def test_mistakes_with_a_factory_are_one_line(nets: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_network(name, 3, {})
    assert "\n" not in str(caught.value)


def test_an_entry_in_the_table_adds_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(num_classes: int, width: int = 4) -> nn.Module:
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        return nn.Sequential(nn.Conv2d(3, width, 3), *pooled)

    entry = BuiltInNetwork(linear, 48, "one convolution", width_arg="width")
    monkeypatch.setitem(NETWORKS, "linear", entry)
    network, args = build_network("linear", 3, {"width": 2}), {"width": 2}
    assert find_head(network) == ("3", 3)
    assert (nominal_size("linear"), nominal_width("linear", args)) == (48, 2.0)
    assert builtin_name(linear) == "linear"
    with pytest.raises(UsageError, match=r"models: .*, linear, torchvision's"):
        build_network("liner-net", 3, {})


def test_a_factory_that_takes_num_classes_gets_them(nets: Path) -> None:
    network, note = build_with_note("gammaslim_nets:Net", 3, {})
    assert type(network).__name__ == "Net"
    assert find_head(network) == ("body.5", 3)
    assert note == ""


def test_the_classifier_of_one_that_does_not_is_replaced_and_said(nets: Path) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(4)
        network, note = build_with_note("gammaslim_nets:plain", 3, {"width": 6})
        made.append(network)
        assert "5 logits for 3 classes: its classifier, layer 5, is replaced" in note
    assert made[0].eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    states = [network.state_dict() for network in made]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert build_with_note("gammaslim_nets:plain", 5, {})[1] == ""


def test_a_model_of_timm_is_built_by_its_name_with_its_tag_or_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    card = ModelCard(
        "timm:test_resnet.r160_in1k", {"drop_rate": 0.1}, 3,
        preprocessing=Preprocessing.of("small", 32),
    )  # fmt: skip
    network = card.build()
    assert (type(network).__module__, network.drop_rate) == ("timm.models.resnet", 0.1)
    save_model(tmp_path / "model", network, card)
    loaded, _ = load_model(tmp_path / "model")
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(image), network.eval()(image))
    assert loaded(image).shape == (1, 3)
    assert build_network("timm:test_resnet", 4, {}).num_classes == 4
    assert build_network("timm:create_model", 4, {"model_name": "test_resnet"}).num_classes == 4


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torch:load", {"f": "trap"}),
        ("torch.hub:load", {"repo_or_dir": "a/b", "model": "c"}),
        ("gammaslim_nets:os.system", {"command": "touch executed"}),
        ("gammaslim_nets:shutil.rmtree", {"path": "precious"}),
    ],
)
def test_a_model_card_does_not_call_any_function(
    nets: Path, name: str, args: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(nets)
    (nets / "precious").mkdir()
    card = ModelCard("student", {"base": 2}, 3, preprocessing=Preprocessing.of("small", 32))
    save_model(nets / "model", card.build(), card)
    file = nets / "model" / "model.json"
    text = file.read_text().replace('"student"', f'"{name}"')
    file.write_text(text.replace('{"base": 2}', str(args).replace("'", '"')))
    with pytest.raises(DataError, match="if you trust it"):
        load_model(nets / "model")
    assert (nets / "precious").exists()
    assert not (nets / "executed").exists()


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return randomise(build_network("resnet18", 5, {}))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


CHECKPOINTS = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet18"},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.3)},
    "net": lambda s: {"net": s, "acc": 93.1},
    "ema alone": lambda s: {"ema": s, "epoch": 3},
    "ema beside": lambda s: {"model_ema": {k: v + 1 for k, v in s.items()}, "state_dict": s},
    "two deep": lambda s: {"model": {"state_dict": s, "name": "r"}, "epoch": 1},
    "module.": lambda s: prefixed(s, "module."),
    "both": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "again": lambda s: prefixed(s, "module._orig_mod.module."),
    "model.": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2"},
    "net.module.": lambda s: prefixed(s, "net.module."),
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_others_are_understood(tmp_path: Path, kind: str) -> None:
    original = resnet().state_dict()
    torch.save(CHECKPOINTS[kind](original), tmp_path / "w.pth")
    network = build_network("resnet18", 5, {})
    assert not load_state(network, read_state(tmp_path / "w.pth"), "w.pth").replaced_head
    for key, value in network.state_dict().items():
        assert torch.equal(value, original[key]) or "num_batches" in key, key


def test_a_prefix_stays_when_not_all_keys_would_fit(tmp_path: Path) -> None:
    state = prefixed(resnet().state_dict(), "model.")
    state["model.teacher.weight"] = torch.zeros(3)
    with pytest.raises(DataError, match=r"they lack conv1\.weight.* also have model\.conv1"):
        load_state(build_network("resnet18", 5, {}), state, "w")
    state = prefixed(resnet().state_dict(), "module.")
    del state["module.conv1.weight"]
    with pytest.raises(DataError, match=r"they lack conv1\.weight$"):
        load_state(build_network("resnet18", 5, {}), state, "w")


def test_a_checkpoint_with_code_says_what_to_save_instead(tmp_path: Path) -> None:
    state = resnet().state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"argparse\.Namespace.*save model\.state_dict\(\) alone"):
        read_state(tmp_path / "w.pth")


def test_densenets_names_of_old_are_understood() -> None:
    network = torchvision.models.densenet121(num_classes=3)
    original = network.state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
           for key, value in original.items()}  # fmt: skip
    assert set(old) != set(original)
    loaded = build_network("densenet121", 3, {})
    load_state(loaded, prefixed(old, "module."), "w")
    assert all(torch.equal(value, original[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "inception_v3"])
def test_a_classifier_of_other_classes_is_replaced_and_nothing_else(name: str) -> None:
    args = {"aux_logits": True, "init_weights": False} if name == "inception_v3" else {}
    state = build_network(name, 9, args).state_dict()
    torch.manual_seed(3)
    network = build_network(name, 4, args)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(DataError, match="they have 9 classes instead of 4"):
        load_state(network, state, "w")
    replaced_head, notes = load_state(network, state, "w", replace_head=True)
    assert replaced_head
    assert len(notes) == 1
    assert f"the classifier {find_head(network)[0]}, which starts from random weights" in notes[0]
    heads = {"resnet18": 2, "squeezenet1_1": 2, "inception_v3": 4}  # tensors
    own = network.state_dict()
    fresh = [key for key in own if own[key].shape != state[key].shape]
    assert len(fresh) == heads[name]
    assert all(torch.equal(own[key], before[key] if key in fresh else state[key]) for key in own)


def test_auxiliary_classifiers_are_left_out_where_the_network_has_none() -> None:
    state = build_network("googlenet", 4, {"aux_logits": True, "init_weights": False}).state_dict()
    notes = load_state(build_network("googlenet", 4, {"init_weights": False}), state, "w").notes
    assert len(notes) == 1
    assert "of auxiliary classifiers" in notes[0]


def test_another_width_is_no_other_classifier() -> None:
    state = build_network("mobilenet_v2", 9, {"width_mult": 0.5}).state_dict()
    with pytest.raises(DataError, match=r"is \(16, 3, 3, 3\), expected \(32.*with another width"):
        load_state(build_network("mobilenet_v2", 4, {}), state, "w", replace_head=True)


def test_a_weights_file_tells_its_own_number_of_classes(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count, args in (("resnet18", 6, {}), ("gammaslim_nets:plain", 5, {"width": 4})):
        file = nets / "w.pth"
        torch.save(
            {"state_dict": prefixed(build_network(name, count, args).state_dict(), "module.")}, file
        )
        options = ModelOptions(str(file), name, tuple(args.items()), image_size=32)
        network, card = open_model(options)
        assert card.num_classes == count
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, count)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="they have 5 classes instead of 7"):
        open_model(ModelOptions(str(file), name, tuple(args.items()), 7, image_size=32))


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("student", {}, 8, "8 is too small for StudentNet; 32 pixels fit"),
        ("inception_v3", {"init_weights": False}, 32, "too small for Inception3; 96 pixels fit"),
        ("vit_b_32", {}, 256, r"256 does not fit VisionTransformer \(.*\); 224 pixels fit"),
        ("student", {}, 5000, "at most 4096"),
    ],
)
@pytest.mark.sampled(2)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(
    name: str, args: dict[str, object], size: int, message: str
) -> None:
    network = build_network(name, 3, args)
    with pytest.raises(UsageError, match=message):
        check_size(network, size)


def test_the_size_check_changes_nothing() -> None:
    network = build_network("resnet18", 3, {}).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    check_size(network, 32)
    assert network.training
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())


def test_a_network_that_cannot_be_run_is_no_usage_error() -> None:
    network = build_network("student", 3, {"base": 2})
    state = network.state_dict()
    network.get_submodule("cnn.4")[3] = nn.Conv2d(32, 7, 1)  # as cuts that do not fit leave it
    with pytest.raises(DataError, match=r"cnn\.4\.3\.weight is .*, expected \(7, 32, 1, 1\)"):
        load_state(network, state, "w")
