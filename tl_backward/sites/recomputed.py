"""Weights that a module recomputes in every forward pass from other parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

ENDINGS = ("orig", "g", "v")
"""Suffixes that ``torch.nn.utils`` adds to a weight's name for its source parameters."""


class Recomputation(NamedTuple):
    """How a weight is recomputed.

    Attributes:
        by: What computes it.
        remedy: The call that makes its current value a parameter again.
        sources: The parameters that it is computed from.
    """

    by: str
    remedy: str
    sources: tuple[Tensor, ...]


def recomputation(module: nn.Module, name: str) -> Recomputation | None:
    """How ``module.name`` is recomputed; None if it is stored under this name."""
    if name in module._parameters or name in module._buffers:
        return None
    if parametrize.is_parametrized(module, name):
        steps = module.get_submodule(f"parametrizations.{name}")
        kinds = ", ".join(type(step).__name__ for step in steps.children())
        return Recomputation(
            f"torch.nn.utils.parametrize ({kinds})",
            f"call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})",
            tuple(steps.parameters()),
        )
    hook = _hook_of(module, name)
    if hook is None:
        return None
    parameters = module._parameters
    sources = (parameters.get(f"{name}_{ending}") for ending in ENDINGS)
    return Recomputation(*hook, tuple(source for source in sources if source is not None))


def _hook_of(module: nn.Module, name: str) -> tuple[str, str] | None:
    """The forward pre-hook that sets the weight, and the call that removes it."""
    hooks = module._forward_pre_hooks.values()
    for hook in hooks:
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return "torch.nn.utils.prune", f"call torch.nn.utils.prune.remove(module, {name!r})"
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == name:
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            remedy = f"call torch.nn.utils.remove_{kind}(module, {name!r})"
            return f"torch.nn.utils.{kind}", remedy
    if hooks and isinstance(vars(module).get(name), Tensor):
        return "a forward pre-hook of its module", f"remove it and make {name} a parameter"
    return None
