"""A real Slurm of one node on the loopback device, for a test: no systemd, no system settings.

Everything lies in one temporary folder: MUNGE with a key of its own, MariaDB on a socket only,
slurmdbd, slurmctld and slurmd. Debian's packages: slurm-wlm slurmdbd munge mariadb-server.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = (
    "mariadb-install-db", "mariadbd", "munge", "munged", "sacct", "sacctmgr", "sbatch", "scancel",
    "scontrol", "setpriv", "sinfo", "slurmctld", "slurmd", "slurmdbd", "squeue", "srun",
)  # fmt: skip
NODE = "node0"
USER = pwd.getpwuid(os.getuid()).pw_name
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=gnbench
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired.
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={root}/munge.sock
NodeName={node} NodeHostname={hostname} NodeAddr=127.0.0.1 CPUs=16 RealMemory=65536
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE PreemptMode=OFF
# For a job in high, one in low gives way, after a grace time that is longer than any test waits.
PartitionName=low Nodes={node} MaxTime=INFINITE PriorityTier=1 GraceTime=600
PartitionName=lowest Nodes={node} MaxTime=INFINITE PriorityTier=1
PartitionName=high Nodes={node} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={root}/slurmdbd.pid
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""

MY_CNF = """\
[client]
socket = {root}/mysql.sock
[mariadbd]
skip-networking
socket = {root}/mysql.sock
datadir = {root}/mysql
pid-file = {root}/mysql.pid
init-file = {root}/init.sql
innodb_buffer_pool_size = 64M
innodb_lock_wait_timeout = 900
"""

INIT_SQL = """\
CREATE DATABASE IF NOT EXISTS slurm;
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY '{password}';
GRANT ALL ON slurm.* TO slurm@localhost;
"""


class UnavailableError(RuntimeError):
    """There is no cluster to be had here; the message says what is missing."""


@contextlib.contextmanager
def cluster():
    """Start the cluster, point ``SLURM_CONF`` at it, yield it, and leave no process behind."""
    search = f"{os.environ.get('PATH', '')}:{SBIN}"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=search) is None]:
        raise UnavailableError(f"not installed: {', '.join(missing)}")
    # Not pytest's folder: the path of a socket has at most 107 characters.
    root = Path(tempfile.mkdtemp(prefix="gnbench-slurm-"))
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": search}
    slurm = Cluster(root)
    try:
        try:
            slurm.start()
        except OSError as error:
            raise UnavailableError(f"it cannot be started here: {error}") from error
        yield slurm
    finally:
        try:
            slurm.stop()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            shutil.rmtree(root, ignore_errors=True)


class Cluster:
    """The daemons, and what a test wants to ask them."""

    def __init__(self, root):
        self.root = root
        self.daemons = {}

    def start(self):
        """Start one daemon after the other, each when the one before it answers."""
        root = self.root
        ctld_port, slurmd_port, dbd_port = _free_ports(3)
        values = {
            "root": root, "user": USER, "node": NODE,
            "hostname": socket.gethostname().partition(".")[0],
            "ctld_port": ctld_port, "slurmd_port": slurmd_port, "dbd_port": dbd_port,
            "password": secrets.token_hex(16),
        }  # fmt: skip
        for name in ("state", "spool", "mysql"):
            (root / name).mkdir()
        for name, text in {
            "slurm.conf": SLURM_CONF, "slurmdbd.conf": DBD_CONF, "my.cnf": MY_CNF,
            "init.sql": INIT_SQL, "munge.key": secrets.token_hex(64),
        }.items():  # fmt: skip
            (root / name).touch(mode=0o600)  # slurmdbd and munged insist
            (root / name).write_text(text.format(**values))
        (root / "slurm.conf").chmod(0o644)

        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={root}/munge.key",
            f"--socket={root}/munge.sock", f"--pid-file={root}/munge.pid", "--num-threads=10",
            f"--log-file={root}/munge.own.log", f"--seed-file={root}/munge.seed",
        )  # fmt: skip
        self._until("munged", lambda: _output("munge", "-n", "-S", str(root / "munge.sock")))
        defaults = f"--defaults-file={root}/my.cnf"
        _output(
            "mariadb-install-db", defaults, f"--user={USER}", f"--datadir={root}/mysql",
            "--auth-root-authentication-method=normal", "--skip-test-db",
        )  # fmt: skip
        self._daemon("mariadbd", defaults, f"--user={USER}")
        self._until("mariadbd", lambda: (root / "mysql.sock").exists())
        # slurmdbd has no setting for the socket, but libmariadb reads this variable.
        self._daemon("slurmdbd", "-D", env={"MYSQL_UNIX_PORT": f"{root}/mysql.sock"})
        self._until("slurmdbd", lambda: _output("sacctmgr", "-n", "show", "cluster") is not None)
        _output("sacctmgr", "-i", "add", "cluster", "gnbench")
        self._daemon("slurmctld", "-D", "-c", "-i", "-f", f"{root}/slurm.conf")
        self._until("slurmctld", lambda: " UP" in _output("scontrol", "ping"))
        self._daemon("slurmd", "-D", "-N", NODE, "-f", f"{root}/slurm.conf")
        self._until("slurmd", lambda: _output("sinfo", "-h", "-o", "%T").strip() == "idle")
        self._until("sacct", lambda: _output("sacct", "-n") is not None)

    def stop(self):
        """Cancel the jobs, stop the daemons in reverse, and end what is left of any job."""
        if "slurmd" in self.daemons:
            with contextlib.suppress(UnavailableError):
                _output("scancel", "--user", USER)
        for process in reversed(self.daemons.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for _ in range(100):  # slurmstepd and its tasks are nobody's children
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.1)
        raise AssertionError(f"processes of the cluster are still there: {left}")

    def processes(self, **environment):
        """List the processes that this cluster started, if asked those with these variables."""
        wanted = {"SLURM_CONF": str(self.root / "slurm.conf"), **environment}
        entries = {os.fsencode(f"{name}={value}") for name, value in wanted.items()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if entries <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
        return [pid for pid in found if pid != os.getpid()]

    def trainer(self, **environment):
        """Return the process that trains in a job: the task, not the script or the srun in it."""
        [pid] = (
            pid
            for pid in self.processes(SLURM_STEP_ID="0", **environment)
            if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        return pid

    def jobs(self):
        """Ask the accounting for the state of every job, by its name (``12`` or ``12_0``)."""
        lines = _output("sacct", "-nXP", "-o", "JobID,State").splitlines()
        return dict(line.split("|") for line in lines)

    def _daemon(self, name, *arguments, env=None):
        with (self.root / f"{name}.log").open("ab") as log:
            # --pdeathsig: it goes with this process, however that ends.
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", name, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd=self.root, env={**os.environ, **(env or {})},
            )  # fmt: skip

    def _until(self, name, ready, seconds=60):
        error = "it does not answer"
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if dead := [n for n, process in self.daemons.items() if process.poll() is not None]:
                name, error = ", ".join(dead), "it ended"
                break
            try:
                if ready():
                    return
            except UnavailableError as unready:
                error = str(unready)
            time.sleep(0.1)
        raise UnavailableError(f"{name} does not start: {error}\n{self.logs()}")

    def logs(self, lines=15):
        """Return the last lines of what each daemon said."""
        return "\n".join(
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]])
            for path in sorted(self.root.glob("*.log"))
        )


def _output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]}: no answer in 60 s") from error
    if done.returncode:
        raise UnavailableError(f"{command[0]}: {(done.stderr + done.stdout).strip()[-2000:]}")
    return done.stdout


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
