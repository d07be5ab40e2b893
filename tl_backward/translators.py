"""Translators ``f(vectors, layer)`` for the lens: how VJPs of early layers are made readable.

Each of them is what ``BackwardLogitLens(model)(..., lens=...)`` takes, as the forward lens of
TransformerLens takes its own. A VJP of an early layer is that of the last one, pulled back through
the blocks in between, ``delta_l = J_l^T delta_final``; the last two of these undo a pull-back.
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
    """The vectors themselves: the plain lens."""
    return vectors


def unit_normalised(
    vectors: Float[Tensor, "*rows d_model"], layer: int | None
) -> Float[Tensor, "*rows d_model"]:
    """Vectors of length 1, as ``normalize=True`` reads them (App H); zero stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def through_final_norm(
    model: Model, residual: Float[Tensor, "*rows d_model"], ridge: float = 1e-6
) -> Translator:
    """Carry VJPs of the end of the residual stream on to the output of the final norm.

    There Lemma 5.1 is exact: the VJP is ``sum_k delta[k] D^T[k]``. The translator solves
    ``J^T z = delta`` in the ridge least-squares sense, where ``J`` is the Jacobian of the final
    norm at each position's own ``residual``. Read its result with ``apply_ln=False``.

    Args:
        model: A TransformerLens model.
        residual: The end of the residual stream, one row for each row that is read. For one
            prompt: ``activations[f"blocks.{n_layers - 1}.hook_resid_post"][0]`` of
            ``model.run_with_cache``.
        ridge: Weight of ``|z|^2``, relative to the mean square of the singular values of ``J``.
            What the norm does not pass on (the mean, and the direction of ``residual``) is not in
            ``delta``, and stays zero.

    Returns:
        The translator. It raises ValueError when the vectors have other rows than ``residual``.

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
                f"residual has the shape {list(residual.shape)}, but the vectors that are read "
                f"have {list(vectors.shape)}; select the same positions in both"
            )
        rows = (rearrange(x, "... d_model -> (...) 1 d_model") for x in (residual, vectors))
        solved = [_solve(jacobian(at)[0], vector, ridge) for at, vector in zip(*rows, strict=True)]
        return torch.stack(solved).reshape(vectors.shape)

    return translator


def through_jacobian_lens(
    jacobian_lens: JacobianLens, ridge: float = 1e-3, accumulated: bool = False
) -> Translator:
    """Carry VJPs from the output of each layer to the end of the residual stream.

    TransformerLens's ``JacobianLens`` holds the mean Jacobian ``J_l`` from the output of layer
    ``l`` to the end of the stream, so a VJP of the layer is about ``J_l^T delta_final``. The
    translator solves ``J_l^T z = delta_l`` in the ridge least-squares sense. Layers that the lens
    does not have, such as the last one, are left as they are.

    Args:
        jacobian_lens: A fitted lens of the same model.
        ridge: Weight of ``|z|^2``, relative to the mean square of the singular values of ``J_l``.
        accumulated: Whether it is the points of ``residual="accumulated"`` that are read, of which
            ``3_pre`` is the output of layer 2. Otherwise ``layer`` is that of a weight, at whose
            end the VJP is taken to be: exact for W_out, and for W_O without the layer's own MLP.

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
    """The ``z`` of least ``|z J - vjp|^2 + weight |z|^2``, in float32 at least."""
    dtype = upcast_dtype(vjps.dtype)
    J, vjps = J.to(dtype), vjps.to(dtype)
    gram = J @ J.mT
    weight = ridge * gram.diagonal().mean()
    system = gram + weight * torch.eye(len(gram), dtype=dtype, device=gram.device)
    products = einsum(J, vjps, "d_out d_in, ... d_in -> ... d_out")
    solved = torch.linalg.solve(system, rearrange(products, "... d_out -> d_out (...)"))
    return solved.mT.reshape(products.shape)
