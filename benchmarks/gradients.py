"""The `frozen` gradient mode against `exact`: how alike are the gradients, and what does each cost?

    python benchmarks/gradients.py --data-root ~/BUSBRA [--cases 24] [roi=off ...]
    python benchmarks/gradients.py --data-root ~/BUSBRA model=base model.sam.checkpoint=sam_vit_b_01ec64.pth
    python benchmarks/gradients.py --data-root ~/BUSBRA --cost --cases 1 model=base +model.sam.random_init=true

For training patients of BUS-BRA with a simulated coarse mask each, the refined loss of Phase 3 (BCE + Dice) is
differentiated with respect to the coarse logits, through the refiner as model=lite configures it. Each mode runs in a
process of its own, so its peak memory is its own. And since an exact slope may hold over a tiny step only, each
gradient is followed downhill for `STEPS`, and the change of the loss noted. Times are processor seconds, which a busy
machine spoils least. `--cost` measures time and memory alone, as for random weights. Prints Markdown.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from real_cases import Example, examples
from torch import Tensor

from ultrarefiner import cli, config
from ultrarefiner.models.cascade import Cascade
from ultrarefiner.phases import losses
from ultrarefiner.runs.build import build_refiner

MODES = {
    "exact": ["model.gradient=exact"],
    "exact, checkpointing": ["model.gradient=exact", "model.checkpointing=true"],
    "frozen": ["model.gradient=frozen"],
}


STEPS = (0.2, 2.0, 20.0)
"""Euclidean length over the coarse logits; 20 is 0.09 for each of the 224² pixels, were it spread evenly."""


def memory() -> float:
    """The most that this process has held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In one mode: the gradient of each case, processor seconds forward and backward, GB before and at the peak."""
    config.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("train", ["model=lite", *options.overrides, *MODES[options.mode]])
    refiner, gate = build_refiner(cfg, None)
    cascade = Cascade(None, refiner, gate).train()
    gradients, forward, backward, changes = [], [], [], []

    def refined_loss(case: Example, logit: Tensor) -> Tensor:
        logits = cascade.refine(case.image, logit, aspect=case.aspect).logits
        return losses.bce(logits, case.mask) + losses.soft_dice_loss(logits.sigmoid(), case.mask)

    cases = examples(options.data_root, options.cases)
    before = memory()
    for case in cases:
        logit = torch.logit(case.coarse, 1e-4).requires_grad_()
        began = time.process_time()
        loss = refined_loss(case, logit)
        between = time.process_time()
        loss.backward()
        ended = time.process_time()
        assert logit.grad is not None
        gradients.append(logit.grad.flatten())
        forward.append(between - began)
        backward.append(ended - between)
        cascade.zero_grad()
        if options.cost or options.mode == "exact, checkpointing":  # the latter's gradient is that of exact
            continue
        with torch.no_grad():
            downhill = -logit.grad / logit.grad.norm()
            changes.append([float(refined_loss(case, logit + step * downhill) - loss) for step in STEPS])
    return {
        "gradients": torch.stack(gradients),
        "forward": statistics.median(forward),
        "backward": statistics.median(backward),
        "changes": torch.tensor(changes),
        "before": before,
        "peak": memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--cost", action="store_true", help="time and memory alone")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # of a process of this script's own
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for ultrarefiner.train")
    options = parser.parse_args()
    if options.mode:
        torch.save(measure(options), options.result)
        return
    found = {}
    with tempfile.TemporaryDirectory() as room:
        for mode in MODES:
            result = Path(room) / "result.pt"
            subprocess.run([sys.executable, *sys.argv, "--mode", mode, "--result", str(result)], check=True)
            found[mode] = torch.load(result, weights_only=True)
    print(f"{options.cases} patients, {torch.get_num_threads()} threads\n")
    print("| mode | forward, CPU s | backward, CPU s | peak memory (before), GB |")
    print("|---|---|---|---|")
    for mode, result in found.items():
        memories = f"{result['peak']:.2f} ({result['before']:.2f})"
        print(f"| {mode} | {result['forward']:.2f} | {result['backward']:.2f} | {memories} |")
    if not options.cost:
        compare(found["exact"], found["frozen"])


def compare(exact: dict[str, Any], frozen: dict[str, Any]) -> None:
    """Print how alike the gradients of both modes are, and what following each is worth."""
    cosine = F.cosine_similarity(frozen["gradients"], exact["gradients"])
    ratio = frozen["gradients"].norm(dim=1) / exact["gradients"].norm(dim=1)
    quartiles = ", ".join(f"{value:.2f}" for value in cosine.quantile(torch.linspace(0, 1, 5)))
    print(f"\ncosine {cosine.mean():.3f} ± {cosine.std():.3f} (least, quartiles, most: {quartiles})")
    print(f"norm of frozen / norm of exact {ratio.mean():.2f} ± {ratio.std():.2f}")
    print("\n| step | loss, exact | falls in | loss, frozen | falls in | frozen − exact, standard error |")
    print("|---|---|---|---|---|---|")
    for step, one, other in zip(STEPS, exact["changes"].T, frozen["changes"].T, strict=True):
        more = other - one
        print(
            f"| {step:g} | {one.mean():+.5f} | {(one < 0).sum()} | {other.mean():+.5f} | {(other < 0).sum()} | "
            f"{more.mean():+.5f} ± {more.std() / len(more) ** 0.5:.5f} |"
        )


if __name__ == "__main__":
    main()
