"""Collective operations: joining a job, sums, and work on the main process with its errors."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from job.distributed.memory import keep_freed_memory
from job.distributed.signals import interruptible, starting
from job.errors import ConfigError, GammaslimError, StopRequest, StorageError, UsageError
from job.processes import is_main, world_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # longest wait for other processes in a collective
SILENCE = timedelta(minutes=5)  # longest wait for a heartbeat of a working main process
HEARTBEATS = 30  # heartbeats within SILENCE
_WORKING, _DONE = range(2)
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start(device: str, precision: str) -> Accelerator:
    """Join the other processes, if any; raises GammaslimError when they cannot be reached."""
    _check_variables()
    cpu = device == "cpu" or not torch.cuda.is_available()
    if device == "cuda" and cpu:
        raise UsageError("--device cuda: torch finds no CUDA GPU here")
    if cpu and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if cpu:
        # without it, Accelerate gives each process that torchrun starts on a CPU a world of one
        os.environ["ACCELERATE_USE_CPU"] = "true"
        keep_freed_memory()
    # torch 2.14 renames the argument; Accelerate still uses the old name
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    with starting():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_mixed_precision(precision, cpu),
            kwargs_handlers=[
                # BatchNorm statistics are the same on every rank, or averaged by the trainer
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=TIMEOUT),
            ],
        )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise GammaslimError(
            f"{expected} processes were started but they form a world of "
            f"{accelerator.num_processes}: check the launcher's --num_processes"
        )
    if dist.is_initialized() and dist.get_backend() != "gloo":
        _Gloo.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return accelerator


class _Gloo:
    group: Any = None  # None: the default group uses gloo


def gloo_group() -> Any:
    """Return the gloo group of all processes, for CPU tensors and objects."""
    return _Gloo.group


def _check_variables() -> None:
    """Raise ConfigError when a launcher's environment variable is not a whole number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"the environment variable {name} is {value!r}, not a whole number")


def _mixed_precision(precision: str, cpu: bool) -> str:
    if precision != "auto":
        return _MIXED[precision]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("bf16", "fp16"):
        return launched
    if cpu:
        return "no"
    # older GPUs emulate bf16, slowly
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def leave() -> None:
    """Kill the loader's workers and leave the process group.

    Workers ignore SIGTERM, and an exit that waits for them would wait forever. A gloo group is not
    destroyed: that waits forever for a collective that another process has not joined.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each killed worker
    for child in multiprocessing.active_children():
        child.kill()
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def lost_others(error: RuntimeError) -> bool:
    """Return whether ``error`` means that another process, which reports the cause, has ended."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def accelerator_name(accelerator: Accelerator) -> str:
    """Describe the processes, the device and the precision: ``2 processes, cuda, bf16``."""
    count = f"{world_size()} processes" if world_size() > 1 else "1 process"
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{count}, {accelerator.device.type}, {precision}"


def on_main(work: Callable[[], T], *, interrupt: bool = False) -> T:
    """Run ``work`` on the main process and give every process its result.

    With ``interrupt`` a stop request interrupts ``work``: for long work that writes nothing.

    The other processes wait as long as the main process is alive, even beyond TIMEOUT. A main
    process that dies closes its connections; without a heartbeat for SILENCE it counts as lost.

    An error of ``work`` is raised on every process. The main process prints it; on the other
    processes, the error is marked ``reported``.
    """
    if interrupt:
        return on_main(lambda: _interruptibly(work))
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]  # the result, the error
    failure: BaseException | None = None
    if is_main():
        with _heartbeats():
            try:
                outcome[0] = work()
            except BaseException as error:
                failure = error
                outcome[1] = (_shared_kind(error), str(error))
        _broadcast_sign(_DONE)
    else:
        _wait_for_main()
    failure = _broadcast_outcome(outcome) or failure
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        kind, message = outcome[1]
        copy = kind(message)
        copy.reported = True
        raise copy
    result: T = outcome[0]
    return result


def _broadcast_outcome(outcome: list[Any]) -> BaseException | None:
    """Give every process the ``outcome`` of the main one; return an error if it cannot be sent."""
    try:
        dist.broadcast_object_list(outcome, src=0, group=gloo_group())
    except (AttributeError, ImportError, TypeError, pickle.PicklingError) as error:
        if not is_main():
            raise UsageError(
                f"several processes need a network whose classes each of them can import: {error}; "
                "name the folder of the module in PYTHONPATH, or use one process"
            ) from error
        failure = UsageError(  # only a network contains the user's classes
            f"several processes need a network that can be pickled: {error}; define its classes "
            "and functions at the top level of a module, or use one process"
        )
        outcome[:] = [None, (UsageError, str(failure))]  # nothing has been sent yet
        dist.broadcast_object_list(outcome, src=0, group=gloo_group())
        return failure
    return None


def _interruptibly(work: Callable[[], T]) -> T:
    with interruptible():
        return work()


@contextmanager
def _heartbeats() -> Iterator[None]:
    """Send heartbeats to the other processes from a thread, HEARTBEATS within SILENCE."""
    done = threading.Event()
    interval = min(SILENCE, TIMEOUT).total_seconds() / HEARTBEATS

    def beat() -> None:
        while not done.wait(interval):
            try:
                _broadcast_sign(_WORKING)
            except RuntimeError:  # another process has ended: the next collective raises
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _broadcast_sign(sign: int) -> None:
    dist.broadcast(torch.tensor(sign), 0, group=gloo_group())


def _wait_for_main() -> None:
    """Wait until the main process is done; raise GammaslimError without a heartbeat for SILENCE."""
    sign = torch.tensor(_WORKING)
    while int(sign) == _WORKING:
        waiting = dist.broadcast(sign, 0, group=gloo_group(), async_op=True)
        assert waiting
        try:
            waiting.wait(SILENCE)
        except RuntimeError:
            if waiting.is_completed():  # its connection is closed
                raise
            raise GammaslimError(
                f"the main process gives no sign of life for {SILENCE.total_seconds():.0f} "
                "seconds: look at its machine and the network, then run the same command again"
            ) from None


def _shared_kind(error: BaseException) -> type[GammaslimError]:
    """Return the exception class, of the same exit code, that the other processes raise."""
    if isinstance(error, GammaslimError):
        return type(error)
    if isinstance(error, KeyboardInterrupt):
        return StopRequest
    return StorageError if isinstance(error, OSError) else GammaslimError


def gather(value: T) -> list[T]:
    """Return the ``value`` of every process, by rank; collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=gloo_group())
    return values


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all processes, in place, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def digest(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and bytes of a state dict."""
    sha = hashlib.sha256()
    for key, value in sorted(state.items()):  # safetensors does not keep the order
        sha.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def check_same(value: str, what: str) -> None:
    """Raise GammaslimError on every process when ``value`` is not the same on all of them."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        ranks = [r for r, other in enumerate(values) if other != values[0]]
        raise GammaslimError(f"{what} differs between processes: ranks {ranks} from rank 0")
