"""A stand-in for SLURM on this machine: `sbatch`, `srun` and `scontrol requeue`, as far as docs/cluster/slurm.sh goes.

    python tests/slurm.py sbatch [--nodes=N] [--ntasks-per-node=N] SCRIPT ARGUMENTS

`sbatch` runs a job to its end, again where it was requeued; `srun` starts a process for each task with SLURM's
variables, hands SIGTERM on to them as a node's daemon does, and ends with the largest of their exit codes. The folder
FAKE_SLURM holds the process id of the running `srun`, and what was requeued.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
JOB = "4711"


def sbatch(arguments: list[str]) -> int:
    given = [argument for argument in arguments if argument.startswith("--")]
    script, *rest = arguments[len(given) :]
    text = Path(script).read_text()
    options = dict(re.findall(r"--([\w-]+)=(\S+)", "\n".join([*re.findall(r"^#SBATCH (.*)$", text, re.M), *given])))
    assert "--requeue" in text
    assert options["signal"].startswith("TERM@")
    nodes, tasks = options["nodes"], options["ntasks-per-node"]
    job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": options["job-name"], "SLURM_NNODES": nodes}
    job |= {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_NTASKS": str(int(nodes) * int(tasks)), "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for restarts in range(10):
        again = FOLDER / "requeued"
        again.unlink(missing_ok=True)
        environment = os.environ | job | {"SLURM_RESTART_COUNT": str(restarts)}
        code = subprocess.run(["bash", script, *rest], env=environment).returncode
        if not again.exists():
            return code
    return 1


def srun(arguments: list[str]) -> int:
    command = arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("--")) :]
    of_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % of_node, "SLURM_NODEID": rank // of_node}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        tasks.append(subprocess.Popen(command, env=environment))
    (FOLDER / "srun.pid").write_text(str(os.getpid()))
    return max(task.wait() for task in tasks)


def scontrol(arguments: list[str]) -> int:
    assert arguments == ["requeue", JOB]
    (FOLDER / "requeued").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
