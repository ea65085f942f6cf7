"""Phase 2 with model=lite: samples a second where masks share a crop or embeddings are kept, and what loading costs.

    python benchmarks/performance.py masks_per_image embeddings loader

Whole training steps as configured, on phantoms of 512 px through the real data loader: load, simulate, encode, decode,
loss, backward, clip, update.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_class
from measure import Repeat, configuration
from torch import nn

from ultrarefiner.phases.phase import Phase
from ultrarefiner.precision import computing
from ultrarefiner.runs.assemble import build_data, build_phase
from ultrarefiner.runs.callbacks import keep_pages


class Training:
    """The steps of a phase, without Lightning's loop around them.

    Args:
        overrides: of the configuration.
        root: the output_root, where decoded images and embeddings are kept.
    """

    def __init__(self, overrides: list[str], root: str) -> None:
        keep_pages()  # as `training.run` does
        cfg = configuration(*overrides, f"output_root={root}")
        kind: type[Phase] = get_class(cfg.phase._target_)
        self.data = build_data(cfg, kind)
        self.data.prepare_data()
        self.phase = build_phase(cfg, kind, {}).train()
        self.optimizer = self.phase.optimizer(self.phase.groups())
        self.loader = self.data.train_dataloader()
        self.epoch = 0
        self.batches: Iterator[dict[str, Any]] = iter(())

    def load(self) -> dict[str, Any]:
        """The next batch, of the next epoch where one is at its end."""
        batch = next(self.batches, None)
        if batch is None:
            self.loader.sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
            self.batches = iter(self.loader)
            self.epoch += 1
            batch = next(self.batches)
        return batch

    def step(self) -> dict[str, float]:
        """One step: how many samples (masks) it had, and the seconds that loading took."""
        start = time.perf_counter()
        batch = self.load()
        loading = time.perf_counter() - start
        self.optimizer.zero_grad()
        with computing(self.phase.precision, "cpu"):  # auto computes in float32 here
            loss = self.phase.terms(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.phase.parameters(), 1.0)
        self.optimizer.step()
        samples = batch["prob"].shape[:2].numel() if "prob" in batch else len(batch["id"])
        return {"samples": samples, "loading": loading}

    def epoch_of_steps(self) -> dict[str, float]:
        """As many steps as an epoch has."""
        rows = [self.step() for _ in range(len(self.loader))]
        return {name: sum(row[name] for row in rows) for name in rows[0]}


def steps(overrides: list[str], root: str) -> Repeat:
    """A factory for `measure.Apart`: each repeat is a step."""
    return Training(overrides, root).step


def epochs(overrides: list[str], root: str) -> Repeat:
    """A factory for `measure.Apart`: each repeat is an epoch, after a step that is not counted and keeps nothing."""
    training = Training(overrides, root)
    sam = training.phase.cascade.refiner.sam  # type: ignore[union-attr]
    sam.embeddings, kept = None, sam.embeddings
    training.step()
    sam.embeddings, training.batches = kept, iter(())
    return training.epoch_of_steps


def shared_crop(masks: int) -> list[str]:
    """Phase 2 with ROI and several masks a crop."""
    return ["model=lite", "phase=sam", "roi=on", "dataset.reader.cases=60", f"phase.masks_per_image={masks}"]


def turns(*more: str) -> list[str]:
    """Phase 2 with ROI, eight masks a crop, and whole batches in each epoch."""
    return [*shared_crop(8), "dataset.limit.train=28", *more]


def full_frame(cached: bool, cases: int) -> list[str]:
    """Phase 2 on full frames, with and without embeddings that are kept."""
    common = ["model=lite", "phase=sam", "roi=off", "dataset.augment=null", f"dataset.reader.cases={cases}"]
    # Whole batches: the few images that an epoch leaves out would be new to the next one.
    common.append("dataset.limit.train=28")
    return [*common, f"phase.crops={1 if cached else 'null'}"]


def experiment(images: int, epochs: int) -> Repeat:
    """A factory: a whole run of Phase 2 with model=tiny, from phantoms to summary, on so many training images."""
    from ultrarefiner.runs.experiment import run

    options = [
        f"dataset.reader.cases={3 * images}",
        f"dataset.limit.train={images}",
        f"phase.epochs={epochs}",
        "trainer.progress_bar=false",
    ]

    def whole() -> None:
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
            run(configuration("phase=sam", f"output_root={root}", *options))

    return whole
