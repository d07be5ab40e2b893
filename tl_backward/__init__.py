"""Read a language model's backward pass: gradients in vocabulary space, for TransformerLens."""

from tl_backward.factors import GradientFactors

__all__ = ["GradientFactors"]
