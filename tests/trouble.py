"""Training data that make trouble on demand, for tests of what happens to processes and jobs."""

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

from ultrarefiner.data.augment import Augment
from ultrarefiner.errors import UserError

FOLDER = "ULTRAREFINER_TEST_TROUBLE"
"""The environment variable that names a folder with files like `job2-process1`, which hold what is to happen there:
`bug`, `mistake` or `kill` at the first sample after the one that is tried before the training, or `slow N`: from the
Nth sample on each takes a second. A job that SLURM has started again has no trouble any more."""
TROUBLE = "dataset.augment._target_=trouble.Trouble"


class Trouble(Augment):
    """Augmentation that does what it finds in the file of its process."""

    drawn: ClassVar[int] = 0

    def draw(self, rng, mask):
        """A change, or trouble."""
        process = f"job{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}-process{os.environ.get('RANK', 0)}"
        orders = Path(os.environ[FOLDER]) / process
        if orders.is_file() and "SLURM_RESTART_COUNT" not in os.environ:
            self._make(*orders.read_text().split())
        return super().draw(rng, mask)

    def _make(self, what: str, first: str = "0") -> None:
        Trouble.drawn += 1
        if Trouble.drawn == 1:
            return
        if what == "bug":
            raise ZeroDivisionError("division by zero")
        if what == "mistake":
            raise UserError("this image cannot be read")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "slow" and Trouble.drawn > int(first):
            time.sleep(1)
