"""How time and memory grow with the number of images: near-duplicates, groups, folds and the proof against leaks.

    python benchmarks/growth.py                         # 1 000 and 10 000 images, and 100 000 in some minutes
    python benchmarks/growth.py --counts 1000 10000     # as many as one likes

The thumbnails are phantoms' and smooth noise over them; every fiftieth image is another one once more, brighter. Each
number of images runs in a process of its own, so that its peak of memory is its own. Seconds are processor time.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import UInt8

from ultrarefiner.data.cases import Case
from ultrarefiner.data.duplicates import near_duplicates
from ultrarefiner.data.folds import group_cases, leaks, make_split
from ultrarefiner.data.index import Entry, Index
from ultrarefiner.data.phantom import make_phantom

T = TypeVar("T")
HEADER = ("images", "pairs", "near-duplicates s", "groups s", "folds s", "proof s", "memory MB")


def thumbnails(count: int) -> UInt8[np.ndarray, "N 64 64"]:
    base = np.stack([make_phantom(number, seed=0, size=64)[0] for number in range(min(count, 200))])
    found = np.empty((count, 64, 64), np.uint8)
    rng = np.random.default_rng(0)
    for number in range(count):
        if number % 50 == 49:
            found[number] = np.clip(found[number - 1] * 1.1 + 5, 0, 255)
        else:
            rough = cv2.resize(rng.normal(0, 60, (8, 8)).astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
            found[number] = np.clip(base[number % len(base)] + rough, 0, 255)
    return found


def measure(count: int) -> None:
    """Prints one row of the table."""
    pictures = thumbnails(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = [Case(str(i), "d", patient=str(i // 2), label=("benign", "malignant")[i % 3 == 0]) for i in range(count)]
    entries = tuple(Entry("d", case.id, case.id, (), 64, 64, 100 + int(case.id) % 900, "") for case in cases)
    index = Index("", entries, pictures)
    seconds: list[float] = []

    def timed(what: Callable[[], T]) -> T:
        start = time.process_time()
        result = what()
        seconds.append(time.process_time() - start)
        return result

    pairs = timed(lambda: near_duplicates(pictures))
    groups = timed(lambda: group_cases(cases, index))
    shares = [entry.lesion_share for entry in entries]
    split = timed(lambda: make_split(cases, 0, 5, groups=groups, lesion_shares=shares))
    assert not timed(lambda: leaks(split, cases, index))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(count, len(pairs), *(f"{value:.1f}" for value in seconds), f"{more:.0f}", sep="\t", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of images")
    parser.add_argument("--one", action="store_true", help="measure the first of them in this process")
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.counts[0])
        return
    print(*HEADER, sep="\t", flush=True)
    for count in arguments.counts:
        subprocess.run([sys.executable, __file__, "--one", "--counts", str(count)], check=True)


if __name__ == "__main__":
    main()
