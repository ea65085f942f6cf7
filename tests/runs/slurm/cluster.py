"""A Slurm of our own: two nodes on this machine, in a folder of their own, on free ports, gone when the block ends."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
START_SECONDS = 30

# Without accounting and without cgroups: what runs in a container as root. A job that is requeued waits until its
# credential expires, and the scheduler looks at it in its own rhythm: both are made quick. A node has more processors
# than tests ask for at a time, so that no sweep waits for another test's.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=8 RealMemory=1000
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=8 RealMemory=1000
PartitionName=short Nodes=ALL Default=YES
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"no {absent[0]}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """The environment variables with which Slurm's commands find the cluster."""
    host = socket.gethostname().partition(".")[0]
    environment = {"PATH": _path()}
    # Not pytest's own folder: that is closed to others and its name too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        with contextlib.ExitStack() as held:
            controller_port, port_1, port_2 = (_free_port(held) for _ in range(3))
        configuration = CONFIGURATION.format(
            host=host, folder=folder, controller_port=controller_port, port_1=port_1, port_2=port_2
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "state").mkdir()
        environment["SLURM_CONF"] = str(folder / "slurm.conf")

        def start(name: str, *command: str) -> None:
            daemons.enter_context(_daemon(folder / f"{name}.log", environment, *command))

        own = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed")]
        own += [f"--log-file={folder}/munged.log", f"--socket={folder}/munge.socket"]
        start("munge", "munged", "--foreground", "--force", *own)
        _wait(folder, lambda: (folder / "munge.socket").exists())
        start("controller", "slurmctld", "-D")
        for node in (host, f"{host}-2"):
            (folder / f"spool-{node}").mkdir()
            start(node, "slurmd", "-D", "-N", node)
        _wait(folder, lambda: _ask(environment, "sinfo", "-h", "-o", "%T %D") == "idle 2")
        try:
            yield environment
        finally:
            _ask(environment, "scancel", "--user=root")
            _wait(folder, lambda: not _ask(environment, "squeue", "-h"))


@contextlib.contextmanager
def _daemon(log: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(folder: Path, done: Callable[[], bool]) -> None:
    until = time.monotonic() + START_SECONDS
    while not done():
        if time.monotonic() > until:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise TimeoutError(f"Slurm does not answer\n{logs}")
        time.sleep(0.2)


def _ask(environment: dict[str, str], *command: str) -> str:
    asked = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    return asked.stdout.strip()


def _path() -> str:
    """Daemons lie where only root's shell looks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_port(held: contextlib.ExitStack) -> int:
    """A port that nobody has; taken until the stack ends, so that the next one is another."""
    taken = held.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    return taken.getsockname()[1]
