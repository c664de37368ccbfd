"""What stops a step is found before the first one; BatchNorms of every kind train."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from job.config import PruneConfig
from job.data.layout import open_data
from job.data.preprocessing import Preprocessing
from job.data.samplers import GlobalBatches
from job.distributed.collectives import start
from job.errors import DataError, UsageError
from job.models.factory import build_network
from job.models.input_size import check_size
from job.models.outputs import all_logits, logits_of
from job.pipeline.prune import prune
from job.slimming.calibration.memory_format import runs_channels_last
from job.training.distillation import distillation
from job.training.evaluation import Evaluator
from job.training.session import RoundSpec
from job.training.trainer import Trainer
from job.training.trial import least_batch
from support.datasets import write_noise_idx
from support.networks import Norms

NETWORKS = """
from typing import NamedTuple
import torch
from torch import nn

class Pooled(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        body = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.body = nn.Sequential(*body)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last(self.head(self.body(x).mean((2, 3))))

class Plain(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last(self.c(self.b(self.a(x))).mean((2, 3)))

class Viewed(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4 * 15 * 15, num_classes)

    def forward(self, x):
        return self.last(self.body(x).view(len(x), -1))

class Outputs(NamedTuple):
    early: torch.Tensor
    logits: torch.Tensor

class Auxiliary(Pooled):
    def __init__(self, num_classes=4):
        super().__init__(num_classes)
        self.early = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        logits = self.last(self.head(x))
        return Outputs(self.early(x), logits) if self.training else logits
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    return __import__("nets")


def trainer(folder: Path, **options: Any) -> Trainer:
    data = open_data(str(write_noise_idx(folder / "idx", 33, 8)))
    size, accelerator = Preprocessing.of("small", 32), start("cpu", "fp32")
    config = PruneConfig(device="cpu", batch_size=16, **options)
    evaluator = Evaluator(data.splits["validation"], 4, size, accelerator, 0)
    return Trainer(data.splits["training"], evaluator, config, size, accelerator, 0, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_batchnorms_of_every_kind_train_alone_as_torch_trains_them(
    tmp_path: Path, compiled: bool
) -> None:
    training = trainer(tmp_path, optimizer="sgd", lr=0.01)
    torch.manual_seed(0)
    network = Norms()
    plain = copy.deepcopy(network).double().train()
    ours = torch.compile(network, backend="eager") if compiled else network
    training.fit(ours, RoundSpec(0, 1))
    training.sampler.set_epoch(0, 0)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, nesterov=True)
    for images, labels in training.batches:
        optimizer.zero_grad()
        inputs = training.preprocessing.to_input(images).double()
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
    assert [len(labels) for _, labels in training.batches] == [16, 17]
    for (name, mine), theirs in zip(
        network.named_buffers(), dict(plain.named_buffers()).values(), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["Viewed", "Pooled"])
def test_channels_come_last_only_where_the_network_runs(
    tmp_path: Path, nets: Any, kind: str
) -> None:
    """A view of a feature map needs channels first: in training, evaluation, and the teacher."""
    training, network = trainer(tmp_path, lr=0.01), getattr(nets, kind)()
    images, others = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 32, 32)
    state, drawn = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    for mode in (False, True):
        last = runs_channels_last(network, images, training=mode)
        assert last == (kind == "Pooled")
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert runs_channels_last(network, others)  # it runs with neither
    teacher = distillation(network, 0.5, 2.0, training.accelerator)
    first = []
    network.body[0].register_forward_hook(lambda *given: first.append(given[1][0].is_contiguous()))
    best = training.fit(network, RoundSpec(0, 1, distillation=teacher))
    assert 0 <= best.valid_acc <= 1
    assert (sum(first) > len(first) / 2) == (kind == "Viewed")


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [(33, 32, [33]), (33, 16, [16, 17]), (34, 16, [16, 16, 2]), (32, 16, [16, 16]), (1, 4, [1])],
)
def test_a_last_batch_of_one_joins_the_one_before(count: int, batch: int, sizes: list[int]) -> None:
    sampler = GlobalBatches(count, batch, seed=0, rank=0, world=1, least=2)
    assert sampler.sizes() == sizes
    sampler.set_epoch(0, 0)
    assert [len(rows) for rows in sampler] == sizes
    assert len(sampler) == len(sizes)
    seen = [draw.index for rows in sampler for draw in rows]
    assert sorted(seen) == list(range(count))
    sampler.set_epoch(0, 0, len(sizes) - 1)  # resumed before the last batch
    assert [draw.index for rows in sampler for draw in rows] == seen[-sizes[-1] :]


def test_only_a_batchnorm_of_one_value_needs_two_images(nets: Any) -> None:
    pooled, wide = nets.Pooled(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = copy.deepcopy(pooled.state_dict())
    drawn = torch.get_rng_state()
    assert least_batch(pooled, PruneConfig(batch_size=32), 32, 33) == 2
    assert least_batch(pooled, PruneConfig(batch_size=32), 32, 34) == 1
    assert least_batch(wide, PruneConfig(batch_size=1), 32, 33) == 1
    with pytest.raises(UsageError, match=r"--batch-size 1 is too small: BatchNorm 'head.1'"):
        least_batch(pooled, PruneConfig(batch_size=1), 32, 33)
    with pytest.raises(DataError, match="too few training images, 1:"):
        least_batch(pooled, PruneConfig(batch_size=4), 32, 1)
    assert all(torch.equal(value, state[key]) for key, value in pooled.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_logits_are_found_among_several_outputs() -> None:
    logits, other, map_ = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 4, 8, 8)
    assert logits_of(logits) is logits
    for output in ((logits, other), [logits, map_], {"aux": other, "out": logits}):
        assert logits_of(output) is logits
    assert [o is other for o in all_logits({"aux": other, "logits": logits})] == [False, True]
    for wrong in (map_, None, [], {"loss": torch.zeros(())}):
        with pytest.raises(DataError, match="the network returns"):
            logits_of(wrong)


def dry(tmp_path: Path, model: str, **options: Any) -> None:
    data = tmp_path / "idx"
    if not data.exists():
        write_noise_idx(data, 33, 8)
    settings = {"rounds": 2, "wandb": "off", "importance": "refit", "compensate": "regress"}
    prune(
        PruneConfig(
            data=str(data), output=str(tmp_path / "run"), model=f"nets:{model}", transform="small",
            device="cpu", workers=0, **(settings | {"dry_run": True} | options),
        )
    )  # fmt: skip
    assert (tmp_path / "run").exists() != options.get("dry_run", True)


def test_the_dry_run_tries_a_step_the_cuts_and_an_evaluation(
    nets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry(tmp_path, "Auxiliary")
    said = capsys.readouterr().out
    assert "tried: an evaluation batch, a training step, the cuts of 2 rounds" in said
    assert "auxiliary classifiers: 1, their losses count 0.3 times" in said
    assert "the batch before the last also takes 1 image of the last: BatchNorm 'head.1'" in said
    with pytest.raises(UsageError, match="--batch-size 1 is too small"):
        dry(tmp_path, "Pooled", batch_size=1)


def test_auxiliary_classifiers_of_a_public_network_learn() -> None:
    network = build_network("googlenet", 3, {"aux_logits": True, "init_weights": False})
    check_size(network, 64)
    assert len(all_logits(network.train()(torch.rand(2, 3, 64, 64)))) == 3


def test_the_dry_run_fails_as_a_step_does(
    nets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise DataError("no step")

    for part, options in (
        ("job.pipeline.dry_run.cut", {}),
        ("job.training.loss.F.cross_entropy", {}),
        ("job.training.distillation.distillation_loss", {"distill_alpha": 0.5}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, broken)
            with pytest.raises(DataError, match="no step"):
                dry(tmp_path, "Pooled", **options)


def test_a_job_with_batchnorms_without_gamma_momentum_and_statistics(
    nets: Any, tmp_path: Path
) -> None:
    dry(
        tmp_path, "Plain", dry_run=False, rounds=1, base_epochs=1, epochs=1, sparsity="l1",
        sparsity_epochs=1, policy="global", target="channels=0.8", importance="gamma",
        compensate="none",
    )  # fmt: skip
    assert (tmp_path / "run" / "rounds" / "01" / "model.safetensors").exists()
