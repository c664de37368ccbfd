"""Slim networks of any kind load in a new process from model.json and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import job
from job.artifacts.model_card import ModelCard, save_model
from job.data.preprocessing import Preprocessing
from job.models.factory import build_network
from job.slimming.planning.layer_channels import LayerChannels
from support.commands import ROOT, clean_environ, gammaslim, run
from support.cuts import randomise

PLAIN = """
from torch import nn

def plain(width=8):  # ignores --num-classes
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
"""


def test_a_slim_model_of_a_factory_loads_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gammaslim_nets.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gammaslim_nets", raising=False)
    wide = ModelCard(
        "gammaslim_nets:plain", {"width": 8}, 3, preprocessing=Preprocessing.of("small", 32)
    )
    kept = (0, 3, 4)
    layers = {
        "0": LayerChannels(out=kept), "1": LayerChannels(out=kept, in_=kept),
        "5": LayerChannels(in_=kept),
    }  # fmt: skip
    card = wide.cut({key: layers[key] for key in ("0", "1")}, 0.5)
    network = wide.build()  # cut by hand: the engine is tested elsewhere
    network[0] = nn.Conv2d(3, 3, 3)  # type: ignore[operator]
    network[1] = nn.BatchNorm2d(3)  # type: ignore[operator]
    save_model(tmp_path / "model", network, card)
    env = clean_environ() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.startswith("3 3\n"), done.stderr
    assert "there is no module gammaslim_nets" in done.stdout


RELOAD = """
import importlib, os, sys
import job
network = job.load("model")
print(network[0].out_channels, network[5].out_features)
os.unlink("gammaslim_nets.py")
del sys.modules["gammaslim_nets"]
importlib.invalidate_caches()
try:
    job.load("model")
except Exception as error:
    print(error)
"""


FACTORY = """
import torch
from torch import nn
import torchvision

def tiny(num_classes, width=16):
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1],
                                     num_classes=num_classes)
"""


LOAD = """
import sys, torch, job
from safetensors.torch import save_file
network = job.load(sys.argv[1])
assert not network.training
save_file({"logits": network(torch.load(sys.argv[2]))}, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("densenet40-cifar", "macs=0.4"), ("resnet164-cifar", "channels=0.5"),
        ("resnext50_32x4d", "params=0.3"), ("mobilenet_v3_small", "width=0.5"),
        ("nets:tiny", "bytes=0.5"),
    ],
)  # fmt: skip
@pytest.mark.sampled(3)
def test_a_slim_network_loads_in_a_new_process(name: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    torch.manual_seed(0)
    sys.path.insert(0, str(tmp_path))
    try:
        network = randomise(build_network(name, 6, {}))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("nets", None)
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    images = torch.rand(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    done = gammaslim(
        "slim", "base.safetensors", "--model", name, "--num-classes", 6, "--image-size", 32,
        "--output", "slim 1", "--target", target, "--min-keep", 0.05, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done
    again = gammaslim("slim", "slim 1", "--output", "slim 2", "--target", "channels=0.3",
                      "--min-keep", 0.05, cwd=tmp_path)  # fmt: skip
    assert again.code == 0, again
    for folder in ("slim 1", "slim 2"):
        loaded = run(sys.executable, "-c", LOAD, folder, "images.pt", "out.safetensors",
                     cwd=tmp_path)  # fmt: skip
        assert loaded.code == 0, loaded
        logits = load_file(tmp_path / "out.safetensors")["logits"]
        assert logits.shape == (2, 6)
        card = json.loads((tmp_path / folder / "model.json").read_text())
        kept = load_file(tmp_path / folder / "model.safetensors")
        assert sum(v.numel() for v in kept.values()) < sum(
            v.numel() for v in network.state_dict().values()
        )
        assert card["base"]["cost"]["params"] == sum(p.numel() for p in network.parameters())
    if name != "nets:tiny":
        narrow, _ = job.slim(
            network, images, target=target, min_keep=0.05,
            policy="uniform" if target.startswith("width") else "global",
        )  # fmt: skip
        again = job.load(tmp_path / "slim 1")
        torch.testing.assert_close(again(images), narrow(images), atol=0, rtol=0)
