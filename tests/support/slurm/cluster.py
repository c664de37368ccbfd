"""A real Slurm cluster on this machine: munge, a controller and nodes, each in its own namespaces.

Nothing of it is visible outside, and all of it ends with its first process. A node is a process
namespace: killing its first process is a power failure. Processes are tracked by cgroups, as real
sites do it; where no freezer group can be had, by parentage.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent
NODES = {"alpha": "127.0.1.1", "beta": "127.0.1.2"}
GPUS = {"alpha": 8, "beta": 1}  # so that GPUs asked for by number are spread unevenly

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=controller(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType={tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=45
SlurmdTimeout=8
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PartitionName=tests Nodes=ALL Default=YES MaxTime=30 State=UP
"""
CGROUPS = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint={folder}/cgroup
CgroupAutomount=no
"""


class Job(dict[str, str]):
    """What ``scontrol show job`` says of a job."""

    @property
    def state(self) -> str:
        return self["JobState"]


class Cluster:
    """``start`` and ``stop`` it; in between, ``run`` commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.first: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises AssertionError, with the logs, when the cluster does not come up."""
        write = {
            "name": f"gammaslim-tests-{os.getpid()}",
            "hosts": "127.0.0.1 localhost controller\n"
            + "".join(f"{address} {node}\n" for node, address in NODES.items()),
            "cgroup.conf": CGROUPS.format(folder=self.folder),
            "slurm.conf": self._configuration(),
            "gres.conf": "".join(
                f"NodeName={node} Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-{count - 1}]\n"
                for node, count in GPUS.items()
            ).replace("[0-0]", "0"),
        }
        for name, content in write.items():
            (self.folder / name).write_text(content)
        for name in ("state", "dev", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for number in range(max(GPUS.values())):
            # devices that are there and do nothing
            os.mknod(self.folder / "dev" / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        spaces = ("--net", "--mount", "--uts", "--ipc", "--pid")
        self.first = subprocess.Popen(
            # it ends with the tests, however they end
            ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "--fork", "--kill-child",
             "--mount-proc", "bash", HERE / "start.sh", self.folder],
            env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / "start.log").open("wb"), start_new_session=True,
        )  # fmt: skip
        self._until((self.folder / "ready").exists, "the controller does not start")
        for node in NODES:
            self.power_on(node)

    def _configuration(self) -> str:
        tracking = "proctrack/cgroup" if has_freezer() else "proctrack/linuxproc"
        lines = [CONFIGURATION.format(folder=self.folder, tracking=tracking)]
        lines += [
            f"NodeName={node} NodeAddr={address} Port={26819 + number} CPUs=64 RealMemory=100000 "
            f"Gres=gpu:h100:{GPUS[node]}\n"
            for number, (node, address) in enumerate(NODES.items())
        ]
        return "".join(lines)

    @property
    def environ(self) -> dict[str, str]:
        """The caller's variables, without any that Slurm or a launcher would obey."""
        strange = re.compile("SLURM|SBATCH|SRUN|WANDB|GAMMASLIM|MASTER_|CUDA|.*RANK|WORLD")
        kept = {key: value for key, value in os.environ.items() if not strange.match(key)}
        return kept | {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }

    def _enter(self, cwd: Path | None, *command: object) -> list[str]:
        assert self.first
        spaces = ("--net", "--mount", "--uts", "--ipc", "--pid", "--cgroup")
        place = f"--wd={cwd or self.folder}"
        inside = child_of(self.first.pid)
        return ["nsenter", f"--target={inside}", *spaces, place, *map(str, command)]

    def run(
        self, *command: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """What ``command`` prints; raises AssertionError when it fails."""
        done = subprocess.run(
            self._enter(cwd, *command), env={**self.environ, **(env or {})}, text=True,
            capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def start_process(self, *command: object) -> subprocess.Popen[str]:
        """A process on the cluster's network; the caller ends it by its standard input."""
        return subprocess.Popen(
            self._enter(None, *command), env=self.environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def power_on(self, node: str) -> None:
        """Start a node and wait until it takes jobs."""
        script = f"hostname {node}; slurmd -N {node}; while :; do sleep 3600 & wait $!; done"
        spaces = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.nodes[node] = subprocess.Popen(
            self._enter(None, "unshare", *spaces, "bash", "-c", script),
            env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{node}.log").open("wb"), start_new_session=True,
        )  # fmt: skip
        self._until(
            lambda: re.search(r"State=(IDLE|MIXED|ALLOCATED)[+A-Z]* ", self.show("node", node)),
            f"{node} does not start",
        )

    def power_off(self, node: str) -> None:
        """Kill everything on a node at once."""
        first = child_of(child_of(self.nodes[node].pid))
        os.kill(first, signal.SIGKILL)
        self.nodes.pop(node).wait()

    def stop(self) -> None:
        """End everything, and remove the freezer group."""
        if self.first:
            self.first.kill()  # --kill-child: the namespace's first process goes, and all with it
            self.first.wait()
        for node in self.nodes.values():
            node.wait()
        name = (self.folder / "name").read_text()
        remove = (
            'mount -t cgroup -o freezer gammaslim "$1" 2>/dev/null || exit 0; '
            'for _ in 1 2 3 4 5 6 7 8 9 10; do find "$1/$2" -depth -type d -exec rmdir {} + && '
            "exit 0; sleep 0.2; done; exit 1"
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", remove, "sh", self.folder / "outer", name],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def _until(self, condition: Callable[[], object], problem: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = [path for path in sorted(self.folder.glob("*.log")) if path.stat().st_size]
            assert time.monotonic() < deadline, "\n".join(
                [problem, *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)]
            )
            time.sleep(0.1)

    def show(self, kind: str, name: str) -> str:
        """One line of ``scontrol show``."""
        return self.run("scontrol", "-o", "show", kind, name)

    def submit(self, *options: object, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit a job; its number."""
        return self.run("sbatch", "--parsable", *options, cwd=cwd, env=env).split(";")[0]

    def job(self, number: str) -> Job:
        """The job as it is now; of an array, its first task in the list."""
        first = self.show("job", number).splitlines()[0]
        return Job(re.findall(r"(\S+?)=(\S*)", first))

    def wait(
        self, number: str, states: Iterable[str] = (), *, restarts: int = 0, seconds: float = 300
    ) -> Job:
        """Wait until a job has ended, or is in one of ``states``, after at least ``restarts``.

        A requeued job begins after ``cred_expire`` and a second: earlier, Slurm would fail it.
        """
        deadline = time.monotonic() + seconds
        wanted = set(states) or {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        while True:
            job = self.job(number)
            if job.state in wanted and int(job["Restarts"]) >= restarts:
                return job
            assert time.monotonic() < deadline, (job, self.run("sinfo", "-N", "-l"))
            time.sleep(0.5)


def child_of(pid: int) -> int:
    """The only child of a process, as soon as there is one."""
    deadline = time.monotonic() + 10
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline, f"process {pid} has started nothing"
        time.sleep(0.02)
    return int(found[0])


def has_freezer() -> bool:
    """Whether a freezer hierarchy can be mounted here."""
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "cgroup", "-o", "freezer", "gammaslim", "/tmp"],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
