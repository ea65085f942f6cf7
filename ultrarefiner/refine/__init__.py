"""The differentiable bridge: tensors in, tensors out."""
