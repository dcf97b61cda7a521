"""A Slurm of one machine in a folder: munged, slurmctld and a slurmd per node, as processes of the tests."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from base.environment import die_with_parent
from tests.pipeline.project import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=5
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=first Nodes=ALL PriorityTier=9 State=UP
"""


class Slurm:
    """A running cluster; `environment` is what its commands need."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, gpus: int = 2) -> None:
        self.folder, self.nodes = folder, [f"node{i}" for i in range(nodes)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN"
            for node in self.nodes
        ]
        config = CONFIG.format(folder=folder, host=socket.gethostname(), port=free_port(), nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(config)
        devices = [folder / f"gpu{i}" for i in range(gpus)]
        for device in devices:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # slurmd wants devices; these are like /dev/null
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        path = self.folder
        path.chmod(0o755)
        munge = [f"--key-file={path}/munge.key", f"--socket={path}/munge.socket", f"--pid-file={path}/munge.pid"]
        munge += [f"--log-file={path}/munge.log", f"--seed-file={path}/munge.seed"]
        self._daemon("munged", "--foreground", "--force", *munge)
        self._until(lambda: (path / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.say("sinfo", "-h", "-p", "main", "-o", "%T %D") == f"idle {len(self.nodes)}")

    def stop(self) -> None:
        """End the daemons, last started first."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait(20)

    def say(self, *command: str) -> str:
        """What a command of Slurm prints."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()

    def jobs(self) -> list[str]:
        """Numbers of the jobs that have not ended."""
        return self.say("squeue", "-h", "-o", "%i").split()

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program
        log = (self.folder / f"{name}-{len(self.processes)}.out").open("w")
        self.processes.append(
            subprocess.Popen(
                [program, *arguments],
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        )

    def _until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [process.args for process in self.processes if process.poll() is not None]
            logs = "\n".join(f"{p.name}: {p.read_text()[-600:]}" for p in sorted(self.folder.glob("*.out")))
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"Slurm does not start; ended: {dead}\n{logs}")
            time.sleep(0.1)
