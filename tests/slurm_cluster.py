"""A real single-node Slurm in a temporary folder, for tests.

Every daemon listens on the loopback address or on a socket in that folder, runs in the foreground
as a child of this process, and is stopped by its process id. The node claims more processors than
the machine has, and eight ordinary files are its GPUs.

    with SlurmCluster() as cluster:
        subprocess.run(["sinfo"], env=cluster.environ)
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch",
            "sacctmgr")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"

SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageTRES=gres/gpu
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd_port}
AccountingStoragePass={folder}/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=3
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:8 State=UNKNOWN
PartitionName=gpu Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
"""


def missing() -> str:
    """Why a cluster can't be started here; empty if it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]
    return f"Slurm is not installed here (no {', '.join(absent)}); see .ci/run" if absent else ""


class SlurmCluster:
    """The cluster while its `with` block lasts.

    Attributes:
        folder: where everything of it lies, logs included.
        environ: environment in which sbatch and the others find it.
    """

    def __init__(self):
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets' paths are limited
        self.environ = {**os.environ, "PATH": SEARCH_PATH,
                        "SLURM_CONF": str(self.folder / "slurm.conf"),
                        "MYSQL_UNIX_PORT": str(self.folder / "data/mysql.socket")}
        try:
            self._configure()
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser(), "--signal=KILL"],
                       env=self.environ, capture_output=True, timeout=60)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> str:
        """Output of a Slurm command."""
        return subprocess.run(command, env=self.environ, check=True, capture_output=True,
                              text=True, timeout=120).stdout

    def _configure(self) -> None:
        facts = {"folder": self.folder, "user": getpass.getuser(),
                 **{f"{name}_port": _free_port() for name in ("slurmctld", "slurmd", "slurmdbd")}}
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        for name, text in [("slurm.conf", SLURM_CONF), ("slurmdbd.conf", SLURMDBD_CONF),
                           ("gres.conf", "Name=gpu File={folder}/fakegpu[0-7]\n")]:
            (self.folder / name).write_text(text.format(**facts))
            (self.folder / name).chmod(0o600)
        for index in range(8):
            (self.folder / f"fakegpu{index}").touch()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)

    def _start_all(self) -> None:
        folder, data = self.folder, self.folder / "data"
        self.start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
                   f"--key-file={folder}/munge.key", f"--log-file={folder}/munged.log",
                   f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed")
        user = getpass.getuser()
        self.run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}",
                 "--auth-root-authentication-method=normal", "--skip-test-db")
        self.start("mariadbd", "--no-defaults", f"--datadir={data}", f"--user={user}",
                   f"--socket={data}/mysql.socket", "--skip-networking",
                   "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
                   "--innodb-flush-log-at-trx-commit=0")
        _wait(lambda: (data / "mysql.socket").exists() and (folder / "munge.socket").exists())
        self.start("slurmdbd", "-D")
        _wait(lambda: "Cluster" in self._answers("sacctmgr", "list", "cluster"))
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self.start("slurmctld", "-D", "-c")
        self.start("slurmd", "-D", "-N", "localhost")
        _wait(lambda: "idle" in self._answers("sinfo", "-h", "-o", "%t"))

    def start(self, *command: str) -> subprocess.Popen:
        """Start a daemon; its output goes to a file in the folder."""
        with open(self.folder / f"{command[0]}.out", "a") as output:
            daemon = subprocess.Popen(  # setpriv: killed tests leave no daemons behind
                ["setpriv", "--pdeathsig", "TERM", *command], env=self.environ,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self.daemons.append(daemon)
        return daemon

    def _answers(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        ended = [daemon.args[3] for daemon in self.daemons if daemon.poll() is not None]
        if ended:
            logs = "\n".join(f"{file.name}: {file.read_text(errors='replace')[-2000:]}"
                             for name in ended for file in self.folder.glob(f"{name}.*")
                             if file.suffix in (".out", ".log"))
            raise RuntimeError(f"{', '.join(ended)} ended at its start:\n{logs}")
        return done.stdout if done.returncode == 0 else ""


def _wait(condition: Callable[[], object], *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the Slurm cluster did not start in time")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
