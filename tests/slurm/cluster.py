"""A real Slurm on one machine: munged, slurmctld and several slurmd, each a node of its own, below one folder.

No systemd, no cgroups, no accounting. Everything is found again, and ended, by the SLURM_CONF in its environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its credentials have expired: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=1
SlurmdTimeout=10
KillWait=10
# above KillWait: a signal that a step takes long to obey would be sent again a minute later, to the next start's step
MessageTimeout=60
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODES = ("n1", "n2", "n3", "n4")
WEIGHTS = {"n1": 10, "n2": 10, "n3": 1, "n4": 1}
"""Jobs take n3 and n4 first where their partition has them."""


def install() -> None:
    """Debian's packages, where the daemons are not there yet. RuntimeError says what to do where that cannot be."""
    if all(shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") for name in ("slurmctld", "slurmd", "munged")):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(
            f"make test-slurm needs slurmctld, slurmd and munged: run it as root on Debian or Ubuntu, or install "
            f"{' '.join(PACKAGES)} first"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=False, capture_output=True, timeout=120)
    done = subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"make test-slurm: apt-get install {' '.join(PACKAGES)} failed:\n{done.stderr[-1000:]}")


class Cluster:
    """Four nodes n1 to n4; partitions main (n1, n2), low (all, preempted by requeueing) and high (all)."""

    def __init__(self) -> None:
        """Start every daemon and wait until the nodes are idle."""
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))  # short: a socket's path has at most 107 bytes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        config = self.folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MPL_"))},
            "SLURM_CONF": str(config),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} Weight={WEIGHTS[name]}"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        config.write_text(
            CONFIG.format(
                host=socket.gethostname(), port=ports[0], folder=self.folder, user=user, nodes="\n".join(nodes)
            )
        )
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        try:
            munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
            self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *munge)
            wait_for(lambda: (self.folder / "munge.socket").exists(), "munged", seconds=20)
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            wait_for(self._nodes_idle, "nodes", seconds=40)
        except BaseException:
            print(self.logs())
            self.close()
            raise

    def run(self, *command: str, check: bool = True, **extra: str) -> str:
        """A Slurm command's output. AssertionError where it fails, with what it said."""
        done = subprocess.run(
            command, env={**self.environment, **extra}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *options: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """sbatch; returns the job's id."""
        command = ["sbatch", "--parsable", *options]
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def finish(self, job: str, log: Path, *, seconds: float = 150) -> dict[str, str]:
        """Wait for a job to leave the queue, requeues included; AssertionError with its log where it does not."""
        ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        deadline = time.monotonic() + seconds
        while True:
            found = self.job(job)
            # a job that is being requeued shows its end for a moment
            if found["JobState"] in ended and self._still(job, found["JobState"]):
                return found
            said = log.read_text() if log.exists() else ""
            assert time.monotonic() < deadline, f"job {job} is {found['JobState']} ({found['Reason']}):\n{said}"
            time.sleep(0.3)

    def _still(self, job: str, state: str) -> bool:
        time.sleep(1.5)
        return self.job(job)["JobState"] == state

    def ranks(self, job: str) -> dict[int, int]:
        """Process id by rank, of the job's tasks that run Python."""
        found: dict[int, int] = {}
        for pid, environment in self._ours():
            if environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment and _program(pid) == "train.py":
                found[int(environment["SLURM_PROCID"])] = pid
        return found

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node, TEST_NODE=node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, slurmstepd and every task of the node get SIGKILL."""
        self._daemons.pop(node).kill()
        for pid, environment in self._ours():
            if node in (environment.get("TEST_NODE"), environment.get("SLURMD_NODENAME")):
                _kill(pid)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.out")))

    def close(self) -> None:
        """End what was started, and nothing else; delete the folder."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        for _ in range(20):
            left = [pid for pid, _ in self._ours()]
            for pid in left:
                _kill(pid)
            if not left:
                break
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *command: str, **extra: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env={**self.environment, **extra}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _nodes_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            assert daemon.poll() is None, f"{name} ended with status {daemon.returncode}"
        states = set(self.run("sinfo", "-hN", "-o%N %T", check=False).splitlines())
        return states == {f"{node} idle" for node in NODES}

    def _ours(self) -> list[tuple[int, dict[str, str]]]:
        """Processes, with their environments, that were started with this cluster's SLURM_CONF; not this one."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            try:
                lines = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            if pid != os.getpid() and environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                found.append((pid, environment))
        return found


def wait_for(condition: Callable[[], object], what: str, *, seconds: float) -> None:
    """Poll; AssertionError after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _program(pid: int) -> str:
    """The name of the script a Python process runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return Path(words[1]).name if len(words) > 1 and "python" in words[0] else ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
