"""On a GPU: SAM's image encoder and a training step in bfloat16 at several batch sizes, against segment-anything.

python benchmarks/performance.py gpu
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Figures, matrix_rate
from sam_encoder import example, own_encoder, publishers_encoder
from steps import batch_of, our_phase
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (1, 4, 16)
DEVICE = "cuda"


def gpu(repeats: int) -> Figures:
    """Median seconds, peak GB, and share of the matrix product's rate, by what was run and batch size."""
    figures: Figures = {
        "device": torch.cuda.get_device_name(),
        "tflops": matrix_rate(device=DEVICE, dtype=torch.bfloat16) / 1e12,
        "rows": {},
    }
    for name, build in (("segment-anything", publishers_encoder), ("ours", own_encoder)):
        encoder = build("vit_b").to(DEVICE)
        for batch in BATCHES:
            image = example(encoder).to(DEVICE).expand(batch, -1, -1, -1)
            with FlopCounterMode(display=False) as counter:
                _forward(encoder, image)
            row = _measured(lambda encoder=encoder, image=image: _forward(encoder, image), 10 * repeats)
            row["share"] = counter.get_total_flops() / row["seconds"] / figures["tflops"] / 1e12
            figures["rows"][f"encoder, {name}, batch {batch}"] = row
        del encoder
    for gradient in ("frozen", "exact"):
        phase = our_phase([f"model.gradient={gradient}"], DEVICE).train()
        optimizer = phase.optimizer(phase.groups())
        for batch in BATCHES:
            cases = batch_of(batch, DEVICE)

            def step(phase: Any = phase, optimizer: Any = optimizer, cases: Any = cases) -> None:
                optimizer.zero_grad()
                with torch.autocast(DEVICE, dtype=torch.bfloat16):
                    loss = phase.terms(cases)["loss"]
                loss.backward()
                optimizer.step()

            figures["rows"][f"training step, {gradient}, batch {batch}"] = _measured(step, 10 * repeats)
        del phase, optimizer
    return figures


@torch.no_grad()
def _forward(encoder: torch.nn.Module, image: torch.Tensor) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        encoder(image)


def _measured(run: Callable[[], Any], repeats: int) -> Figures:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
