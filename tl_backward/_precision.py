"""Computing in full precision: no autocast, upcast half precision, norms that do not overflow."""

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
    """Context without autocast on a device, so that float32 products stay in float32."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_full_precision(method: Method) -> Method:
    """Decorate a method to run without autocast on the device of its object."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with full_precision(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def upcast(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return x.to(upcast_dtype(x.dtype))


def upcast_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The common dtype of the given dtypes, at least float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def stable_norm(x: Float[Tensor, "*axes"], dim: int | None = None) -> Float[Tensor, "..."]:
    """The 2-norm of all elements, or along one axis.

    Finite and accurate whenever the norm is representable, even if the squares are not: in float32
    the square of 1e20 overflows and that of 1e-23 underflows. Half precision is upcast to float32.
    """
    x = upcast(x)
    if not x.numel():
        return torch.linalg.vector_norm(x, dim=dim)
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    norm = torch.linalg.vector_norm(x / unit, dim=dim)
    return norm * (unit if dim is None else unit.squeeze(dim))
