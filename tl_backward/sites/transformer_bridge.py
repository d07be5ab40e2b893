"""``TransformerBridge``: the wrapped Hugging Face modules hold the weights and do the products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tl_backward.sites.site import Model, Tap, WeightSite

MLP_PROJECTIONS = {"W_in": "in", "W_gate": "gate", "W_out": "out"}


def accepts(model: object) -> bool:
    """Whether the model is a ``TransformerBridge``."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return False
    return isinstance(model, TransformerBridge)


def sites(model: Model) -> list[WeightSite]:
    """Every weight site of a bridge, block by block."""
    if getattr(model, "compatibility_mode", False):
        raise NotImplementedError(
            "this TransformerBridge is in compatibility mode, whose MLPs do not run the wrapped "
            "modules; pass the bridge as boot_transformers returns it"
        )
    return [site for layer, block in enumerate(model.blocks) for site in _mlp_sites(layer, block)]


def _mlp_sites(layer: int, block: Any) -> Iterator[WeightSite]:
    mlp = block._modules.get("mlp")
    for kind, projection in MLP_PROJECTIONS.items():
        bridge = getattr(mlp, projection, None)
        if bridge is not None:
            yield _linear_site(f"blocks.{layer}.mlp", projection, kind, layer, bridge)


def _linear_site(path: str, projection: str, kind: str, layer: int, bridge: Any) -> WeightSite:
    linear = bridge.original_component
    stored_out_in = isinstance(linear, nn.Linear)
    d_out, d_in = linear.weight.shape if stored_out_in else linear.weight.shape[::-1]
    return WeightSite(
        name=f"{path}.{kind}",
        kind=kind,
        layer=layer,
        hook_in=f"{path}.{projection}.hook_in",
        hook_out=f"{path}.{projection}.hook_out",
        d_in=d_in,
        d_out=d_out,
        x_tap=lambda: Tap(linear, "input"),
        y_tap=lambda: Tap(linear, "output"),
        read_parameter=lambda: linear.weight,
        layout=(lambda matrix: matrix.mT) if stored_out_in else (lambda matrix: matrix),
    )


def parameters(model: Model) -> Iterator[Tensor]:
    """Every parameter of the bridge and of the model that it wraps (some of them twice)."""
    yield from model.parameters()
    yield from nn.Module.parameters(model)


def modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the bridge and of the model that it wraps (some of them twice)."""
    yield from model.named_modules()
    yield from model.original_model.named_modules()


def unembed(model: Model, vectors: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
    """Final norm, unembedding and output transform, as ``logit_readout`` of TL 4.3 applies them."""
    W_U = model.W_U
    vectors = vectors.to(device=W_U.device, dtype=W_U.dtype)
    if model.cfg.normalization_type is not None:
        vectors = model.ln_final(vectors.unsqueeze(0)).squeeze(0)
    return model.adapter.apply_output_logits_transform(vectors @ W_U + model.b_U)
