"""Which images a network has seen, by content: what is tested with it must not be among them.

An image is known by two marks: the beginning of its file's SHA-256, and a perceptual hash of 63 bits that survives
another file format, another size and small cuts. No pixels are kept, so a checkpoint that carries its marks gives no
patient away. Measured on BUS-BRA: JPEG, rescaling and brightness change up to 4 bits and a cut of 2 % on each side up
to 8, while the 1.1 million pairs of different patients differ in 10 bits or more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from ultrarefiner.data.duplicates import perceptual_hash
from ultrarefiner.data.index import Index

MAX_HAMMING = 8
SHORT = 16  # hexadecimal digits: 64 bits, enough for 10⁸ images


@dataclass(frozen=True)
class Seen:
    """The marks of images, by what they were used for.

    Attributes:
        trained: images that weights were fitted to, as "sha-hash".
        chosen: images by which a checkpoint was chosen (the validation part).
    """

    trained: frozenset[str] = field(default_factory=frozenset)
    chosen: frozenset[str] = field(default_factory=frozenset)

    def __or__(self, other: "Seen") -> "Seen":
        """What either has seen."""
        return Seen(self.trained | other.trained, self.chosen | other.chosen)

    def without(self, marks: Iterable[str]) -> "Seen":
        """What else was seen."""
        known = frozenset(marks)
        return Seen(self.trained - known, self.chosen - known)

    def among(self, marks: Sequence[str]) -> list[int]:
        """The positions of those images that were seen: the same file, or a near-duplicate."""
        known = sorted(self.trained | self.chosen)
        if not known or not marks:
            return []
        files = {mark.partition("-")[0] for mark in known}
        own, others = _signs(marks), _signs(known)
        alike = [((own.shape[1] - row @ others.T) / 2 <= MAX_HAMMING).any() for row in own]
        return [i for i, mark in enumerate(marks) if mark.partition("-")[0] in files or alike[i]]

    def as_lists(self) -> dict[str, list[str]]:
        """For a checkpoint or a JSON file."""
        return {"trained": sorted(self.trained), "chosen": sorted(self.chosen)}

    @classmethod
    def of_lists(cls, lists: dict[str, Any]) -> "Seen":
        """The counterpart of `as_lists`."""
        return cls(frozenset(lists["trained"]), frozenset(lists["chosen"]))


def marks_of(index: Index, positions: Iterable[int]) -> list[str]:
    """The marks of the cases at some positions of an index."""
    return [f"{index.entries[i].sha256[:SHORT]}-{_hexadecimal(index.signatures[i])}" for i in positions]


def _hexadecimal(thumbnail: UInt8[np.ndarray, "64 64"]) -> str:
    return np.packbits(perceptual_hash(thumbnail) > 0).tobytes().hex()


def _signs(marks: Sequence[str]) -> Float32[np.ndarray, "N 64"]:
    """±1 for each bit, so that a product counts the bits that agree."""
    hashes = np.frombuffer(bytes.fromhex("".join(mark.rpartition("-")[2] for mark in marks)), dtype=np.uint8)
    return np.unpackbits(hashes.reshape(len(marks), -1), axis=1).astype(np.float32) * 2 - 1
