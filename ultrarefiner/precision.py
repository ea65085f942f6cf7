"""The number format that networks compute in: one choice for training, prediction and measurement.

Weights stay in float32. "bf16-mixed" and "16-mixed" run the large products in 16 bits; moments, boxes and losses stay
in float32 (`refine.moments.full_precision`).
"""

import timeit
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch

AUTO, FULL, HALF = "auto", "32-true", "bf16-mixed"
_MIXED = {HALF: torch.bfloat16, "16-mixed": torch.float16}
PAYS_FROM = 256
"""Side of SAM's frame, px, from which on 16 bits save more than converting costs on a processor."""


def fastest(device: str, frame: int) -> str:
    """What `auto` stands for.

    Args:
        device: its kind: cpu, cuda, mps, …
        frame: side of the frame that a refiner takes, px; 0 where there is none. A coarse network alone stays in
            float32 on a processor: EfficientNet's gains nothing; for a TransUNet ask for `bf16-mixed`.
    """
    if device == "cuda":
        return HALF if torch.cuda.is_bf16_supported(including_emulation=False) else FULL
    return HALF if device == "cpu" and frame >= PAYS_FROM and _processor_has_bfloat16() else FULL


def computing(precision: str, device: str) -> AbstractContextManager[object]:
    """Where networks compute in a precision, on a kind of device."""
    dtype = _MIXED.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@cache
def _processor_has_bfloat16() -> bool:
    """Whether a product in bfloat16 takes at most 0.75 of float32's time.

    Measured, since a processor without it computes the same several hundred times slower, and flags have other names on
    each. Takes some milliseconds, there about half a second.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other programs run, and would blur the comparison
    try:
        single = torch.ones(256, 256)
        products = [partial(torch.mm, x, x) for x in (single, single.bfloat16())]
        full, half = (min(timeit.repeat(product, number=1, repeat=4)) for product in products)
        return half <= 0.75 * full
    finally:
        torch.set_num_threads(threads)
