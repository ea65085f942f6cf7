"""One training step and one inference of model=base with ROI, against the naive order of operations.

    python benchmarks/performance.py step inference

"Naive" is what a direct reading of the method gives, on segment-anything's own modules: image and coarse mask are blown
up to 1024, the crop is taken there, moments come from 1024×1024 grids, each image is decoded by itself, all three masks
are resampled to 1024 before one is chosen, and paste and loss are computed at 1024. Its weights are frozen where ours
are; the coarse network is the same in both. Weights are random: they do not change what a step costs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from measure import Repeat, configuration
from torch import Tensor, nn

from ultrarefiner.data.images import mask_to_square, to_square
from ultrarefiner.data.phantom import make_phantom
from ultrarefiner.models.transunet import TransUNet
from ultrarefiner.phases.e2e import E2EPhase
from ultrarefiner.precision import FULL, computing
from ultrarefiner.runs.assemble import build_phase
from ultrarefiner.runs.callbacks import keep_pages

SIDE = 1024
OURS = {
    "frozen": ["model.gradient=frozen"],
    "exact": ["model.gradient=exact"],
    "exact, checkpointing": ["model.gradient=exact", "model.checkpointing=true"],
}


def batch_of(images: int, device: str = "cpu") -> dict[str, Tensor]:
    """Phantoms as Phase 3 meets them at model=base: frames of 512 px, coarse images of 224 px."""
    planes: dict[str, list] = {name: [] for name in ("image", "mask", "coarse_image", "coarse_mask")}
    for index in range(images):
        image, mask = make_phantom(index, seed=0)[:2]
        for prefix, size in (("", 512), ("coarse_", 224)):
            planes[f"{prefix}image"].append(torch.from_numpy(to_square(image, size).copy()).float()[None] / 255)
            planes[f"{prefix}mask"].append(torch.from_numpy(mask_to_square(mask, size)).float()[None])
    batch = {name: torch.stack(values) for name, values in planes.items()} | {"aspect": torch.ones(images)}
    return {name: value.to(device) for name, value in batch.items()}


def our_phase(gradient: list[str], device: str = "cpu", model: str = "base") -> E2EPhase:
    """Phase 3 as configured, with random weights."""
    cfg = configuration(f"model={model}", "roi=on", "phase=e2e", "+model.sam.random_init=true", *gradient)
    phase = build_phase(cfg, E2EPhase, {}).to(device)
    assert isinstance(phase, E2EPhase)
    return phase


def our_step(gradient: list[str], precision: str = FULL) -> Repeat:
    """A training step in one of the gradient modes."""
    keep_pages()
    phase, batch = our_phase(gradient).train(), batch_of(1)
    optimizer = phase.optimizer(phase.groups())

    def step() -> None:
        optimizer.zero_grad()
        with computing(precision, "cpu"):
            loss = phase.terms(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(phase.parameters(), 1.0)
        optimizer.step()

    return step


def our_inference(model: str = "base", precision: str = FULL) -> Repeat:
    """The final mask of one image, in its frame."""
    keep_pages()
    phase, batch = our_phase([], model=model).eval(), batch_of(1)

    @torch.inference_mode()
    def infer() -> None:
        with computing(precision, "cpu"):
            phase.masks(batch)

    return infer


def naive_step(kept: bool = False) -> Repeat:
    """The same step, the naive way; with `kept` the process keeps its memory as ours does (`callbacks.keep_pages`)."""
    if kept:
        keep_pages()
    naive, batch = Naive().train(), batch_of(1)
    moving = [p for p in naive.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        coarse, refined = naive(batch["coarse_image"])
        truth = F.interpolate(batch["coarse_mask"], (SIDE, SIDE))
        prob, foreground = refined.sigmoid(), torch.softmax(coarse, 1)[:, 1:]
        coarse_loss = F.cross_entropy(coarse, batch["coarse_mask"][:, 0].long()) + dice(
            foreground, batch["coarse_mask"]
        )
        loss = 0.4 * coarse_loss + 0.2 * (F.binary_cross_entropy(prob, truth) + dice(prob, truth))
        loss.backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()

    return step


def naive_inference(kept: bool = False) -> Repeat:
    """The same mask, the naive way, at 1024."""
    if kept:
        keep_pages()
    naive, batch = Naive().eval(), batch_of(1)

    @torch.no_grad()
    def infer() -> None:
        naive(batch["coarse_image"])

    return infer


def dice(prob: Tensor, truth: Tensor) -> Tensor:
    """The soft Dice loss over the batch."""
    return 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)


class Naive(nn.Module):
    """The cascade as a direct reading of the method has it; see above."""

    def __init__(self) -> None:
        super().__init__()
        from segment_anything import sam_model_registry

        self.coarse = TransUNet.from_name("R50-ViT-B_16")
        self.sam = sam_model_registry["vit_b"]()
        self.sam.image_encoder.requires_grad_(False)

    def forward(self, image: Float[Tensor, "B 1 224 224"]) -> tuple[Tensor, Tensor]:
        """Coarse logits (B,2,224,224) and refined logits (B,1,1024,1024)."""
        coarse = self.coarse(image)
        prob = resize(torch.softmax(coarse, 1)[:, 1:])
        large = (255 * resize(image.expand(-1, 3, -1, -1)) - self.sam.pixel_mean) / self.sam.pixel_std
        _, box = statistics_of(prob, 2.5 * 1.4)
        inside, mask = sample(large, box), sample(prob, box)
        embedding = self.sam.image_encoder(inside)
        centre, prompt_box = statistics_of(mask, 2.5)
        background, _ = statistics_of(1 - mask, 2.5)
        points = torch.stack([centre, background], 1) * SIDE
        labels = torch.tensor([[1, 0]], device=image.device)
        refined = []
        for i in range(len(image)):
            one = slice(i, i + 1)
            sparse, dense = self.sam.prompt_encoder(
                points=(points[one], labels),
                boxes=prompt_box[one] * SIDE,
                masks=F.interpolate((2 * mask[one] - 1) * 10, (256, 256), mode="bilinear", align_corners=False),
            )
            position = self.sam.prompt_encoder.get_dense_pe()
            masks, iou = self.sam.mask_decoder(embedding[one], position, sparse, dense, multimask_output=True)
            weights = torch.softmax(iou / 0.1, 1)[:, :, None, None]
            refined.append((weights * resize(masks)).sum(1, keepdim=True))
        size = box[:, 2:] - box[:, :2]
        back = torch.cat([-box[:, :2] / size, (1 - box[:, :2]) / size], 1)  # the frame, in the crop's coordinates
        return coarse, sample(torch.cat(refined), back)


def resize(x: Tensor) -> Tensor:
    """To 1024 × 1024."""
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)


def grids(x: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates (x, y) in [0, 1] of every pixel of 1024 × 1024."""
    along = (torch.arange(SIDE, device=x.device) + 0.5) / SIDE
    down, across = torch.meshgrid(along, along, indexing="ij")
    return across, down


def statistics_of(prob: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Centre (B,2), and box (B,4) of centre ± k·σ, from grids of the map's own size."""
    total = prob.sum((1, 2, 3)) + 1e-6
    centre = torch.stack([(prob * grid).sum((1, 2, 3)) / total for grid in grids(prob)], 1)
    variance = [
        (prob * (grid - c[:, None, None, None]) ** 2).sum((1, 2, 3)) / total
        for grid, c in zip(grids(prob), centre.unbind(1), strict=True)
    ]
    half = k * torch.stack(variance, 1).clamp(min=1e-6).sqrt()
    return centre, torch.cat([centre - half, centre + half], 1).clamp(0, 1)


def sample(x: Tensor, box: Tensor) -> Tensor:
    """What a box of the frame shows, at 1024 × 1024."""
    across, down = grids(x)
    x1, y1, x2, y2 = (side[:, None, None] for side in box.unbind(1))
    grid = torch.stack([x1 + across * (x2 - x1), y1 + down * (y2 - y1)], -1) * 2 - 1
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
