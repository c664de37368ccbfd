"""torch's elastic agent, extended to forward stop requests and to keep exit codes."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from job.console import print_error
from job.distributed.signals import TOO_EARLY, answering, end_before_start
from job.errors import GammaslimError, StopRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from job.distributed.topology import Nodes

RENDEZVOUS_TIMEOUT = 900  # seconds within which all nodes must join
SHUTDOWN_TIMEOUT = 50  # seconds within which the processes must end
KILL_DELAY = 5.0  # seconds between a second SIGINT and SIGKILL


class Agent(LocalElasticAgent):
    """Starts and monitors the processes of one node, and forwards stop requests to them."""

    def __init__(self, spec: WorkerSpec) -> None:
        # the agent waits that long only after a SIGHUP or SIGQUIT, which we do not handle
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent.__init__).parameters:
            super().__init__(spec, DefaultLogsSpecs(), shutdown_timeout=SHUTDOWN_TIMEOUT)
        else:
            super().__init__(spec, DefaultLogsSpecs())
        self.pids: list[int] = []
        self.asked: list[int] = []  # signals received, in order
        self._starting = threading.Lock()

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        with self._starting:
            started: dict[int, Any] = super()._start_workers(worker_group)
            self.pids = list(started.values())
        return started

    def forward_signal(self, number: int) -> None:
        """Send a stop request to every process; exit immediately if none is started yet."""
        with self._starting:
            self.asked.append(number)
            if not self.pids:
                end_before_start()
            self._send(number)
        if self.asked.count(signal.SIGINT) > 1:
            time.sleep(KILL_DELAY)
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it has already ended
                continue


def run_agent(command: Sequence[str], nproc: int, nodes: Nodes) -> int:
    """Run ``command`` in ``nproc`` processes of this node; return their exit code.

    Raises GammaslimError when the nodes do not find each other.
    """
    logging.disable(logging.ERROR)  # the processes report their own errors
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    spec = WorkerSpec(
        role="gammaslim",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=rendezvous.get_rendezvous_handler(_rendezvous_parameters(nodes)),
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=nodes.address if nodes.count > 1 else None,
        master_port=nodes.port if nodes.count > 1 else None,
        local_addr="127.0.0.1" if nodes.count == 1 else None,
    )
    agent = Agent(spec)
    with answering(agent.forward_signal):
        try:
            result = agent.run()
        except SignalException as error:
            raise StopRequest(f"stopped by {error.sigval.name}") from None
        except (RuntimeError, OSError) as error:  # torch's rendezvous errors are RuntimeErrors
            raise GammaslimError(
                f"the {nodes.count} nodes did not find each other at {nodes.address}:{nodes.port}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if nodes.rank == 0 and nodes.count > 1 and result.is_failed():
        time.sleep(2)  # others still talk to the store that ends with this process
    return _exit_code(list(result.failures.values()), agent.asked) if result.is_failed() else 0


def _rendezvous_parameters(nodes: Nodes) -> RendezvousParameters:
    shared = partial(
        RendezvousParameters,
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        timeout=RENDEZVOUS_TIMEOUT,
    )
    if nodes.count == 1:
        # c10d finds a free port of this host
        address, run_id = "127.0.0.1:0", uuid.uuid4().hex
        return shared("c10d", address, run_id, local_addr="127.0.0.1", is_host=True)
    return shared("static", f"{nodes.address}:{nodes.port}", "gammaslim", rank=nodes.rank)


def _exit_code(failures: list[ProcessFailure], asked: list[int]) -> int:
    """Return the exit code of the first process that failed; report a killed one, with code 1."""
    stopped = {StopRequest.exit_code, -signal.SIGKILL, *(-number for number in asked)}
    if asked and all(failure.exitcode in stopped for failure in failures):
        if all(failure.exitcode < 0 for failure in failures):  # before they could report it
            print_error(TOO_EARLY)
        return StopRequest.exit_code

    def order(failure: ProcessFailure) -> tuple[int, int]:
        # the other processes end with 75 or by SIGTERM from the agent; a lost connection gives 1
        consequence = not asked and failure.exitcode in (StopRequest.exit_code, -signal.SIGTERM)
        return 2 if consequence else int(failure.exitcode == 1), failure.timestamp

    first = min(failures, key=order)
    if first.exitcode > 0:
        return int(first.exitcode)
    name = signal.Signals(-first.exitcode).name
    reason = " (out of memory, or manually)" if name == "SIGKILL" else ""
    print_error(
        f"process {first.local_rank} of this node was killed by {name}{reason}; "
        "run the same command to resume"
    )
    return 1
