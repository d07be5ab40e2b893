"""Detecting TransformerLens's weight processing from the weights.

Neither model class records all of it. A step is named if the weights show its effect, whatever
caused it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_backward.sites.protocols import Model

CENTERED = 1e-4
"""Maximum mean of a centred row, in units of its standard deviation."""


def weights_processing(model: Model) -> str:
    """The processing steps that the weights show, or ``"raw"``.

    Steps are named after the arguments of ``HookedTransformer.from_pretrained`` and
    ``TransformerBridge.enable_compatibility_mode``: ``fold_ln``, ``center_writing_weights``,
    ``center_unembed``, ``fold_value_biases``. Folding is not detectable if norms have no gain. A
    bridge outside compatibility mode is always raw.
    """
    if not getattr(model, "compatibility_mode", True):
        return "raw"
    block = next(iter(getattr(model, "blocks", ())), None)
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    b_V, b_O = _read(attn, "b_V"), _read(attn, "b_O")
    steps = {
        "fold_ln": _gain_is_folded(model),
        "center_writing_weights": _is_centered(_read(mlp, "W_out"))
        or (mlp is None and _is_centered(_read(attn, "W_O"))),
        "center_unembed": _is_centered(_read(model, "W_U")),
        "fold_value_biases": b_V is not None
        and b_O is not None
        and not b_V.any()
        and bool(b_O.any()),
    }
    return ", ".join(step for step, taken in steps.items() if taken) or "raw"


def _gain_is_folded(model: Any) -> bool:
    if str(model.cfg.normalization_type).endswith("Pre"):
        return True
    norm = getattr(model, "ln_final", None)
    gain = getattr(norm, "w", getattr(norm, "weight", None))
    neutral = 0 if getattr(norm, "uses_weight_offset", False) else 1
    return isinstance(gain, Tensor) and bool((gain == neutral).all())


def _read(owner: Any, name: str) -> Tensor | None:
    """A weight by TransformerLens's name, or None; latent attention raises for missing ones."""
    try:
        return getattr(owner, name, None)
    except NotImplementedError:
        return None


def _is_centered(W: Tensor | None) -> bool:
    """Whether the first row of ``[..., d_in, d_out]`` has mean 0."""
    if not isinstance(W, Tensor) or not W.is_floating_point():
        return False
    row = W.detach().flatten(0, -2)[0].float()
    return bool(row.mean().abs() <= CENTERED * row.std())
