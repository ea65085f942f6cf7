"""All measurements of speed and memory, and docs/performance.md from them.

    python benchmarks/performance.py                 # everything: 20 minutes on two quiet cores, needs 12 GB
    python benchmarks/performance.py step inference  # some sections; the page keeps the other ones' last figures
    python benchmarks/performance.py --repeats 1     # a quick look, not a result: writes into build/performance/

Every section compares with a reference that is measured in the same run, in turn with ours, in processes of their own.
Figures are kept in docs/performance.json, section by section with the machine they were measured on.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import failures
import phase2
import sam_encoder
import steps
import torch
from gpu import gpu
from measure import Apart, Figures, in_turn, machine, summary
from page import page

from ultrarefiner.files import write_atomically
from ultrarefiner.precision import FULL, HALF, PAYS_FROM, fastest

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3
AMX = Path("/proc/cpuinfo").is_file() and "amx_bf16" in Path("/proc/cpuinfo").read_text()
"""Whether this processor multiplies matrices of 16 bits in a unit of its own."""
KINDS = {"bfloat16": False, "amx": True}
"""Sections of 16 bits: for processors without that unit and with it."""


def encoder(repeats: int) -> Figures:
    """SAM's and LiteMedSAM's image encoders against the publishers' own."""
    names = ["publisher", "publisher, memory kept", "ours", "ours, compiled"]
    return {family: sam_encoder.compare(family, names, False, repeats) for family in FAMILIES}


FAMILIES = ("vit_b", "litemedsam")


def step(repeats: int) -> Figures:
    """A training step of Phase 3."""
    ours = {name: (steps.our_step, mode) for name, mode in steps.OURS.items()}
    naive = {"naive": (steps.naive_step,), "naive, memory kept": (steps.naive_step, True)}
    return in_turn(naive | ours, repeats, alone=True)


def inference(repeats: int) -> Figures:
    """One image through both networks."""
    naive = {"naive": (steps.naive_inference,), "naive, memory kept": (steps.naive_inference, True)}
    return in_turn(naive | {"ours": (steps.our_inference,)}, repeats, warm=1)


def bfloat16(repeats: int) -> Figures:
    """Ours in 16 bits against ours in 32: each pair in turn."""
    made = {
        "encoder of vit_b": (sam_encoder.in_precision, "vit_b"),
        "encoder of litemedsam": (sam_encoder.in_precision, "litemedsam"),
        "training step, base, exact": (steps.our_step, steps.OURS["exact"]),
        "training step, base, frozen": (steps.our_step, steps.OURS["frozen"]),
        "inference, base": (steps.our_inference, "base"),
        "inference, lite": (steps.our_inference, "lite"),
    }
    return {name: in_turn({form: (*one, form) for form in (FULL, HALF)}, repeats, warm=1) for name, one in made.items()}


def masks_per_image(repeats: int) -> Figures:
    """Phase 2 with masks that share a crop."""
    with tempfile.TemporaryDirectory() as root:
        made = {f"K={k}": (phase2.steps, phase2.shared_crop(k), root) for k in (1, 8)}
        return in_turn(made, repeats, warm=1)


def crops(repeats: int) -> Figures:
    """Epochs of Phase 2 whose crops come again, after the first, against new crops in every epoch."""
    kinds = {"new crops": [], "crops=1": ["phase.crops=1"]}
    if fastest("cpu", PAYS_FROM) == HALF:
        kinds |= {f"{name}, bfloat16": [*more, f"trainer.precision={HALF}"] for name, more in list(kinds.items())}
    with tempfile.TemporaryDirectory() as root:
        made = {name: (phase2.epochs, phase2.turns(*more), root) for name, more in kinds.items()}
        return in_turn(made, repeats, warm=1)


def embeddings(repeats: int, cases: int = 48) -> Figures:
    """Phase 2 with embeddings that are kept: each repeat begins with an empty cache."""
    rows: dict[str, list] = {"first": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as root:
            process = Apart(phase2.epochs, phase2.full_frame(True, cases), root)
            for epoch, found in rows.items():
                found.append(process())
                print(f"  {epoch} epoch: {found[-1]['seconds']:.2f} s", flush=True)
            process.close()
    with tempfile.TemporaryDirectory() as root:
        plain = in_turn({"plain": (phase2.epochs, phase2.full_frame(False, cases), root)}, 1)
    return {epoch: summary(found) for epoch, found in rows.items()} | plain


def simulation(repeats: int) -> Figures:
    """Simulated masks a second on one core."""
    return failures.measure(failures.phantom_masks(300), max(1000 * repeats, 1000))


def scaling(repeats: int) -> Figures:
    """Whole runs of growing numbers of images and of epochs, each in a process of its own."""
    found: dict[str, list] = {}
    for _ in range(repeats):
        for images, epochs in ((32, 4), (64, 4), (128, 4), (32, 8), (32, 16)):
            process = Apart(phase2.experiment, images, epochs)
            found.setdefault(f"{images} images, {epochs} epochs", []).append(process())
            print(f"  {images} images, {epochs} epochs", flush=True)
            process.close()
    return {name: summary(rows) for name, rows in found.items()}


def loader(repeats: int) -> Figures:
    """What part of a step waits for data, without workers."""
    with tempfile.TemporaryDirectory() as root:
        kinds = {
            "Phase 1": ["model=lite", "phase=coarse", "dataset.reader.cases=100"],
            "Phase 2": phase2.shared_crop(1),
            "Phase 2, 8 masks an image": phase2.shared_crop(8),
            "Phase 2, roi=off": phase2.full_frame(False, 60),
        }
        return in_turn({name: (phase2.steps, overrides, root) for name, overrides in kinds.items()}, repeats, warm=1)


SECTIONS: dict[str, Callable[[int], Figures]] = {
    "encoder": encoder,
    "step": step,
    "inference": inference,
    "bfloat16": bfloat16,
    "amx": bfloat16,
    "masks_per_image": masks_per_image,
    "crops": crops,
    "embeddings": embeddings,
    "simulation": simulation,
    "scaling": scaling,
    "loader": loader,
    "gpu": gpu,
}


def main() -> None:
    """Measure, keep the figures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, help="folder of performance.json and performance.md")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page again")
    options = parser.parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]}; choose from {', '.join(SECTIONS)}")
    folder = options.out or ROOT / ("docs" if options.repeats >= REPEATS else "build/performance")
    kept = folder / "performance.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in [] if options.page else options.sections or SECTIONS:
        if name == "gpu" and not torch.cuda.is_available():
            continue
        if name in KINDS and (KINDS[name] != AMX or fastest("cpu", PAYS_FROM) != HALF):
            print(f"{name}: this processor is of another kind")
            continue
        print(name, flush=True)
        began = time.perf_counter()
        about = machine()
        figures = SECTIONS[name](options.repeats)
        about |= {"repeats": options.repeats, "minutes": (time.perf_counter() - began) / 60}
        found[name] = {"machine": about, "figures": figures}
        write_atomically(kept, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(folder / "performance.md", page(found).encode())
    print(folder / "performance.md")


if __name__ == "__main__":
    main()
