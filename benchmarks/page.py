"""docs/performance.md from the figures of benchmarks/performance.py."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from measure import Figures

INTRODUCTION = """# How fast, and in how much memory

Written by `make bench` (`python benchmarks/performance.py`); each section says where it was measured. Everything is
float32 on the CPU unless said. Seconds are medians of the repeats. What is compared runs in turn in the same session,
each in a process of its own after a call that does not count, and peak memory is the most that its process ever held
(for the encoders: what a call added). Weights are random where none come with the installation: they do not change what
a step costs. That each faster path computes the same is tested: `tests/models/test_sam.py`,
`tests/refine/test_refine.py`, `tests/runs/test_shared_crop.py`, `tests/models/test_embedding_cache.py`.

"Memory kept": by default the C library gives large blocks back to the system, and each new one comes as pages that must
be cleared first, which costs more the more memory a program moves. A training on a CPU keeps its memory instead
(`ultrarefiner/runs/callbacks.py`), and so do all rows of ours. The references are measured as their users run them, and
once more with their memory kept: what is left then is the difference in arithmetic and in the order of operations.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def means(rows: list[dict[str, Any]]) -> str:
    """Dice and HD95 of each kind of mask over cases, whose columns are KIND_dice and KIND_hd95."""
    kinds = [name.removesuffix("_dice") for name in rows[0] if name.endswith("_dice")]
    found = [
        [kind, *(f"{fmean(row[f'{kind}_{what}'] for row in rows):.4f}" for what in ("dice", "hd95"))] for kind in kinds
    ]
    return table(["masks", "Dice", "HD95 (px)"], found)


def within(value: float, goal: float) -> str:
    """A ratio beside the most that it should be."""
    return f"{value:.2f} ({'goal' if value <= goal else 'misses its goal of'} ≤ {goal:g})"


def encoder(figures: Figures) -> str:
    """Both families' encoders."""
    rows = []
    for family, found in figures.items():
        for name, row in found.items():
            ratio = row["seconds"] / found["publisher"]["seconds"]
            rows.append(
                [
                    family,
                    name,
                    f"{row['seconds']:.2f}",
                    within(ratio, 0.52) if (family, name) == ("vit_b", "ours") else f"{ratio:.2f}",
                    f"{row['processor']:.2f}",
                    f"{row['share']:.2f}",
                    f"{row['difference']:.0e}" if name != "publisher" else "",
                    f"{row['added_gb']:.2f}",
                ]
            )
    header = ["encoder", "", "s", "ratio", "processor s", "share of the matrix product's rate", "difference", "+GB"]
    bound = figures["vit_b"]["publisher"]["share"]
    return table(header, rows) + (
        f"\n\nAt the rate of a plain matrix product ViT-B's arithmetic alone would take {bound:.2f} of "
        "segment-anything's time as it is: the bound of that ratio. `compiled`: `trainer.compile=true`, "
        "which takes about a minute before the first step."
    )


def step(figures: Figures) -> str:
    """The modes of the training step."""
    goals = {"frozen": (0.42, 3.5), "exact": (0.75, None), "exact, checkpointing": (None, 4.5)}
    return _against(figures, "naive", goals)


def inference(figures: Figures) -> str:
    """One image."""
    return _against(figures, "naive", {"ours": (0.65, 2.5)})


def bfloat16(figures: Figures) -> str:
    """Sixteen bits against 32."""
    goals = {"encoder of vit_b": 0.5, "encoder of litemedsam": 0.42, "inference, lite": 0.5, "inference, base": 0.55}
    rows = []
    for name, found in figures.items():
        full, half = found["32-true"], found["bf16-mixed"]
        ratios = [half[clock] / full[clock] for clock in ("seconds", "processor")]
        memory = [f"{row['peak_gb']:.2f}" for row in (full, half)]
        seconds = [f"{row['seconds']:.2f}" for row in (full, half)]
        rows.append([name, *seconds, within(ratios[0], goals.get(name, 0.6)), f"{ratios[1]:.2f}", *memory])
    return table(["", "s, float32", "s, bfloat16", "ratio", "of processor s", "peak GB, float32", "bfloat16"], rows)


def _against(figures: Figures, reference: str, goals: dict[str, tuple[float | None, float | None]]) -> str:
    rows = []
    for name, row in figures.items():
        time_goal, memory_goal = goals.get(name, (None, None))
        ratio = row["seconds"] / figures[reference]["seconds"]
        rows.append(
            [
                name,
                f"{row['seconds']:.1f}",
                within(ratio, time_goal) if time_goal else f"{ratio:.2f}",
                f"{row['processor']:.1f}",
                within(row["peak_gb"], memory_goal) if memory_goal else f"{row['peak_gb']:.2f}",
            ]
        )
    return table(["", "s", "ratio", "processor s", "peak GB"], rows)


def _rates(figures: Figures, reference: str, goal: float, judged: str) -> str:
    base = figures[reference]["samples"] / figures[reference]["seconds"]
    rows = []
    for name, row in figures.items():
        rate = row["samples"] / row["seconds"]
        verdict = f"{rate / base:.1f} times"
        if name == judged:
            verdict += f" ({'goal' if rate / base >= goal else 'misses its goal of'} ≥ {goal:g})"
        rows.append([name, f"{rate:.2f}", verdict, f"{row['peak_gb']:.2f}"])
    return table(["", "samples/s", f"against {reference}", "peak GB"], rows)


def masks_per_image(figures: Figures) -> str:
    """K = 8 against K = 1."""
    return _rates(figures, "K=1", 4, "K=8")


def crops(figures: Figures) -> str:
    """Crops that come again against new ones."""
    return _rates(figures, "new crops", 2.5, "crops=1, bfloat16" if "crops=1, bfloat16" in figures else "crops=1")


def embeddings(figures: Figures) -> str:
    """The second epoch against the first."""
    return _rates(figures, "first", 6, "second") + "\n\n`plain`: an epoch without the cache, which encodes in batches."


def simulation(figures: Figures) -> str:
    """Masks a second."""
    rate = figures["masks_per_second"]
    verdict = "goal" if rate >= 400 else "misses its goal of"
    best = f"best chunk of 100: {figures['best']:.0f}"
    return f"{rate:.0f} simulated masks of 224×224 px a second on one core ({verdict} ≥ 400; {best})."


def scaling(figures: Figures) -> str:
    """Time and memory over images and epochs."""
    first = next(iter(figures.values()))
    rows = []
    for name, row in figures.items():
        ratios = [f"{row[clock]:.1f} ({row[clock] / first[clock]:.2f})" for clock in ("seconds", "processor")]
        rows.append([name, *ratios, f"{row['peak_gb']:.2f}"])
    return table(["", "s (against the first)", "processor s (against the first)", "peak GB"], rows)


def loader(figures: Figures) -> str:
    """The loader's share of a step."""
    rows = [
        [
            name,
            f"{row['seconds']:.2f}",
            f"{1000 * row['loading']:.0f}",
            f"{100 * row['loading'] / row['seconds']:.1f} %",
        ]
        for name, row in figures.items()
    ]
    return table(["step", "s", "of it loading, ms", "share"], rows)


def gpu(figures: Figures) -> str:
    """The encoder and the step in bfloat16."""
    rows = []
    for name, row in figures["rows"].items():
        other = figures["rows"].get(name.replace("ours", "segment-anything"))
        ratio = f"{row['seconds'] / other['seconds']:.2f}" if other and other is not row else ""
        share = f"{row['share']:.2f}" if "share" in row else ""
        rows.append([name, f"{1000 * row['seconds']:.1f}", ratio, share, f"{row['peak_gb']:.2f}"])
    header = ["", "ms", "against segment-anything", "share of the matrix product's rate", "peak GB"]
    return (
        f"{figures['device']}, whose matrix product reaches {figures['tflops']:.0f} TFLOP/s in bfloat16.\n\n"
        + table(header, rows)
    )


SECTIONS: dict[str, tuple[str, str, Callable[[Figures], str]]] = {
    "encoder": ("Image encoder", "One normalised image, no gradient, against the publisher's own code.", encoder),
    "step": (
        "End-to-end training step",
        "Phase 3, model=base, roi=on, batch 1, against the naive order of operations on segment-anything's own modules "
        "(`benchmarks/steps.py`): everything at 1024 px, all three masks resampled, the encoder's weights frozen too.",
        step,
    ),
    "inference": ("Inference", "model=base, roi=on, one image, both networks; the same reference.", inference),
    "bfloat16": (
        "bfloat16 on a processor that has it (AVX-512)",
        "`trainer.precision=bf16-mixed` against `32-true`, both ours, each pair in turn; roi=on, batch 1. `auto` takes "
        "it where a product of a probe is faster in it (`ultrarefiner/precision.py`).",
        bfloat16,
    ),
    "amx": (
        "bfloat16 on a processor with a unit for it (AMX)",
        "The same. A product of large matrices alone takes a fifth of float32's time there: what is left is everything "
        "else, attention in small windows, depthwise convolutions and the moving of data above all.",
        bfloat16,
    ),
    "masks_per_image": (
        "Several masks share a crop (`phase.masks_per_image`)",
        "Whole training steps of Phase 2, model=lite, roi=on, batch 4; a sample is a simulated mask.",
        masks_per_image,
    ),
    "crops": (
        "Crops that take turns (`phase.crops`)",
        "Epochs of Phase 2, model=lite, roi=on, batch 4, eight masks a crop, augmentation on; after the first epoch, "
        "which fills an empty cache. What the number of crops does to the result stands in "
        "[masks_and_crops.md](masks_and_crops.md).",
        crops,
    ),
    "embeddings": (
        "Whole frames that come again (`phase.crops=1 phase.augment=false roi=off`)",
        "Epochs of Phase 2, model=lite, roi=off, dataset.augment=null, batch 4; the first fills an empty cache, the "
        "second finds all its images in it.",
        embeddings,
    ),
    "simulation": ("Simulated coarse masks", "One thread.", simulation),
    "scaling": (
        "More images, more epochs",
        "Whole runs of Phase 2 with model=tiny, from drawing the phantoms to the summary. Each run also has a "
        "part that does not grow (pictures, tables), so four times the work takes a little less than four times as "
        "long.",
        scaling,
    ),
    "loader": ("Loading", "Whole steps, model=lite, phantoms of 512 px, no worker processes.", loader),
    "gpu": ("On a GPU", "bfloat16, SAM ViT-B at 1024 px, and the step of Phase 3 with model=base, roi=on.", gpu),
}


def page(found: dict[str, Figures]) -> str:
    """The whole page; a section that was not measured says so."""
    parts = [INTRODUCTION]
    for name, (title, about, write) in SECTIONS.items():
        parts.append(f"## {title}\n\n{about}\n")
        if name not in found:
            parts.append("Not measured.\n")
            continue
        m = found[name]["machine"]
        parts.append(write(found[name]["figures"]) + "\n")
        parts.append(
            f"*{m['cpu']}, {m['threads']} threads, whose matrix product reaches {m['gflops']:.0f} GFLOP/s; load "
            f"{m['load']:.1f} at the start; {m['repeats']} repeats; torch {m['torch']}.*\n"
        )
    return "\n".join(parts)
