"""The fingerprint of a tensor."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """A SHA-256 of a tensor's values, dtype and shape."""
    plain = tensor.detach()
    if type(plain) is not Tensor:
        plain = plain.dequantize()
    described = hashlib.sha256(f"{plain.dtype}{list(plain.shape)}".encode())
    described.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return described.hexdigest()
