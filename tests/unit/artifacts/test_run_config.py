"""config.toml of a run, read by the check of a resumed run, the report and the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from job.artifacts.compatibility import check_same_run
from job.artifacts.provenance import stored_listing
from job.artifacts.run_config import stored_rounds
from job.artifacts.run_reader import read_run
from job.config import PruneConfig
from job.data.folders import CURRENT_LISTING
from job.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_without_tables_is_damaged_for_every_reader(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("prune = 3\n")
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read: prune is not a table"):
        check_same_run(tmp_path, PruneConfig(), None, None, 0)
    assert stored_rounds(tmp_path) is None
    assert stored_listing(tmp_path) == CURRENT_LISTING
    history = read_run(tmp_path)
    assert history.settings == {}
    assert [problem.rpartition(": ")[2] for problem in history.problems] == ["prune is not a table"]
