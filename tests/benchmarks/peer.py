"""Half of every channel group of many networks: Gammaslim, Torch-Pruning and torch-kirigami.

    python tests/benchmarks/peer.py run --output peers.jsonl
    python tests/benchmarks/peer.py run --output peers.jsonl --networks 'timm/resnet*' --again
    python tests/benchmarks/peer.py table peers.jsonl [--head]

``run`` cuts each network of peer_networks.txt with each tool, in a process of its own with limits
of time and memory, and appends a row to a JSON lines file: the shares of the parameters and of the
multiply-adds that are left, CPU seconds (the median of several cuts, each of a new network; those
of the first one are ``first_seconds``), and what failed. It continues where it stopped. A cut of
ours is compared with the wide network in which the removed channels are zero, in float64 and
without the verification of the project; a cut of another tool is only run. ``table`` prints the
table and the counts. Needs ``pip install timm torch-pruning torch-kirigami``, and for the networks
of these libraries pytorchcv, segmentation-models-pytorch, transformers, and ultralytics.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from conditions import conditions
from peer_check import TOLERANCE
from peer_networks import Case, Listed, build, listed
from peer_table import counts, markdown, read_rows
from peer_tools import TOOLS, UNPROVEN, Cut, RefusedError

from job.slimming.inputs import tensors_in

CUTS = 4  # by a tool of a network
MAX_REPEATED = 5.0  # seconds of a cut that is repeated

Row = dict[str, Any]


def measure(entry: Listed, tool: str) -> Row:
    """Cut a network by a tool: the row of both."""
    case = build(entry)
    shapes, macs, params = _run(case, case.network)
    row: Row = {"params": params, "macs": macs}
    try:
        cut = TOOLS[tool](case)
    except RefusedError as error:
        return row | {"status": "refused", "message": str(error)[:500]}
    except UNPROVEN as error:
        return row | {"status": "unproven", "message": str(error)[:500]}
    except MemoryError:
        return row | {"status": "memory"}
    except Exception as error:  # tools and networks may raise anything
        status = "memory" if "allocate memory" in str(error) else "crash"
        return row | {"status": status, "message": f"{type(error).__name__}: {error}"[:500]}
    row |= {**cut.more, "first_seconds": round(cut.seconds, 3), **_medians(entry, tool, cut)}
    try:
        cut_shapes, macs_left, params_left = _run(case, cut.network)
    except Exception as error:
        return row | {"status": "broken", "message": f"{type(error).__name__}: {error}"[:500]}
    row |= {"params_left": params_left / params, "macs_left": macs_left / macs if macs else 1.0}
    if cut_shapes != shapes:
        message = f"outputs {cut_shapes[:3]} in place of {shapes[:3]}"
        return row | {"status": "broken", "message": message}
    return row | {"status": "wrong" if cut.more.get("error", 0.0) > TOLERANCE else "cut"}


def _medians(entry: Listed, tool: str, first: Cut) -> Row:
    """Repeat a cut unless it is slow, and return the median seconds, also of the proof."""
    times = [_times(first)]
    while len(times) < CUTS and first.seconds < MAX_REPEATED:
        times.append(_times(TOOLS[tool](build(entry))))
    return {name: round(statistics.median(t[name] for t in times), 3) for name in times[0]}


def _times(cut: Cut) -> dict[str, float]:
    times = {"seconds": cut.seconds, **cut.more}
    return {name: times[name] for name in ("seconds", "proof_seconds") if name in times}


def _run(case: Case, network: nn.Module) -> tuple[list[tuple[int, ...]], int, int]:
    """Return the shapes of the outputs, multiply-adds by torch's own counter, and parameters."""
    with torch.no_grad(), _Flops() as counter:
        shapes = [tuple(t.shape) for t in tensors_in(case.run(network, case.example))]
    return shapes, counter.total // 2, sum(p.numel() for p in network.parameters())


class _Flops(TorchDispatchMode):
    """Add up the operations that torch's own table of formulas gives for each op."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def limited(entry: Listed, tool: str, seconds: int, gigabytes: float) -> Row:
    """Measure in a process with limits of CPU time and memory."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    began, row = time.monotonic(), None
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(theirs, entry, tool, seconds, gigabytes), daemon=True
    )
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):  # it was killed
        if ours.poll(4 * seconds):  # a process that sleeps uses no CPU time
            row = ours.recv()
    process.kill()
    process.join()
    if row is None:
        killed = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row = {"status": "timeout" if killed else "crash"}
        row["message"] = f"ended with {process.exitcode} after {time.monotonic() - began:.0f} s"
    return {"network": entry.name, "tool": tool, "limit": seconds, **row}


def _child(
    connection: Connection, entry: Listed, tool: str, seconds: int, gigabytes: float
) -> None:
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        row = measure(entry, tool)
    except Exception as error:  # of the network itself, e.g. one that this version does not build
        row = {"status": "crash", "message": f"{type(error).__name__}: {error}"[:500]}
    connection.send(row)


def warm_up(tools: Sequence[str]) -> None:
    """Load what each tool loads at its first cut, before the processes are forked."""
    for tool in tools:
        TOOLS[tool](build(Listed("tests/Residual", 32, 32)))


def run(args: argparse.Namespace) -> None:
    """Append a row for each network and tool that has none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    done = {} if args.again or not args.output.exists() else read_rows(args.output)
    warm_up(args.tools)
    where = conditions() | {"commit": _commit()}
    with args.output.open("a", encoding="utf-8") as file:
        for entry in listed():
            if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in args.networks):
                continue
            for tool in args.tools:
                if (entry.name, tool) in done:
                    continue
                row = limited(entry.at_least(args.size), tool, args.limit, args.memory)
                file.write(json.dumps({**row, "conditions": where}) + "\n")
                file.flush()
                print(entry.name, tool, row["status"], row.get("params_left", ""), flush=True)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(args: argparse.Namespace) -> None:
    rows = read_rows(args.rows)
    print(counts(rows, len(listed())))
    if not args.head:
        print("\n" + markdown(rows, [entry.name for entry in listed()]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    cut = commands.add_parser("run", help="cut the networks and append rows")
    cut.add_argument("--output", type=Path, required=True, help="JSON lines file")
    cut.add_argument("--networks", nargs="+", default=["*"], help="patterns of names")
    cut.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    cut.add_argument("--limit", type=int, default=120, help="CPU seconds for a network and tool")
    cut.add_argument("--memory", type=float, default=8, help="GiB for a network and tool")
    cut.add_argument("--size", type=int, default=1, help="pixels of an image side, at the least")
    cut.add_argument("--again", action="store_true", help="also those that have a row")
    cut.set_defaults(command=run)
    printed = commands.add_parser("table", help="print the table as Markdown")
    printed.add_argument("rows", type=Path, help="JSON lines file")
    printed.add_argument("--head", action="store_true", help="only the counts")
    printed.set_defaults(command=table)
    args = parser.parse_args(arguments)
    args.command(args)


if __name__ == "__main__":
    main()
