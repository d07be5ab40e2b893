"""Rank-n linear algebra on weight gradients that are never formed.

The gradient of a matrix ``W`` used as ``y = x W`` is a sum of one outer product per token,
``dL/dW = sum_i x_i^T delta_i`` (Eq 6 and 8 of *Backward Lens*). The inputs ``x_i`` and the
vector-Jacobian products ``delta_i = dL/dy_i`` therefore determine it. Everything here costs
``O(n^2 (d_in + d_out) + n^3)`` for ``n`` tokens: a thin QR of each factor and the singular value
decomposition of the small matrix between them. Only :meth:`GradientFactors.dense` forms the
``d_in x d_out`` matrix, and other methods if it is smaller than its own factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import in_full_precision, stable_norm, upcast_dtype

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


class FactoredSVD(NamedTuple):
    """Thin singular value decomposition ``U diag(S) Vh``, with ``k = min(n, d_in, d_out)``."""

    U: Float[Tensor, "d_in k"]
    S: Float[Tensor, "k"]
    Vh: Float[Tensor, "k d_out"]


@dataclass(frozen=True, eq=False)
class GradientFactors:
    """The gradient of one weight matrix as its two factors.

    The factors stand for the matrix ``dense()``: the raw gradient ``dL/dW``, shape
    ``[d_in, d_out]``, summed over tokens and batch. Half-precision factors are stored unchanged and
    computed with in float32; autocast has no effect. Examples of different lengths have no batch
    axis: their rows are concatenated, and ``lengths`` gives the number of rows of each.

    Attributes:
        inputs: ``x_i``, the input of the weight matrix at each token.
        vjps: ``delta_i = dL/dy_i``, the VJP at its output, raw sign.
        lengths: Rows per example if the examples of a batch differ in length; otherwise None.

    Raises:
        ValueError: If the factors differ in their batch or token axes, or ``lengths`` does not add
            up to the number of rows.

    Example:
        >>> g = GradientFactors(torch.randn(5, 7), torch.randn(5, 3))
        >>> g.shape, int(g.rank())
        ((7, 3), 3)
    """

    inputs: Float[Tensor, "*batch n d_in"]
    vjps: Float[Tensor, "*batch n d_out"]
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim < 2 or self.inputs.shape[:-1] != self.vjps.shape[:-1]:
            raise ValueError(
                "inputs and vjps must be [*batch, n, d_in] and [*batch, n, d_out] with the same "
                f"batch and n, got {tuple(self.inputs.shape)} and {tuple(self.vjps.shape)}"
            )
        if self.lengths is not None and (self.inputs.ndim, sum(self.lengths)) != (
            2,
            len(self.vjps),
        ):
            raise ValueError(
                f"lengths={self.lengths} must add up to the number of rows, and inputs must be "
                f"[n, d_in], got {tuple(self.inputs.shape)}"
            )

    def __repr__(self) -> str:
        *batch, n = self.inputs.shape[:-1]
        over = f", batch={tuple(batch)}" if batch else ""
        over += f", lengths={self.lengths}" if self.lengths else ""
        return f"GradientFactors(shape={self.shape}, n={n}{over}, dtype={self.inputs.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``, the shape of the gradient."""
        return self.inputs.shape[-1], self.vjps.shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.inputs.device

    @property
    def T(self) -> GradientFactors:
        """The transposed gradient: the factors are swapped."""
        return GradientFactors(self.vjps, self.inputs, self.lengths)

    @in_full_precision
    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The gradient itself, summed over batch and tokens (Eq 6, 8). Costs ``n d_in d_out``."""
        return einsum(*self._rows(), "row d_in, row d_out -> d_in d_out")

    def rank(self, rtol: float | None = None) -> int:
        """Numerical rank, at most ``n`` (Lemma 4.1).

        Args:
            rtol: Singular values up to ``rtol`` times the largest count as zero. Default: as in
                ``torch.linalg.matrix_rank``, ``max(d_in, d_out)`` times the machine epsilon. As
                there, a gradient of pure rounding noise (``g + -1 * g``) has a nonzero rank.
        """
        S = self.singular_values()
        if rtol is None:
            rtol = max(self.shape) * torch.finfo(S.dtype).eps
        return int((rtol * S[:1] < S).sum())

    @in_full_precision
    def singular_values(self) -> Float[Tensor, "k"]:
        """The ``k = min(n, d_in, d_out)`` largest singular values, in descending order."""
        return torch.linalg.svdvals(self._core())

    @in_full_precision
    def svd(self) -> FactoredSVD:
        """Thin singular value decomposition, from two thin QRs and the SVD of their core."""
        if self._is_smaller_dense:
            return FactoredSVD(*torch.linalg.svd(self.dense(), full_matrices=False))
        X, D = self._rows()
        Q_X, R_X = torch.linalg.qr(X.mT)
        Q_D, R_D = torch.linalg.qr(D.mT)
        U, S, Vh = torch.linalg.svd(R_X @ R_D.mT, full_matrices=False)
        return FactoredSVD(Q_X @ U, S, Vh @ Q_D.mT)

    @in_full_precision
    def norm(self) -> Float[Tensor, ""]:
        """Frobenius norm.

        Computed from the QR core, so it is accurate to rounding even if the outer products cancel;
        the root of :meth:`inner` with itself would be off by the root of the machine epsilon. It is
        finite whenever the norm is representable.
        """
        return stable_norm(self._core())

    @in_full_precision
    def inner(self, other: GradientFactors) -> Float[Tensor, ""]:
        """Frobenius inner product with a gradient of the same shape, from Gram matrices."""
        (one, r1), (two, r2) = self._unit_rows(), other._unit_rows()
        return one._gram_inner(two) * r1 * r2 * r1 * r2

    @in_full_precision
    def cosine(self, other: GradientFactors) -> Float[Tensor, ""]:
        """Cosine similarity with a gradient of the same shape; nan if one of them is 0."""
        (one, _), (two, _) = self._unit_rows(), other._unit_rows()
        return (one._gram_inner(two) / (one.norm() * two.norm())).clamp(-1, 1)

    @in_full_precision
    def __matmul__(self, v: Float[Tensor, "d_out *m"]) -> Float[Tensor, "d_in *m"]:
        """Apply the gradient to a vector or to the columns of a matrix."""
        if not isinstance(v, Tensor):
            return NotImplemented
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise ValueError(
                f"a gradient of shape {self.shape} needs a [{self.shape[1]}] vector or a "
                f"[{self.shape[1]}, m] matrix on its right, got {tuple(v.shape)}"
            )
        X, D = self._rows()
        return X.mT @ (D @ v.to(D.dtype))

    def __add__(self, other: GradientFactors) -> GradientFactors:
        """The sum of two gradients: concatenates their tokens, per example if batched."""
        if not isinstance(other, GradientFactors):
            return NotImplemented
        if self.shape != other.shape or self._batch != other._batch:
            raise ValueError(f"cannot add {other!r} to {self!r}: shapes and batches must be equal")
        if self.lengths or other.lengths:
            (n_examples,) = self._batch
            return concatenate([self.example(b) + other.example(b) for b in range(n_examples)])
        return GradientFactors(
            torch.cat([self.inputs, other.inputs], dim=-2),
            torch.cat([self.vjps, other.vjps], dim=-2),
        )

    def __mul__(self, scalar: int | float | Float[Tensor, ""]) -> GradientFactors:
        """The gradient times a number; scales the VJPs, half precision in float32."""
        if not (isinstance(scalar, Real) or (isinstance(scalar, Tensor) and scalar.ndim == 0)):
            raise TypeError(
                "a GradientFactors can only be multiplied by a scalar; use @ for matrix products"
            )
        dtype = upcast_dtype(self.vjps.dtype)
        return replace(self, vjps=self.vjps.to(dtype) * scalar)

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy leaves ``array * g`` to __rmul__

    def example(self, b: int) -> GradientFactors:
        """The factors of one example of a batch.

        Raises:
            ValueError: If there is no batch axis.
            IndexError: If the batch has fewer examples.
        """
        if not self._batch:
            raise ValueError("these factors have a single prompt and no batch axis")
        if self.lengths is None:
            return GradientFactors(self.inputs[b], self.vjps[b])
        return GradientFactors(self.inputs.split(self.lengths)[b], self.vjps.split(self.lengths)[b])

    def truncate(self, k: int) -> GradientFactors:
        """The nearest gradient of rank ``k``; its ``k`` rows are scaled singular vectors."""
        U, S, Vh = self.svd()
        if not 1 <= k <= len(S):
            raise ValueError(f"k must be in [1, {len(S)}], got {k}")
        return GradientFactors((U[:, :k] * S[:k]).mT, Vh[:k])

    def to_factored_matrix(self) -> FactoredMatrix:
        """Convert to a TransformerLens ``FactoredMatrix`` ``A B`` with ``A: [d_in, n]``."""
        from transformer_lens import FactoredMatrix

        X, D = self._rows()
        return FactoredMatrix(X.mT, D)

    @property
    def _batch(self) -> tuple[int, ...]:
        return self.inputs.shape[:-2] if self.lengths is None else (len(self.lengths),)

    @property
    def _is_smaller_dense(self) -> bool:
        """Whether the dense gradient is smaller than its factors."""
        return self.vjps.numel() >= self.shape[1] * min(self.shape)

    def _gram_inner(self, other: GradientFactors) -> Float[Tensor, ""]:
        if self.shape != other.shape:
            raise ValueError(
                f"gradients of shapes {self.shape} and {other.shape} have no inner product"
            )
        if self._is_smaller_dense and other._is_smaller_dense:
            return (self.dense() * other.dense()).sum()
        pairs = zip(self._rows(), other._rows(), strict=True)
        grams = [einsum(one, two, "row d, other d -> row other") for one, two in pairs]
        return (grams[0] * grams[1]).sum()

    def _unit_rows(self) -> tuple[GradientFactors, Float[Tensor, ""]]:
        """A rescaled gradient and the square root of the scale; no row or VJP is longer than 1.

        Products of two rescaled gradients neither overflow nor underflow.
        """
        X, D = self._rows()
        x, d = stable_norm(X, dim=-1).unsqueeze(-1), stable_norm(D, dim=-1).unsqueeze(-1)
        roots = x.sqrt() * d.sqrt()
        largest = roots.amax() if len(roots) else roots.sum()
        unit = torch.where(largest > 0, largest, 1)
        unit_X, unit_D = (
            (side / torch.where(n > 0, n, 1)) * (roots / unit) for side, n in ((X, x), (D, d))
        )
        return GradientFactors(unit_X, unit_D), unit

    def _core(self) -> Float[Tensor, "rows columns"]:
        """The smallest available matrix with the same nonzero singular values."""
        if self._is_smaller_dense:
            return self.dense()
        X, D = self._rows()
        return _triangle(X) @ _triangle(D).mT

    def _rows(self) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_out"]]:
        """Both factors with batch and tokens in one axis, at least float32."""
        dtype = upcast_dtype(self.inputs.dtype, self.vjps.dtype)
        return (
            rearrange(self.inputs, "... d_in -> (...) d_in").to(dtype),
            rearrange(self.vjps, "... d_out -> (...) d_out").to(dtype),
        )


def concatenate(examples: Sequence[GradientFactors]) -> GradientFactors:
    """Combine the factors of examples, which may differ in length, into those of a batch."""
    return GradientFactors(
        torch.cat([example.inputs for example in examples]),
        torch.cat([example.vjps for example in examples]),
        tuple(len(example.vjps) for example in examples),
    )


def _triangle(rows: Float[Tensor, "n d"]) -> Float[Tensor, "k n"]:
    """``R`` of the thin QR of ``rows^T``, so that ``R^T R = rows rows^T``."""
    return torch.linalg.qr(rows.mT, mode="r").R
