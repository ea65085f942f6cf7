"""SAM 2.1 (Ravi et al. 2024) for single images: Hiera, and a mask decoder that draws from two finer features too.

What it remembers of a video's earlier frames is no part of this. Its parameters are kept, untrained, so that a file
written here holds all that the publisher's code asks for.
"""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ultrarefiner.extras import imported
from ultrarefiner.models.image_encoder import ImageEncoder, run_block
from ultrarefiner.models.sam_decoder import Embedding


def sam2_model(config: str) -> Any:
    """The publisher's own model with random weights; `config` is its name among SAM 2.1's: t, s, b+, l."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    running = GlobalHydra.instance().is_initialized()
    package = imported("sam2", "sam2", "sam2")
    if not running:
        GlobalHydra.instance().clear()  # the package starts Hydra on a folder of its own, and we need ours
    path = Path(str(package.__file__)).parent / "configs" / "sam2.1" / f"sam2.1_hiera_{config}.yaml"
    return instantiate(OmegaConf.load(path).model)


def build_sam2(
    config: str, fused: bool = True, checkpointing: bool = False
) -> tuple[nn.Module, nn.Module, nn.Module, dict[str, Any]]:
    """Image encoder, prompt encoder, mask decoder, and what else the publisher's file holds; random weights."""
    model = sam2_model(config)
    parts = ("image_encoder", "sam_prompt_encoder", "sam_mask_decoder")
    named = {**dict(model.named_children()), **dict(model.named_parameters(recurse=False))}
    others = {name: value for name, value in named.items() if name not in parts}
    encoder = HieraEncoder(model.image_encoder, checkpointing)
    return encoder, model.sam_prompt_encoder, model.sam_mask_decoder, others


def prepare_sam2(sam: Any, embedding: Embedding) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The embedding of an image that no video precedes, and the finer features as the decoder adds them."""
    decoder, (quarter, half) = sam.mask_decoder, embedding.finer
    return embedding.image + sam.no_mem_embed[0, :, :, None, None], (decoder.conv_s0(quarter), decoder.conv_s1(half))


class HieraEncoder(ImageEncoder):
    """The publisher's `ImageEncoder`, holding the very same submodules under the same names.

    It gives the embedding (B,D,S/16,S/16), and the features at S/4 and S/8.
    """

    def __init__(self, encoder: Any, checkpointing: bool = False):
        super().__init__(checkpointing)
        self.trunk, self.neck = encoder.trunk, encoder.neck
        self.scalp = encoder.scalp

    def _run(self, image: Float[Tensor, "B 3 S S"]) -> Embedding:
        x = self.trunk.patch_embed(image)
        x = x + self.trunk._get_pos_embed(x.shape[1:3])
        stages = []
        for index, block in enumerate(self.trunk.blocks):
            x = run_block(block, x, self.checkpointing)
            if index in self.trunk.stage_ends:
                stages.append(x.permute(0, 3, 1, 2))
        features, _ = self.neck(stages)
        *finer, last = features[: len(features) - self.scalp]
        return Embedding(last, tuple(finer))

    def attentions(self) -> list[nn.Module]:
        """The attention of every block, each with Linear layers `qkv` and `proj`."""
        return [block.attn for block in self.trunk.blocks]
