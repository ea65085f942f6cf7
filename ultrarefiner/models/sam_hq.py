"""SAM-HQ (Ke et al. 2023): one more token whose mask is drawn from early features of the image encoder, and added.

Its published code picks the best of three masks by their predicted IoU, then adds. Here all three are given with the
addition, so the choice is the caller's, and the best of them is what the published code gives.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ultrarefiner.extras import imported
from ultrarefiner.models.sam_decoder import Embedding, attend_to, mask_weights

if TYPE_CHECKING:
    from segment_anything.modeling import TwoWayTransformer


def hq_parts() -> Any:
    """The publisher's classes; `UserError` where the package is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it registers TinyViT with timm by old module names, which timm reports
        return imported("segment_anything_hq.modeling", "segment-anything-hq", "sam-hq")


def hq_decoder(transformer: "TwoWayTransformer", channels: int, vit_width: int) -> Any:
    """SAM-HQ's mask decoder with random weights, for early features of `vit_width` channels."""
    return hq_parts().MaskDecoderHQ(
        transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels, vit_dim=vit_width
    )


def prepare_hq(sam: Any, embedding: Embedding) -> tuple[Tensor, tuple[Tensor, ...]]:
    """SAM's embedding, and the features that the finer mask is drawn from: (B,D/8,4h,4w)."""
    decoder = sam.mask_decoder
    finer = decoder.embedding_encoder(embedding.image) + decoder.compress_vit_feat(embedding.finer[0])
    return embedding.image, (finer,)


def predict_hq(
    decoder: Any,
    keys: Float[Tensor, "P N D"],
    position: Float[Tensor, "N D"],
    grid: tuple[int, int],
    sparse: Float[Tensor, "P T D"],
    finer: Sequence[Tensor],
    multimask: bool,
) -> tuple[Tensor, Tensor]:
    """As `sam_decoder.predict`; the finer mask is added to each of the others."""
    fixed = [decoder.iou_token, decoder.mask_tokens, decoder.hf_token]
    tokens, keys = attend_to(decoder, fixed, keys, position, sparse)
    wanted = slice(1, None) if multimask else slice(0, 1)
    weights = mask_weights(decoder, tokens)
    features = decoder.output_upscaling(keys.mT.unflatten(2, grid))
    masks = weights[:, wanted] @ features.flatten(2)
    hq_weights = decoder.hf_mlp(tokens[:, 1 + weights.shape[1]])[:, None]
    masks = masks + hq_weights @ (decoder.embedding_maskfeature(features) + finer[0]).flatten(2)
    return masks.unflatten(2, features.shape[2:]), decoder.iou_prediction_head(tokens[:, 0])[:, wanted]
