"""A stand-in for the package mlflow: what Accelerate's tracker calls, kept in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

CONTENT = """
import json
import types
from pathlib import Path

STORE = Path({store!r})
utils = types.SimpleNamespace(
    validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
)


def _change(key, update):
    content = json.loads(STORE.read_text())
    content[key] = update(content[key])
    STORE.write_text(json.dumps(content))


def set_tracking_uri(uri):
    _change("uri", lambda _: uri)


def search_experiments(filter_string):
    return []


def create_experiment(name, artifact_location=None, tags=None):
    return name


def start_run(run_id=None, **_):
    if run_id is None:
        _change("runs", lambda count: count + 1)
        run_id = f"run-{{json.loads(STORE.read_text())['runs']}}"
    _change("state", lambda _: "RUNNING")
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))


def end_run(status="FINISHED"):
    _change("state", lambda _: status)


def log_params(params):
    _change("params", lambda known: {{**known, **params}})


def log_metrics(metrics, step=None):
    for key, value in metrics.items():
        _change("metrics", lambda all_: {{**all_, key: [*all_.get(key, []), [step, value]]}})


class MlflowClient:
    def get_metric_history(self, run_id, key):
        points = json.loads(STORE.read_text())["metrics"].get(key, [])
        return [types.SimpleNamespace(step=step, value=value) for step, value in points]
"""


def write_stand_in(folder: Path) -> Path:
    """Write the package into ``folder``; return the file that holds what it receives."""
    store = folder / "received.json"
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "__init__.py").write_text(CONTENT.format(store=str(store)))
    empty = {"uri": None, "runs": 0, "state": None, "params": {}, "metrics": {}}
    store.write_text(json.dumps(empty))
    return store
