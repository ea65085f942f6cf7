"""What became of a job that submitit started, on SLURM or on this machine."""

import subprocess
import time
from pathlib import Path
from typing import Any

QUEUE_SECONDS = 15
"""How often the queue is asked where SLURM keeps no accounts: not often, for it is everybody's."""
FILES_SECONDS = 15
"""How long a result may take from one machine to another through a shared file system."""


class Killed(Exception):
    """The job ended without a result; says why as far as its log knows."""


def wait_for(job: Any) -> Any:
    """The value that a job of submitit returns.

    Submitit alone waits for ever for a job that was killed where SLURM keeps no accounts (no `sacct`).

    Raises:
        Killed: it was cancelled, ran out of memory or time, or its machine died.
    """
    from submitit.core.utils import pickle_load

    asked = time.monotonic()
    while not job.done():
        time.sleep(1)
        if time.monotonic() - asked > QUEUE_SECONDS:
            asked = time.monotonic()
            if not _queued(job):
                break
    result: Path = job.paths.result_pickle
    until = time.monotonic() + FILES_SECONDS
    while not result.exists():
        if time.monotonic() > until:
            raise Killed(f"the job was killed{_last_words(job.paths.stderr)}")
        time.sleep(0.5)
    outcome, value = pickle_load(result)
    if outcome == "error":
        raise Killed(f"the job ended early: {value.strip().splitlines()[-1]} (log: {job.paths.stderr})")
    return value


def _queued(job: Any) -> bool:
    """Whether SLURM still has the job in its queue, or cannot say so at the moment; true for jobs on this machine."""
    if type(job).__name__ != "SlurmJob":
        return True
    try:
        asked = subprocess.run(["squeue", "-h", "-j", job.job_id], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return True
    return bool(asked.stdout.strip()) if asked.returncode == 0 else "Invalid job id" not in asked.stderr


def _last_words(log: Path) -> str:
    """What the log says last of an error; SLURM's own word (*** STEP ... CANCELLED ***) before that of its helpers."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    errors = [line.strip() for line in lines if "error:" in line]
    last = next((line for line in reversed(errors) if "***" in line), errors[-1] if errors else "")
    return f": {last.rpartition('error:')[2].strip(' *')} (log: {log})" if last else f" (log: {log})"
