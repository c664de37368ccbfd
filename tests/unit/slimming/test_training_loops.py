"""The recipes of training_loops.md run as they are written.

Lightning's and Hugging Face's run where these packages are installed; Ultralytics' runs with a
stand-in for its trainer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
import job.gammaslim
from support.commands import ROOT
from support.cuts import randomise
from support.networks import Residual

PAGE = (ROOT / "job" / "slimming" / "training_loops.md").read_text("utf-8")
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
SIZE = 16


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gammaslim`` as it is installed; in the source it is ``job.gammaslim``."""
    monkeypatch.setitem(sys.modules, "gammaslim", job.gammaslim)


def images_and_labels(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, SIZE, SIZE, generator=generator), torch.arange(count) % 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual()).train()


def run(recipe: str, **names: Any) -> dict[str, Any]:
    names = {"torch": torch, "F": F, "epochs": 3, **names}
    names.setdefault("loader", [images_and_labels()] * 2)
    exec(compile(RECIPES[recipe], f"training_loops.md: {recipe}", "exec"), names)
    return names


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_plain_loop_and_what_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plain", network=network(), epochs=4)
    trained, optimizer = done["network"], done["optimizer"]
    assert count(trained) < count(network())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in trained.parameters()
    }
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps <= {8.0, 4.0, 2.0}  # the biases that a cut adds begin at 0
    assert 8.0 in steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    resumed = run("resume", Network=network)["network"].eval()
    images, _ = images_and_labels()
    assert torch.equal(resumed(images), trained.eval()(images))


def test_lightning() -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"accelerator": "cpu", "enable_model_summary": False, **quiet}
    data = torch.utils.data.TensorDataset(*images_and_labels())
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    example = torch.rand(1, 3, SIZE, SIZE)
    done = run("lightning", module=module, example=example, options=options, loader=loader)
    (optimizer,) = done["trainer"].optimizers
    check(optimizer, module.network, steps=6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def check(optimizer: torch.optim.Optimizer, trained: nn.Module, steps: int) -> None:
    """The network became smaller, and the steps of before and after the cut are in its state."""
    assert count(trained) < count(network())
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trained.parameters()}
    assert {float(state["step"]) for state in optimizer.state.values()} == {steps}


def test_timm() -> None:
    done = run("timm", network=network())
    check(done["optimizer"], done["network"], steps=6)
    assert count(done["ema"].module) == count(done["network"])
    assert done["optimizer"].param_groups[0]["lr"] < 1e-3


class Head(nn.Module):
    """A network that returns predictions and a list of raw maps in eval mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network().get_submodule("stem")
        self.down, self.out = nn.Conv2d(12, 8, 3, 2, 1), nn.ModuleList()
        self.out.extend([nn.Conv2d(12, 6, 1), nn.Conv2d(8, 6, 1)])

    def forward(self, images: torch.Tensor) -> Any:
        fine = self.body(images)
        maps = [layer(x) for layer, x in zip(self.out, (fine, self.down(fine)), strict=True)]
        if self.training:
            return maps
        return torch.cat([m.flatten(2) for m in maps], 2).sigmoid(), maps


class StandIn:
    """What the recipe uses of the trainer of Ultralytics."""

    def __init__(self, _: str) -> None:
        self.model: nn.Module = Head().train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda e: 0.9**e)
        self.ema = SimpleNamespace(ema=Head().eval())
        self.args, self.callbacks = SimpleNamespace(imgsz=SIZE), {}

    def add_callback(self, event: str, callback: Any) -> None:
        self.callbacks[event] = callback

    def train(self, epochs: int, **_: Any) -> None:
        images, _labels = images_and_labels()
        for self.epoch in range(epochs):
            self.callbacks["on_train_epoch_start"](self)
            self.optimizer.zero_grad()
            sum(m.square().mean() for m in self.model(images)).backward()  # type: ignore[union-attr]
            self.optimizer.step()
            self.scheduler.step()


def test_ultralytics_with_a_stand_in_for_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("ultralytics")
    package.YOLO = StandIn
    monkeypatch.setitem(sys.modules, "ultralytics", package)
    trainer = run("ultralytics")["model"]
    assert count(trainer.model) < count(Head())
    shapes = [p.shape for p in trainer.model.parameters()]
    assert [p.shape for p in trainer.ema.ema.parameters()] == shapes
    assert [s["momentum_buffer"].shape for s in trainer.optimizer.state.values()] == shapes
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**30)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CallbackOnly:
    """Trainer where transformers is not installed: it calls back with Accelerate's optimizer."""

    def __init__(self, model: Any, args: Any, train_dataset: Any, callbacks: list[Any]) -> None:
        from accelerate import Accelerator

        self.model, self.callbacks, self.data = model, callbacks, train_dataset
        adam = torch.optim.AdamW(model.parameters(), 1e-3)
        self.optimizer = Accelerator(cpu=True).prepare(adam)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda e: 0.9**e)

    def train(self) -> None:
        from torch.utils.data import default_collate

        batch = default_collate(self.data)
        for epoch in range(3):
            for callback in self.callbacks:
                callback.on_epoch_begin(
                    None, SimpleNamespace(epoch=float(epoch)), None, model=self.model,
                    optimizer=self.optimizer, lr_scheduler=self.lr_scheduler, tokenizer=None,
                )  # fmt: skip
            self.model(**batch)["loss"].backward()
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import transformers

        args = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
    except ImportError:
        package: Any = ModuleType("transformers")
        package.Trainer, package.TrainerCallback, args = CallbackOnly, object, None
        monkeypatch.setitem(sys.modules, "transformers", package)
    model = Classifier()
    images, labels = images_and_labels()
    dataset = [{"images": i, "labels": n} for i, n in zip(images, labels, strict=True)]
    example = torch.rand(1, 3, SIZE, SIZE)
    trainer = run("transformers", model=model, args=args, dataset=dataset, example=example)[
        "trainer"
    ]
    check(trainer.optimizer.optimizer, model.network, steps=3)
    assert trainer.lr_scheduler.optimizer is trainer.optimizer.optimizer


def test_every_recipe_is_tested() -> None:
    tested = set(re.findall(r'run\(\s*"(\w+)"', Path(__file__).read_text("utf-8")))
    assert set(RECIPES) == tested
