"""A Slurm of one node, with daemons, keys and ports of its own, in a temporary folder."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from servers import free_port, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = ("/usr/sbin", "/sbin")
"""Where the daemons lie, which is not on every user's path."""
CPUS = 4
"""What the node says that it has: processes wait for each other, and two cores would hold one training."""
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
MailProg=/bin/true
InactiveLimit=0
KillWait=30
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def running_slurm():
    """Yield the configuration file of a running Slurm; skip the test where it is not installed."""
    path = os.pathsep.join([os.environ["PATH"], *SBIN])
    programs = {name: shutil.which(name, path=path) for name in (*DAEMONS, "sbatch", "scontrol")}
    missing = [name for name, found in programs.items() if found is None]
    if missing:
        packages = "slurmd slurmctld slurm-client munge"
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): apt-get install {packages}")
    # in a short path: that of a socket may have 107 characters
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as daemons:
        folder = Path(name)
        config = _configured(folder)
        environment = os.environ | {"SLURM_CONF": str(config)}
        for daemon, words in _commands(folder).items():
            daemons.enter_context(_running([programs[daemon], *words], folder / f"{daemon}.out", environment))
            if daemon == "munged":
                wait_until((folder / "munge.socket").exists, "munged listens", 30)

        def idle():
            asked = [programs["scontrol"], "show", "node", "--oneliner"]
            return "State=IDLE " in subprocess.run(asked, env=environment, capture_output=True, text=True).stdout

        try:
            wait_until(idle, "the node takes jobs", 60)
        except TimeoutError as error:
            said = "\n".join(f"{log}: {log.read_text()[-1500:]}" for log in folder.glob("*.log"))
            raise RuntimeError(f"{error}\n{said}") from error
        yield config


def _configured(folder):
    folder.chmod(0o711)
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    config = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    config.write_text(
        CONFIG.format(host=host, folder=folder, user=pwd.getpwuid(os.geteuid()).pw_name, cpus=CPUS, **ports)
    )
    return config


def _commands(folder):
    config = str(folder / "slurm.conf")
    places = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log", "pid-file": "munge.pid"}
    places |= {"seed-file": "munge.seed"}
    return {
        "munged": ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in places.items())],
        "slurmctld": ["-D", "-f", config],
        "slurmd": ["-D", "-f", config],
    }


@contextlib.contextmanager
def _running(command, output, environment):
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
