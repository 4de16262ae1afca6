"""Who started this process: torchrun, srun, or nobody; the answer is put in torchrun's environment variables.

Everything later reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT only.
"""

from __future__ import annotations

import os
import re
import subprocess

from megatron_ds.errors import ConfigError


def adopt_environment() -> None:
    """Translate a plain `srun python ...` into torchrun's variables; leave torchrun's own alone.

    Raises: ConfigError if srun started several tasks and their common address cannot be found
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in os.environ or int(num_tasks) == 1:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        return
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=num_tasks, LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0")
    )
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    # Ranks of two jobs on one node must not meet: the port follows from the job and step.
    job = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    if re.fullmatch(r"[\w.-]+", nodes):  # a single host needs no expansion
        return nodes
    try:
        out = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return out.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ConfigError(
            "MASTER_ADDR",
            found=f"srun with {os.environ['WORLD_SIZE']} tasks on {nodes!r}, and scontrol cannot expand that",
            expected="an address that every task can reach",
            fix="export MASTER_ADDR=<host of task 0> before srun",
        ) from None
