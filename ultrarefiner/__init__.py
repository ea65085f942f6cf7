"""UltraRefiner: differentiable refinement of breast-ultrasound segmentations with Segment Anything models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrarefiner.segmenter import Segmentation, Segmenter

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter"]


def __getattr__(name: str) -> Any:
    """Torch is imported when it is needed: `--help` and shell completion import this package too."""
    if name in __all__:
        from ultrarefiner import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module 'ultrarefiner' has no attribute {name!r}")
