"""One coarse network that imitates the mean of several: a phase of its own, kept outside the package.

    PYTHONPATH=benchmarks/distillation python -m ultrarefiner.train --config-dir benchmarks/distillation \
        phase=distilled 'phase.teachers=[RUN,RUN]' model=lite dataset=busbra data_root=~/BUSBRA

(Hinton, Vinyals and Dean 2015; that teacher and student see the same changed image: Beyer et al. 2022.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultrarefiner.models.cascade import Cascade, lesion_logit
from ultrarefiner.phases import losses
from ultrarefiner.phases.coarse import CoarsePhase, coarse_terms
from ultrarefiner.segmenter import Segmenter


class DistilledPhase(CoarsePhase):
    """Phase 1 with a second target beside the label: the mean of the logits of trained coarse networks.

    Args:
        teachers: runs or checkpoints, whose coarse networks saw the same training patients.
        share: of their target in the loss; the rest is Phase 1's.
        mixed: share of the steps in which each image gets a rectangle of another one (CutMix, Yun et al. 2019): on
            images that they were trained on, teachers say little more than the label does.
    """

    def __init__(self, cascade: Cascade, *, teachers: Sequence[str], share: float, mixed: float, **known: Any) -> None:
        super().__init__(cascade, **known)
        loaded = [Segmenter.load(path, "cpu") for path in teachers]
        # A tuple, which torch does not look into: the teachers are no part of the checkpoint.
        self.teachers = tuple((one.cascade.coarse.requires_grad_(False), one.coarse_size) for one in loaded)
        self.share, self.mixed = share, mixed

    def terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Phase 1's terms, and the cross-entropy with the teachers' mean."""
        image, mask = batch["coarse_image"], batch["coarse_mask"]
        if float(torch.rand(())) < self.mixed:
            image, mask = cut_and_mix(image, mask)
        logits = self.cascade.coarse(image)
        terms = coarse_terms(logits, mask, self.ce_weight, self.dice_weight)
        taught = losses.bce(lesion_logit(logits), self.taught(image))
        loss = (1 - self.share) * terms["loss"] + self.share * taught
        return {**terms, "loss": loss, "taught": taught}

    @torch.no_grad()
    def taught(self, image: Tensor) -> Tensor:
        """The mean of the teachers' logits as a probability (B,1,C,C)."""
        size = image.shape[-2:]
        drawn = []
        for network, own in self.teachers:
            seen = F.interpolate(image, size=(own, own), mode="bilinear", align_corners=False)
            logit = lesion_logit(network.to(image.device)(seen))
            drawn.append(F.interpolate(logit, size=size, mode="bilinear", align_corners=False))
        return torch.stack(drawn).clamp(-14, 14).mean(0).sigmoid()


def cut_and_mix(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each image and its mask with a rectangle of the next one's, the same place for the whole batch."""
    side = image.shape[-1]
    width, height = (int(side * (0.3 + 0.4 * float(torch.rand(())))) for _ in range(2))
    left, top = (int(torch.randint(side - extent + 1, ())) for extent in (width, height))
    image, mask = image.clone(), mask.clone()
    for changed in (image, mask):
        place = changed[..., top : top + height, left : left + width]
        place.copy_(place.roll(1, 0))
    return image, mask
