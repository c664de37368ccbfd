"""Lookups: embeddings of the inputs, and values at computed indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import job
from job.slimming.surgery.surgery import apply_plan

WIDTH, WORDS = 24, torch.randint(4, 40, (2, 9))


class Text(nn.Module):
    """Embeddings of words and positions, a residual convolution, and a head."""

    def __init__(self, pick: Callable[..., torch.Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, WIDTH, **options), nn.Embedding(9, WIDTH)
        self.one, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)
        self.head, self.pick = nn.Linear(WIDTH, 3), pick
        self.register_buffer("numbers", torch.arange(9)[None])

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words) + self.places(self.numbers[:, : words.shape[1]])
        x = self.norm(x + self.one(x.mT).mT.relu())
        return self.head(x.mean(1) if self.pick is None else self.pick(x, words))


def halved(network: nn.Module, words: torch.Tensor = WORDS, **options: Any) -> Any:
    return job.slim(network.eval(), words, policy="uniform", target="width=0.5", **options)


def test_an_embedding_of_the_inputs_is_cut_with_the_channels_it_makes() -> None:
    torch.manual_seed(0)
    network = Text().double()
    narrow, plan = halved(network, importance="l2")
    half = WIDTH // 2
    assert narrow.words.weight.shape == (40, half)
    assert narrow.words.embedding_dim == narrow.places.embedding_dim == half
    assert narrow.places.weight.shape == (9, half)
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12
    kept = list(plan.layers["words.weight"].out)
    assert narrow.words.weight.equal(network.words.weight[:, kept])
    assert narrow.places.weight.equal(network.places.weight[:, kept])
    assert apply_plan(network, plan.layers)(WORDS).equal(narrow(WORDS))
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    narrow.train()(WORDS).sum().backward()


def test_the_channels_of_an_embedding_are_ranked_by_its_columns() -> None:
    network = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 3))
    with torch.no_grad():
        network[0].weight[:, :4] *= 100
    _, plan = halved(network, importance="l2")
    assert plan.layers["0.weight"].out == (0, 1, 2, 3)


def test_an_embedding_is_cut_by_calibration_inputs() -> None:
    torch.manual_seed(0)
    narrow, plan = job.slim(
        Text().eval(), WORDS, target="channels=0.6", calibration=[WORDS, WORDS + 0]
    )
    assert narrow.words.embedding_dim == len(plan.layers["words.weight"].out) < WIDTH
    assert "compensation regress" in str(plan)


def test_a_bag_of_embeddings_is_cut() -> None:
    network = nn.Sequential(nn.EmbeddingBag(40, 8, mode="sum"), nn.Linear(8, 3))
    narrow, plan = halved(network, importance="l2")
    assert (narrow[0].embedding_dim, narrow[0].weight.shape) == (4, (40, 4))
    assert plan.proof.error <= 1e-12


def test_rows_that_are_normalised_at_each_use_are_not_cut() -> None:
    with pytest.raises(job.UsageError, match="no channel"):
        halved(nn.Sequential(nn.Embedding(40, 8, max_norm=1.0), nn.Linear(8, 3)), importance="l2")


class Tied(nn.Module):
    """A decoder that scores the words of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 40, bias=False)
        self.hidden, self.back = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.last.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        return self.last(x + self.back(self.hidden(x).relu()))


def test_an_embedding_that_scores_the_words_too_is_cut_once() -> None:
    torch.manual_seed(0)
    network = Tied().double()
    narrow, plan = halved(network, importance="l2")
    assert narrow.words.weight is narrow.last.weight
    assert narrow.words.weight.shape == (40, WIDTH // 2)
    assert (narrow.words.embedding_dim, narrow.last.in_features) == (WIDTH // 2, WIDTH // 2)
    assert (narrow.hidden.out_features, narrow.last.out_features) == (16, 40)
    assert plan.proof.error <= 1e-12
    assert plan.after.params == sum(p.numel() for p in narrow.parameters())
    assert apply_plan(network, plan.layers)(WORDS).equal(narrow(WORDS))


def test_a_convolution_across_the_width_of_an_embedding_is_cut_in_its_outputs() -> None:
    """TextCNN (Kim 2014) convolves the map of words and widths, whose widths stay."""

    class TextCnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.one = nn.Embedding(40, WIDTH), nn.Conv2d(1, 16, (3, WIDTH))
            self.head = nn.Linear(16, 3)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            x = self.one(self.words(words)[:, None]).squeeze(3).relu()
            return self.head(x.max(2)[0])

    narrow, plan = halved(TextCnn(), importance="l2")
    assert (narrow.words.embedding_dim, narrow.one.out_channels) == (WIDTH, 8)
    assert plan.proof.error <= 1e-12
    reasons = {blocked.layer: blocked.reason for blocked in plan.blocked}
    assert reasons["words.weight"] == "conv2d of mixed channels"


PICKS: dict[str, Callable[..., torch.Tensor]] = {
    "argmax": lambda x, words: x[torch.arange(len(x)), words.argmax(-1)],
    "last": lambda x, words: x[torch.arange(len(x)), (words != 3).int().sum(-1) - 1],
    "gather": lambda x, words: x.gather(
        1, words.argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1])
    ).squeeze(1),
    "take_along_dim": lambda x, words: torch.take_along_dim(
        x, words.argmax(-1)[:, None, None], 1
    ).squeeze(1),
    "mask": lambda x, words: x[words > 3].mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", PICKS)
def test_values_at_computed_indices_keep_their_channels(name: str) -> None:
    torch.manual_seed(0)
    narrow, plan = halved(Text(PICKS[name]), importance="l2")
    assert narrow.head.in_features == WIDTH // 2
    assert {blocked.layer for blocked in plan.blocked} == {"head"}
    assert plan.proof.error <= 1e-12


@pytest.mark.parametrize(
    ("pick", "reason"),
    [
        (
            lambda x, words: x.gather(1, words[:, :1, None].clamp(max=8).repeat(1, 1, WIDTH))[:, 0],
            "gather works only for the current number of channels",
        ),
        (
            lambda x, words: x.mean(1).gather(
                1, words[:, :WIDTH].clamp(max=8).repeat(1, 3)[:, :WIDTH]
            ),
            "gather at places",
        ),
        (lambda x, words: x.mean(1)[:, words[0].clamp(max=8).repeat(3)[:WIDTH]], "__getitem__"),
    ],
)
def test_indices_of_channels_are_refused(pick: Any, reason: str) -> None:
    with pytest.raises(job.UsageError, match=reason):
        halved(Text(pick), importance="l2")


def test_a_prelu_of_one_slope_follows_channels_along_any_axis() -> None:
    network = nn.Sequential(nn.Linear(6, 16), nn.PReLU(), nn.Linear(16, 3))
    narrow, plan = halved(network, torch.rand(2, 5, 6), importance="l2")
    assert narrow[0].out_features == 8
    assert plan.proof.error <= 1e-12


def test_a_network_of_computed_weights_alone_is_told_the_line_that_frees_it() -> None:
    layers = [nn.utils.parametrizations.weight_norm(nn.Conv1d(*c, 3)) for c in ((2, 8), (8, 3))]
    network = nn.Sequential(*layers)
    with pytest.raises(job.UsageError, match=r"remove_parametrizations\(layer, 'weight'\)"):
        halved(network, torch.rand(2, 2, 16), importance="l2")
    for layer in layers:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    narrow, _ = halved(network, torch.rand(2, 2, 16), importance="l2")
    assert narrow[0].out_channels == 4


class Attention(nn.Module):
    """Attention whose result is viewed as wide as its input, or as wide as the heads are."""

    def __init__(self, as_input: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.out, self.heads, self.width = nn.Linear(24, 24), 3, 8
        self.as_input = as_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, channels = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = (F.softmax(q @ k.mT * 0.35, -1) @ v).transpose(1, 2)
        return self.out(y.reshape(batch, tokens, channels) if self.as_input else y.flatten(2))


class Constant(nn.Module):
    """A stream that a computed constant is added to, so that it is not cut."""

    def __init__(self, as_input: bool) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(6, 24), Attention(as_input)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        constant = torch.linspace(0, 1, x.shape[1] * 24, dtype=x.dtype).view(-1, 24)
        return self.head((x + self.attention(x) + constant).mean(1))


def test_heads_as_wide_as_a_fixed_stream_are_told_how_they_become_free() -> None:
    tokens = torch.rand(2, 7, 6)
    with pytest.raises(job.UsageError, match=r"heads that must stay as wide.*x\.flatten\(2\)"):
        halved(Constant(as_input=True), tokens, importance="l2")
    narrow, plan = halved(Constant(as_input=False), tokens, importance="l2")
    assert narrow.attention.query.out_features == 12
    assert plan.proof.error <= 1e-12
