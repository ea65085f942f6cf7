"""Real predictions of a coarse network on disk, one file a case, to be mixed in among the simulated ones.

They have to be as bad as those of new cases: made by a network that was not trained on the case, or not for long.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from ultrarefiner.data.cases import Case
from ultrarefiner.errors import UserError

_LARGEST = 16.0  # logit: float32 tells no probability above its from 1


@dataclass(frozen=True)
class Predictions:
    """A folder of predictions.

    Attributes:
        folder: where they lie.
        ratio: share of the samples that take the real prediction, in [0, 1].
        versions: how many there are of a case.
    """

    folder: Path
    ratio: float = 1.0
    versions: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise UserError(f"real_ratio={self.ratio} is no share: give 0 … 1.")

    def path(self, case: Case, version: int = 0) -> Path:
        """The file of a case; its name is safe whatever the id holds."""
        name = hashlib.sha256(repr(case.key).encode()).hexdigest()[:24]
        return Path(self.folder) / (f"{name}-{version}.npy" if version else f"{name}.npy")

    def save(self, case: Case, logit: Float[np.ndarray, "C C"], version: int = 0) -> None:
        """Write a prediction given as logits: half precision keeps them where a probability is all but 0 or 1."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = self.path(case, version)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.clip(logit, -_LARGEST, _LARGEST).astype(np.float16))
        partial.replace(path)

    def load(self, case: Case, size: int, version: int = 0) -> Float32[np.ndarray, "C C"]:
        """The probability map of a case.

        Raises:
            UserError: there is none, or it has another size.
        """
        path = self.path(case, version)
        try:
            logit = np.load(path).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"there is no readable prediction for {case.dataset} {case.id!r} in {self.folder}: build them again, "
                "or set real_ratio=0."
            ) from error
        if logit.shape != (size, size):
            raise UserError(f"{path} has shape {logit.shape}, not {(size, size)}: build the predictions at this size.")
        return np.asarray(1 / (1 + np.exp(-logit)))
