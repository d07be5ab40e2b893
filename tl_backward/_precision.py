"""Numbers as their dtype holds them: without autocast, and norms without squares that overflow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce, wraps
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off for a device, so that float32 is multiplied in float32."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_full_precision(method: Method) -> Method:
    """A method that computes with autocast switched off on the device of its object."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with full_precision(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def upcast(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Half precision in float32; float32 and float64 as they are."""
    return x.to(upcast_dtype(x.dtype))


def upcast_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds numbers of all of some dtypes, float32 at least."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def stable_norm(x: Float[Tensor, "*axes"], dim: int | None = None) -> Float[Tensor, "..."]:
    """The 2-norm of all numbers, or along one axis.

    Finite and accurate wherever the norm is a number of the dtype, also where the squares are not:
    in float32 those of 1e20 overflow, and those of 1e-23 vanish. Of half precision, in float32.
    """
    x = upcast(x)
    if not x.numel():
        return torch.linalg.vector_norm(x, dim=dim)
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    norm = torch.linalg.vector_norm(x / unit, dim=dim)
    return norm * (unit if dim is None else unit.squeeze(dim))
