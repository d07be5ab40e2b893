"""What a fine-tune wrote, and what training writes while it goes on."""

from tl_backward.training.attribution import attribute

__all__ = ["attribute"]
