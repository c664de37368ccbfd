"""The forecast of the cache of decoded images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.data.cache import place
from job.pipeline.image_cache import forecast_cache


@pytest.mark.parametrize(
    ("memory", "printed"),
    [
        (1 << 40, "cache: decoded images take 1 MB; they are stored in memory\n"),
        (0, "cache: none, images are decoded in every epoch: the decoded images take 1 MB: --c"),
    ],
)
def test_it_says_where_they_are_stored_or_why_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    memory: int, printed: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(place, "available_memory", lambda: memory)
    for name in place.SCRATCH:
        monkeypatch.delenv(name, raising=False)
    images: Any = SimpleNamespace(layout=SimpleNamespace(length=1 << 20))
    images.with_key = lambda: SimpleNamespace(key="none")
    setup: Any = SimpleNamespace(
        cache=SimpleNamespace(images=images), folder=tmp_path / "run",
        config=SimpleNamespace(cache="auto", cache_dir=None),
    )  # fmt: skip
    forecast_cache(setup)
    assert printed in capsys.readouterr().out
