"""Time and memory of one image through every network that `model/coarse` and `model/sam` offer, for docs/models.md.

    python benchmarks/networks.py [NAME ...] [--repeats 3]

Each network is measured in a process of its own, one after the other, on one thread, float32, without gradient, with
random weights: they do not change what it costs. Prints a Markdown table: parameters, the best processor time, and the
most memory that the process ever held, in brackets what it held before the first image.
"""

import argparse
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from hydra.utils import instantiate
from measure import configuration, timed
from page import table

from ultrarefiner.cli import CONF
from ultrarefiner.models.sam import load_sam

UNTRAINED = {"lite": {"pretrained": False}, "smp": {"encoder_weights": None}}
"""What leaves weights at random where a network would start from published ones."""


def options(group: str) -> list[str]:
    """What a group offers."""
    return sorted(path.stem for path in (CONF / "model" / group).glob("*.yaml"))


def measure(group: str, name: str, repeats: int) -> list[str]:
    """A row of the table, for a process of its own."""
    torch.set_num_threads(1)
    cfg = configuration(f"model/{group}={name}")
    if group == "coarse":
        network = instantiate(cfg.model.coarse, **UNTRAINED.get(name, {}))
        image = torch.rand(1, 3, cfg.model.coarse_size, cfg.model.coarse_size)
        run = network.eval()
    else:
        network = load_sam(cfg.model.sam.family, random_init=True).eval()
        image = torch.rand(1, 3, network.image_size, network.image_size)
        run = network.encode
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with torch.no_grad():
        seconds = min(timed(lambda: run(image))[1] for _ in range(repeats))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    million = sum(one.numel() for one in network.parameters()) / 1e6
    return [f"`{name}`", f"{million:.1f} M", f"{seconds:.2f}", f"{most:.2f} ({before:.2f})"]


def main() -> None:
    """Print a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for group in ("coarse", "sam"):
        rows = []
        for name in options(group):
            if name == "files" or (args.names and name not in args.names):
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                rows.append(alone.submit(measure, group, name, args.repeats).result())
            print(" ".join(rows[-1]), flush=True)
        print(f"\n{table([f'`model/{group}=`', 'parameters', 'processor seconds', 'memory, GB'], rows)}\n")


if __name__ == "__main__":
    main()
