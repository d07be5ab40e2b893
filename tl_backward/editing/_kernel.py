"""The kernel that editors share: an update that writes given changes for given keys.

For keys ``K`` ``[d_in, n]``, desired output changes ``R`` ``[n, d_out]``, a symmetric ``M`` and a
number ``ridge``, the update is ``dW = U R`` with ``U = M K (K^T M K + ridge I)^-1``. Without a
ridge, the output for each key changes by exactly its own row of ``R``. Only an ``n x n`` system is
solved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward.factors import GradientFactors

Metric: TypeAlias = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]]
"""Multiplies each row by the symmetric matrix ``M``."""


def kernel(
    keys: Float[Tensor, "n d_in"],
    metric: Metric | None = None,
    ridge: int | float = 0.0,
    probes: Float[Tensor, "n d_in"] | None = None,
) -> Float[Tensor, "n d_in"]:
    """The rows of ``U^T``, in float64 on the CPU.

    Args:
        keys: The rows of ``K^T``.
        metric: Multiplies rows by ``M``, as ``KeyStatistics.solve`` does by ``C^-1``. Default: the
            identity.
        ridge: Added to the diagonal of ``K^T M K``.
        probes: The inputs whose outputs should change by ``R``, if not the keys themselves:
            ``U = M K (P^T M K + ridge I)^-1``.

    Raises:
        ValueError: If the system is singular, as with two equal keys and no ridge.
    """
    exact = keys.to(device="cpu", dtype=torch.float64)
    asked = exact if probes is None else probes.to(exact)
    weighted = exact if metric is None else metric(exact)
    gram = einsum(asked, weighted, "probe d_in, key d_in -> probe key")
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    singular_values = torch.linalg.svdvals(gram)
    rounding = len(gram) * torch.finfo(gram.dtype).eps
    if not singular_values.isfinite().all() or singular_values[-1] <= rounding * singular_values[0]:
        raise ValueError(
            "the keys of this update do not tell its facts apart (the system that the kernel "
            "solves is singular): leave out facts with the same subject and beginning, or give a "
            "joint shift a ridge, such as ridge=0.01"
        )
    return torch.linalg.solve(gram.mT, weighted)


def update(rows: Float[Tensor, "n d_in"], changes: Float[Tensor, "n d_out"]) -> GradientFactors:
    """``dW = U R`` in factored form, in the precision of ``R``, at least float32."""
    dtype = upcast_dtype(changes.dtype)
    return GradientFactors(rows.to(changes.device, dtype), changes.to(dtype))
