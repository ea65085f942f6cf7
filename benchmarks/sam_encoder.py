"""SAM's image encoders: ours against the publishers' own, on the same weights, in turn, in one run.

    python benchmarks/sam_encoder.py [--family vit_b] [--repeats 3] [--exact]

Prints for each: median seconds of wall and processor time with their ratios to the publisher's, arithmetic as a share
of what a plain matrix product reaches here, the largest difference relative to the largest value, and the peak memory
of a call (in a process of its own). `--exact` adds the forward and backward pass to the image's gradient, which the
publisher's ViT needs 10 GB for: it is then measured for ours alone, with and without activation checkpointing.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measure import Repeat, in_turn, matrix_rate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ultrarefiner.models.sam import load_sam
from ultrarefiner.precision import computing
from ultrarefiner.runs.callbacks import keep_pages


def own_encoder(family: str, checkpointing: bool = False) -> nn.Module:
    """Ours, frozen; random weights but for litemedsam, whose real ones are at hand."""
    return load_sam(family, random_init=family != "litemedsam", checkpointing=checkpointing).image_encoder


def publishers_encoder(family: str) -> nn.Module:
    """The publisher's, with the same weights."""
    if family == "litemedsam":
        from ultrarefiner.models.sam_lite import lite_model

        reference = lite_model().image_encoder
    else:
        from segment_anything import sam_model_registry

        reference = sam_model_registry["vit_b" if family == "medsam" else family]().image_encoder
    reference.load_state_dict(own_encoder(family).state_dict())
    return reference.eval().requires_grad_(False)


def kept(build: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
    """The same in a process that keeps its memory, as `training.run` has it on a CPU."""

    def keeping(family: str) -> nn.Module:
        keep_pages()
        return build(family)

    return keeping


def compiled(family: str) -> nn.Module:
    """Ours as `trainer.compile=true` has it, compiled before anything is measured."""
    encoder = own_encoder(family)
    encoder.compile()
    call(encoder, example(encoder), exact=False)
    return encoder


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "publisher": publishers_encoder,
    "publisher, memory kept": kept(publishers_encoder),
    "ours": kept(own_encoder),
    "ours, compiled": kept(compiled),
    "ours, checkpointing": kept(lambda family: own_encoder(family, checkpointing=True)),
}


def call(encoder: nn.Module, image: Tensor, exact: bool) -> Tensor:
    """One forward pass, or one forward and backward pass."""
    if not exact:
        with torch.no_grad():
            return encoder(image)
    image = image.clone().requires_grad_()
    encoder(image).sum().backward()
    assert image.grad is not None
    return image.grad


def example(encoder: nn.Module) -> Tensor:
    """A normalised image of the encoder's size."""
    size = encoder.img_size
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def peak_memory(name: str, family: str, exact: bool) -> float:
    """GB that a call adds at its peak to what the process held before it; run in a process of its own, on Linux."""
    encoder = BUILDERS[name](family)
    image = example(encoder)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _kilobytes("VmRSS")
    call(encoder, image, exact)
    return (_kilobytes("VmHWM") - before) / 2**20


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field))


def calls(name: str, family: str, exact: bool) -> Repeat:
    """A factory for `measure.Apart`: each repeat is a call."""
    encoder = BUILDERS[name](family)
    image = example(encoder)

    def once() -> None:
        call(encoder, image, exact)

    return once


def in_precision(family: str, precision: str) -> Repeat:
    """Ours, without gradients, in a precision."""
    encoder = kept(own_encoder)(family)
    image = example(encoder)

    @torch.inference_mode()
    def once() -> None:
        with computing(precision, "cpu"):
            encoder(image)

    return once


def compare(family: str, names: list[str], exact: bool, repeats: int) -> dict[str, dict[str, float]]:
    """Measure in turn, so that whatever else the machine does falls on all alike; print one line for each.

    Returns:
        By name: "seconds" and "processor" (medians), "share" of the matrix product's rate (forward only), "difference"
        to the first relative to its largest value, and "added_gb", the peak memory of a call.
    """
    print(f"\n{family}, {'forward and backward to the image' if exact else 'forward'}, {repeats} repeats")
    rate = matrix_rate()
    print(f"  {torch.get_num_threads()} threads, whose matrix product reaches {rate / 1e9:.0f} GFLOP/s")
    measured = in_turn({name: (calls, name, family, exact) for name in names}, repeats, warm=1)
    # In processes of their own: building some of them changes how a process keeps its memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        results = {name: processes.submit(result, name, family, exact).result() for name in names}
        memory = {name: processes.submit(peak_memory, name, family, exact).result() for name in names}
    first, flops = results[names[0]]
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        found = {key: measured[name][key] for key in ("seconds", "processor")}
        found["difference"] = float(np.abs(results[name][0] - first).max() / np.abs(first).max())
        found["added_gb"] = memory[name]
        if not exact:
            found["share"] = flops / found["seconds"] / rate
        ratio = found["seconds"] / measured[names[0]]["seconds"]
        share = f"  {found['share']:.2f} of the matrix product's rate" if not exact else ""
        print(
            f"  {name:22} {found['seconds']:7.2f} s ({ratio:.3f}){share}  difference {found['difference']:.1e}  "
            f"peak memory +{memory[name]:.2f} GB",
            flush=True,
        )
        figures[name] = found
    return figures


def result(name: str, family: str, exact: bool) -> tuple[np.ndarray, int]:
    """What a call gives, and the floating-point operations it takes."""
    encoder = BUILDERS[name](family)
    with FlopCounterMode(display=False) as counter:
        given = call(encoder, example(encoder), exact)
    return given.numpy(), counter.get_total_flops()


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="vit_b", choices=["vit_b", "vit_l", "vit_h", "medsam", "litemedsam"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    compare(options.family, ["publisher", "publisher, memory kept", "ours"], False, options.repeats)
    if options.exact:
        names = ["ours", "ours, checkpointing"]
        compare(
            options.family, ["publisher", *names] if options.family == "litemedsam" else names, True, options.repeats
        )


if __name__ == "__main__":
    main()
