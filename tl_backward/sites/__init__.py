"""Where the weights of a TransformerLens model are, one file per model class.

This package is the only place that knows which model classes there are; everything above it
works with :class:`WeightSite` and the functions here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

from jaxtyping import Float
from torch import Tensor, nn

from tl_backward.sites import transformer_bridge
from tl_backward.sites.site import Model, Tap, WeightSite, select_sites

__all__ = ["Model", "Tap", "WeightSite", "all_modules", "all_parameters", "unembed", "weight_sites"]


def weight_sites(
    model: Model,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
) -> list[WeightSite]:
    """The weight matrices of a model, each with the points where its input and output pass.

    Args:
        model: A TransformerLens ``TransformerBridge``.
        weights: Kinds, such as ``"W_out"`` or ``("W_in", "W_gate")``. Default: all there are.
        layers: Layer indices; negative ones count from the last. Default: all.

    Raises:
        TypeError: When ``model`` is no TransformerLens model.
        ValueError: When a weight or layer does not exist; the message lists what does.
        NotImplementedError: For a bridge in compatibility mode.

    Example:
        >>> [site.name for site in weight_sites(model, "W_out", layers=-1)]
        ['blocks.29.mlp.W_out']
    """
    sites = _backend(model).sites(model)
    return select_sites(sites, model.cfg.n_layers, weights, layers)


def all_parameters(model: Model) -> Iterator[Tensor]:
    """Every parameter that takes part in the model's forward pass; some may come twice."""
    return _backend(model).parameters(model)


def all_modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module that takes part in the model's forward pass, with its name."""
    return _backend(model).modules(model)


def unembed(model: Model, vectors: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
    """Vectors through the model's own final norm and unembedding (Eq 7, before the softmax)."""
    return _backend(model).unembed(model, vectors)


def _backend(model: Model) -> ModuleType:
    if transformer_bridge.accepts(model):
        return transformer_bridge
    raise TypeError(
        f"model must be a TransformerLens TransformerBridge, got {type(model).__name__}; load one "
        "with TransformerBridge.boot_transformers(...)"
    )
