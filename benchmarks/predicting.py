"""What share of `python -m ultrarefiner.predict` goes into the networks, and whether its memory grows with the images.

    python benchmarks/predicting.py --images ~/BUSBRA/Images [--count 150] [--checkpoint shipped] [--threads 2]

Does what the command does, with all its files, and prints the share of the time in the networks, on the wall and on the
processor, the seconds until the first mask without the start of Python, and the memory after every tenth of the images.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine, timed
from page import table
from real_cases import spread

from ultrarefiner.data.scans import find_scans
from ultrarefiner.results.prediction import Predictions, predict
from ultrarefiner.segmenter import Segmenter


class Clock:
    """Seconds on the wall and on the processor, of all calls of what it watches."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def watching(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time counts."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            wall, processor, found = timed(lambda: call(*args, **kwargs))
            self.wall += wall
            self.processor += processor
            return found

        return watched


def held() -> float:
    """MB of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--checkpoint", default="shipped")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    begun = time.perf_counter()
    segmenter = Segmenter.load(chosen.checkpoint, "cpu")
    networks, memory = Clock(), []
    cascade = segmenter.cascade
    assert cascade.coarse is not None and cascade.refiner is not None
    cascade.coarse.forward = networks.watching(cascade.coarse.forward)  # type: ignore[method-assign]
    cascade.refine = networks.watching(cascade.refine)  # type: ignore[method-assign]

    def step(frames: int) -> None:
        if frames:
            memory.append(held())
            if len(memory) == 1:
                print(f"the first mask after {time.perf_counter() - begun:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as output:
        scans = spread(find_scans(chosen.images, Path(output)).scans, chosen.count)
        results = Predictions(Path(output), {})
        wall, processor, problems = timed(lambda: predict(segmenter.batch, scans, results, 1, step=step))
    print(machine())
    print(f"{len(memory)} images, {len(problems)} problems, {wall / len(memory):.2f} s an image\n")
    shares = [f"{100 * part / whole:.1f} %" for part, whole in ((networks.wall, wall), (networks.processor, processor))]
    print(table(["in the networks", ""], [["of the time on the wall", shares[0]], ["of the processor's", shares[1]]]))
    tenths = range(0, len(memory), max(len(memory) // 10, 1))
    print("\nMB held after image " + ", ".join(f"{number + 1}: {memory[number]:.0f}" for number in tenths))


if __name__ == "__main__":
    main()
