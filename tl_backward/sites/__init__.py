"""The weight sites of TransformerLens models, one module per model class.

Only this package knows the model classes; everything else works with :class:`WeightSite` and the
functions here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from tl_backward._turns import take_turn
from tl_backward._undo import Undo
from tl_backward.sites import hooked_transformer, transformer_bridge
from tl_backward.sites.hook_points import add_hook_points, remove_hook_points
from tl_backward.sites.mixture import Mixture
from tl_backward.sites.parameters import coverage_table
from tl_backward.sites.processing import weights_processing
from tl_backward.sites.protocols import Backend, Model
from tl_backward.sites.site import (
    FoundSites,
    UnsupportedWeight,
    WeightSite,
    final_norm,
    layer_numbers,
)
from tl_backward.sites.tap import Tap
from tl_backward.sites.ties import with_ties
from tl_backward.sites.training_mode import training_mode_effects

if TYPE_CHECKING:
    import pandas as pd

RESIDUAL_POINTS = ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out")

__all__ = [
    "FoundSites",
    "Mixture",
    "Model",
    "Tap",
    "WeightSite",
    "add_hook_points",
    "all_modules",
    "all_parameters",
    "attached_hook_points",
    "coverage",
    "end_of_stream",
    "final_norm",
    "find_sites",
    "layer_numbers",
    "lazy_hook_points",
    "left_padding_obstacle",
    "occupy",
    "parameters_without_site",
    "remove_hook_points",
    "require_eval_mode",
    "require_model",
    "residual_points",
    "unembed",
    "unembedding",
    "weight_sites",
    "weights_processing",
]


def weight_sites(
    model: Model,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
) -> list[WeightSite]:
    """The weight matrices of a model, each with the hook points of its input and output.

    Args:
        model: A TransformerLens ``TransformerBridge`` or ``HookedTransformer``.
        weights: Kinds, such as ``"W_out"`` or ``("W_in", "W_gate")``. Default: all available.
        layers: Layer indices; negative ones count from the last. Default: all.

    Raises:
        TypeError: If ``model`` is not a TransformerLens model.
        ValueError: If a weight or layer does not exist; the message lists those that do.
        NotImplementedError: If a requested weight or layer has no site; the message says why.

    Example:
        >>> [site.name for site in weight_sites(model, "W_out", layers=-1)]
        ['blocks.29.mlp.W_out']
    """
    return find_sites(model).select(weights, layers)


def find_sites(model: Model) -> FoundSites:
    """Survey all weight matrices of a model.

    Raises:
        TypeError, NotImplementedError: As :func:`weight_sites`.
    """
    found = list(_backend(model).survey(model))
    return FoundSites(
        with_ties(one for one in found if isinstance(one, WeightSite)),
        [one for one in found if isinstance(one, UnsupportedWeight)],
        model.cfg.n_layers,
    )


def require_model(model: Model) -> None:
    """Raise unless ``model`` is a supported TransformerLens model.

    Raises:
        TypeError: If ``model`` is not a TransformerLens model of a decoder-only language model.
    """
    _backend(model)


def left_padding_obstacle(model: Model) -> str | None:
    """Why left-padded texts get other results than the texts alone; None if they get the same."""
    return _backend(model).left_padding_obstacle(model)


def lazy_hook_points(model: Model) -> list[str]:
    """The residual-stream HookPoints that TransformerLens calls only if they have hooks."""
    return _backend(model).lazy_hook_points(model)


def end_of_stream(model: Model) -> nn.Module | None:
    """The end of the residual stream, if not at the last block's own HookPoint."""
    return _backend(model).end_of_stream(model)


def residual_points(model: Model) -> dict[str, nn.Module]:
    """The HookPoints of the residual stream and of additions to it, by TransformerLens's names.

    These are ``hook_embed``, every block's ``hook_resid_pre``, ``hook_resid_mid`` (unless attention
    and MLP are parallel) and ``hook_mlp_out``, and the last block's ``hook_resid_post``. Names that
    the model lacks are left out.
    """
    n_layers, points = model.cfg.n_layers, model.hook_dict
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    names = [
        "hook_embed",
        *(f"blocks.{block}.{hook}" for block in range(n_layers) for hook in RESIDUAL_POINTS),
        last,
    ]
    found = {name: points[name] for name in names if name in points}
    end = end_of_stream(model)
    return found if end is None else found | {last: end}


def coverage(model: Model) -> pd.DataFrame:
    """Every parameter of a model with its site, or the reason why it has none.

    Args:
        model: A TransformerLens model.

    Returns:
        One row per parameter with the columns ``parameter``, ``shape`` (as stored), ``site``
        (several names, joined by ``+``, if tied weights share it) and ``reason``: why it has no
        site, or why its gradient is not the site's alone.

    Raises:
        TypeError, NotImplementedError: For other models, as :func:`weight_sites`.

    Example:
        >>> coverage(model).query("site.isna()").reason.value_counts()
    """
    backend = _backend(model)
    found = find_sites(model)
    reasons = {
        id(o.parameter): f"{o.name}: {o.reason}"
        for o in found.unsupported
        if isinstance(o.parameter, nn.Parameter)
    }
    return coverage_table(
        backend.named_parameters(model), found.sites, reasons | backend.reasons(model)
    )


def parameters_without_site(model: Model) -> dict[str, tuple[Tensor, str]]:
    """By name, the parameters in use that no site reads, and why they have none.

    Raises:
        TypeError, NotImplementedError: For other models, as :func:`weight_sites`.
    """
    backend = _backend(model)
    rows = coverage(model).set_index("parameter")
    computed = (site.recomputed for site in find_sites(model).sites)
    elsewhere = {id(source) for how in computed if how for source in how.sources}
    elsewhere |= backend.unused_parameters(model).keys()
    return {
        name: (parameter, str(rows.reason[name]))
        for name, _, parameter in backend.named_parameters(model)
        if not isinstance(rows.site[name], str) and id(parameter) not in elsewhere
    }


def all_parameters(model: Model) -> Iterator[Tensor]:
    """Every parameter of the model, each once."""
    owned = (p for _, module in all_modules(model) for p in module._parameters.values())
    return iter({id(p): p for p in owned if p is not None}.values())


def all_modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module that takes part in the model's forward pass, with its name."""
    return _backend(model).modules(model)


def require_eval_mode(model: Model) -> None:
    """Raise if training mode changes the model's output.

    Training mode itself is allowed if nothing active depends on it.

    Raises:
        ValueError: If something active depends on it; the message says what and where.
    """
    effects = training_mode_effects(all_modules(model))
    if effects:
        more = f" and {len(effects) - 3} more" if len(effects) > 3 else ""
        raise ValueError(
            "the model is in training mode, which changes its output: "
            f"{', '.join(effects[:3])}{more}; call model.eval() first"
        )


def occupy(model: Model, undo: Undo) -> None:
    """Take a turn at a model, with all HookPoints of its sites attached, until undone.

    Other threads wait for their turn. Undoing removes HookPoints that the model lacked.
    """
    backend = _backend(model)
    take_turn(model, undo)
    backend.attach_hook_points(model, undo)


@contextmanager
def attached_hook_points(model: Model) -> Iterator[None]:
    """Context with the model occupied."""
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        yield


def unembedding(model: Model) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding matrix, as used by :func:`unembed`.

    Raises:
        NotImplementedError: If a LoRA adapter adds to its output.
    """
    return _backend(model).unembedding(model)


def unembed(
    model: Model, vectors: Float[Tensor, "rows d_model"], apply_ln: bool = True
) -> Float[Tensor, "rows d_vocab"]:
    """Apply the model's own final norm and unembedding (Eq 7, before the softmax)."""
    return _backend(model).unembed(model, vectors, apply_ln)


def _backend(model: Model) -> Backend:
    backends: tuple[Backend, ...] = (transformer_bridge, hooked_transformer)
    for backend in backends:
        if backend.accepts(model):
            return backend
    hint = "load one with TransformerBridge.boot_transformers(...)"
    if hasattr(model, "_orig_mod"):
        hint = "pass the original model, model._orig_mod, which runs uncompiled here"
    elif isinstance(model, nn.Module) and hasattr(model, "config"):
        inner = "model.get_base_model()" if hasattr(model, "get_base_model") else "model"
        hint = f"wrap it with TransformerBridge.boot_transformers(..., hf_model={inner})"
    raise TypeError(
        "model must be a TransformerLens HookedTransformer, or a TransformerBridge of a "
        f"decoder-only language model, got {type(model).__name__}; {hint}"
    )
