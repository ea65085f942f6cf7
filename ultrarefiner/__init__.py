"""UltraRefiner: differentiable refinement of breast-ultrasound segmentations with Segment Anything models."""

__version__ = "0.1.0"
