"""The rows of peer.py as Markdown: a line for each network, and counts."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

OURS, PEERS = "gammaslim", ("torch-pruning", "torch-kirigami")
STATUSES = {
    "cut": "a cut that runs",
    "wrong": "a wrong cut",
    "broken": "a cut that does not run",
    "unproven": "a cut that its proof rejects",
    "refused": "refused with a reason",
    "crash": "another error",
    "timeout": "out of time",
    "memory": "out of memory",
}
CLOSE = 0.01  # shares that differ by less are equal: groups are rounded in different ways

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]


def read_rows(path: Path) -> Rows:
    """Read the rows by network and tool; the last one of each."""
    lines = path.read_text("utf-8").splitlines()
    rows = map(json.loads, filter(None, lines))
    return {(row["network"], row["tool"]): row for row in rows}


def share(row: Row | None, metric: str = "params_left") -> float | None:
    """What a tool leaves of a network: all of it if it refuses; None if its cut cannot be used."""
    if row is None or row["status"] not in ("cut", "refused"):
        return None
    return float(row.get(metric, 1.0))


def counts(rows: Rows, listed: int) -> str:
    """The counts of both tables: what failed, how far the tools reach, and how fast they are."""
    networks = list(dict.fromkeys(network for network, _ in rows))
    text = [f"{len(networks)} of {listed} networks.\n", _failures(rows)]
    for peer in PEERS:
        both = [n for n in networks if (n, OURS) in rows and (n, peer) in rows]
        public = [n for n in both if not n.startswith("tests/")]
        for words, some in (("all networks", both), ("public networks", public)):
            if some:
                text += [_reach(rows, some, peer, words), *_speed(rows, some, peer)]
    text.append(_conditions(rows.values()))
    return "\n".join(text)


def _failures(rows: Rows) -> str:
    tools = [tool for tool in (OURS, *PEERS) if any(of == tool for _, of in rows)]
    found = {t: Counter(row["status"] for (_, of), row in rows.items() if of == t) for t in tools}
    lines = ["| | " + " | ".join(tools) + " |", "|---" * (len(tools) + 1) + "|"]
    for status, words in STATUSES.items():
        if any(found[tool][status] for tool in tools):
            cells = " | ".join(str(found[tool][status]) for tool in tools)
            lines.append(f"| {words} | {cells} |")
    lines.append("| networks | " + " | ".join(str(found[t].total()) for t in tools) + " |\n")
    return "\n".join(lines)


def _reach(rows: Rows, networks: list[str], peer: str, which: str) -> str:
    parts = []
    for metric, words in (("params_left", "parameters"), ("macs_left", "multiply-adds")):
        reached = 0
        for network in networks:
            mine, other = share(rows[network, OURS], metric), share(rows[network, peer], metric)
            reached += other is None or (mine is not None and mine <= other + CLOSE)
        parts.append(f"{reached} of {len(networks)} in {words}")
    return (
        f"- {which}: at least as small as {peer} (its failures count for us): {', '.join(parts)}."
    )


def _speed(rows: Rows, networks: list[str], peer: str) -> list[str]:
    pairs = [(rows[n, OURS], rows[n, peer]) for n in networks]
    pairs = [pair for pair in pairs if all("seconds" in row for row in pair)]
    if not pairs:
        return []
    proven = [other["seconds"] / mine["seconds"] for mine, other in pairs]
    bare = [
        other["seconds"] / max(1e-3, mine["seconds"] - mine.get("proof_seconds", 0.0))
        for mine, other in pairs
    ]
    return [
        f"- CPU seconds of {peer} over ours, {len(pairs)} networks that both cut: median "
        f"{statistics.median(bare):.1f} ({sum(r > 1 for r in bare)} above 1); with our proof "
        f"{statistics.median(proven):.1f} ({sum(r > 1 for r in proven)} above 1)."
    ]


def _conditions(rows: Iterable[Row]) -> str:
    """Versions, machine, dates and commits of the rows."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in row.get("conditions", {}).items():
            if key != "load":
                values.setdefault(key, {})[str(value)] = None
    return "- " + "; ".join(f"{key} {', '.join(found)}" for key, found in values.items()) + "."


def markdown(rows: Rows, order: Iterable[str]) -> str:
    """A line for each network: what is left of it and CPU seconds, by tool."""
    tools = (OURS, *PEERS)
    head = ["network", "M params", *(f"{t}: params, MACs, s" for t in tools), "error", "proof"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for network in order:
        found = {tool: rows[network, tool] for tool in tools if (network, tool) in rows}
        if found:
            params = max(row.get("params", 0) for row in found.values())
            cells = [_cell(found.get(tool)) for tool in tools]
            mine = found.get(OURS, {})
            errors = [_error(mine.get(key)) for key in ("error", "proof_error")]
            lines.append(
                "| " + " | ".join([network, f"{params / 1e6:.2f}", *cells, *errors]) + " |"
            )
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "cut":
        return str(row["status"])
    return f"{row['params_left']:.2f}, {row['macs_left']:.2f}, {row['seconds']:.2f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
