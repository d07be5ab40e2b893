"""Translators ``f(vectors, layer)`` for the lens, which make VJPs of early layers readable.

Pass one as ``BackwardLogitLens(model)(..., lens=...)``, as for TransformerLens's forward lens. The
VJP of an early layer is the VJP of the last one, pulled back through the blocks in between,
``delta_l = J_l^T delta_final``; the last two translators here undo a pull-back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward.sites import Model, final_norm

if TYPE_CHECKING:
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

Translator: TypeAlias = Callable[[Tensor, int | None], Tensor]


def identity(
    vectors: Float[Tensor, "*rows d_model"], layer: int | None
) -> Float[Tensor, "*rows d_model"]:
    """Return the vectors unchanged: the plain lens."""
    return vectors


def unit_normalised(
    vectors: Float[Tensor, "*rows d_model"], layer: int | None
) -> Float[Tensor, "*rows d_model"]:
    """Scale vectors to length 1, as ``normalize=True`` does (App H); zero stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def through_final_norm(
    model: Model, residual: Float[Tensor, "*rows d_model"], ridge: float = 1e-6
) -> Translator:
    """Map VJPs at the end of the residual stream to VJPs at the output of the final norm.

    There, Lemma 5.1 is exact: the VJP is ``sum_k delta[k] D^T[k]``. The translator solves
    ``J^T z = delta`` in the ridge least-squares sense, where ``J`` is the Jacobian of the final
    norm at each position's own ``residual``. Read its result with ``apply_ln=False``.

    Args:
        model: A TransformerLens model.
        residual: The end of the residual stream, one row per row to read. For one prompt:
            ``activations[f"blocks.{n_layers - 1}.hook_resid_post"][0]`` of
            ``model.run_with_cache``.
        ridge: Weight of ``|z|^2``, relative to the mean square of the singular values of ``J``.
            Components that the norm removes (the mean, and the direction of ``residual``) are
            absent from ``delta`` and stay zero.

    Returns:
        The translator. It raises ValueError if the vectors' shape differs from ``residual``'s.

    Example:
        >>> _, activations = model.run_with_cache(prompt)
        >>> translator = through_final_norm(model, activations["blocks.29.hook_resid_post"][0])
        >>> lens(prompt, " Paris", lens=translator, apply_ln=False)
    """
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda row: final_norm(model, row.unsqueeze(0)).squeeze(0))
    )

    def translator(vectors: Tensor, layer: int | None) -> Tensor:
        if vectors.shape != residual.shape:
            raise ValueError(
                f"residual has the shape {list(residual.shape)}, but the vectors to read have "
                f"{list(vectors.shape)}; select the same positions in both"
            )
        rows = (rearrange(x, "... d_model -> (...) 1 d_model") for x in (residual, vectors))
        solved = [_solve(jacobian(at)[0], vector, ridge) for at, vector in zip(*rows, strict=True)]
        return torch.stack(solved).reshape(vectors.shape)

    return translator


def through_jacobian_lens(
    jacobian_lens: JacobianLens, ridge: float = 1e-3, accumulated: bool = False
) -> Translator:
    """Map VJPs at the output of each layer to the end of the residual stream.

    TransformerLens's ``JacobianLens`` holds the mean Jacobian ``J_l`` from the output of layer
    ``l`` to the end of the stream, so a VJP of the layer is about ``J_l^T delta_final``. The
    translator solves ``J_l^T z = delta_l`` in the ridge least-squares sense. Vectors of layers that
    the lens does not have, such as the last one, are unchanged.

    Args:
        jacobian_lens: A fitted lens of the same model.
        ridge: Weight of ``|z|^2``, relative to the mean square of the singular values of ``J_l``.
        accumulated: Whether the lens reads ``residual="accumulated"``, where ``3_pre`` is the
            output of layer 2. Otherwise ``layer`` is a weight's layer, and the VJP is taken to be
            at its end: exact for W_out, and for W_O up to the layer's own MLP.

    Example:
        >>> jacobian_lens = JacobianLens.fit(model, texts, corpus="my texts")
        >>> lens(prompt, " Paris", weights="W_out", lens=through_jacobian_lens(jacobian_lens))
    """

    def translator(vectors: Tensor, layer: int | None) -> Tensor:
        if layer is None:
            return vectors
        matrix = jacobian_lens.jacobians.get(layer - accumulated)
        if matrix is None:
            return vectors
        return _solve(matrix.to(vectors.device), vectors, ridge)

    return translator


def _solve(
    J: Float[Tensor, "d_out d_in"], vjps: Float[Tensor, "*rows d_in"], ridge: float
) -> Float[Tensor, "*rows d_out"]:
    """The ``z`` that minimises ``|z J - vjp|^2 + weight |z|^2``, at least in float32."""
    dtype = upcast_dtype(vjps.dtype)
    J, vjps = J.to(dtype), vjps.to(dtype)
    gram = J @ J.mT
    weight = ridge * gram.diagonal().mean()
    system = gram + weight * torch.eye(len(gram), dtype=dtype, device=gram.device)
    products = einsum(J, vjps, "d_out d_in, ... d_in -> ... d_out")
    solved = torch.linalg.solve(system, rearrange(products, "... d_out -> d_out (...)"))
    return solved.mT.reshape(products.shape)
