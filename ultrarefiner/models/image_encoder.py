"""What the image encoders of all families share: in which form they run, and what they keep for the way back."""

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultrarefiner.models.sam_decoder import Embedding
from ultrarefiner.models.weights import in_memory_state


class ImageEncoder(nn.Module):
    """An image encoder on its publisher's parameters.

    A frozen one runs on a private copy in the form that is fastest: with what `_hasten` changes, and on a CPU with its
    weights in the number format of an autocast, which would else convert them in every pass. The copy is no part of
    state_dict(), and is made anew when the weights change. A subclass defines `_run`.

    Args:
        checkpointing: keep one activation a block when gradients are asked for; the way back computes the rest again.
        hastens: whether `_hasten` does anything.
    """

    def __init__(self, checkpointing: bool, hastens: bool = False) -> None:
        super().__init__()
        self.checkpointing, self.hastens = checkpointing, hastens
        self._copy: tuple[object, ImageEncoder] | None = None  # in a tuple: a module attribute would be registered

    def forward(self, image: Tensor) -> Tensor | Embedding:
        """Normalised image (B,3,S,S) → embedding."""
        frozen = not self.training and not any(parameter.requires_grad for parameter in self.parameters())
        if not frozen or torch.compiler.is_exporting():  # who runs the graph chooses its form himself
            return self._run(image)
        device = image.device.type
        low = torch.get_autocast_dtype(device) if device == "cpu" and torch.is_autocast_enabled(device) else None
        if low is None and not self.hastens:
            return self._run(image)
        return self._as_it_runs(low)._run(image if low is None else image.to(low))

    @abstractmethod
    def _run(self, image: Tensor) -> Tensor | Embedding:
        """The embedding, on the weights as they are."""

    def _hasten(self) -> None:
        """Change this encoder, of which nothing will be trained or saved, to what computes the same in less time."""

    def _as_it_runs(self, dtype: torch.dtype | None) -> "ImageEncoder":
        state = (dtype, in_memory_state(self))
        if self._copy is None or self._copy[0] != state:
            self._copy = None
            with torch.inference_mode(False), torch.no_grad():
                made = copy.deepcopy(self)
                made._hasten()
                self._copy = (state, made if dtype is None else made.to(dtype))
        made = self._copy[1]
        made.checkpointing = self.checkpointing
        return made


def run_block(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """block(x), with its activations computed again in the backward pass where `checkpointing` asks for it."""
    if (
        checkpointing
        and torch.is_grad_enabled()
        and (x.requires_grad or any(p.requires_grad for p in block.parameters()))
    ):
        x = checkpoint(block, x, use_reentrant=False)
    else:
        x = block(x)
    return x
