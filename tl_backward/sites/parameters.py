"""The parameters of a model with their sites, or the reasons why they have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from tl_backward.sites.site import WeightSite

if TYPE_CHECKING:
    import pandas as pd


class NamedParameter(NamedTuple):
    """A parameter and the module that holds it."""

    name: str
    module: nn.Module
    parameter: Tensor


def coverage_table(
    parameters: Iterable[NamedParameter],
    sites: Iterable[WeightSite],
    reasons: dict[int, str],
) -> pd.DataFrame:
    """One row per parameter; ``reasons`` holds the known reasons, by ``id``."""
    import pandas as pd

    by_parameter: dict[int, dict[str, list[WeightSite]]] = {}
    beside: dict[int, list[str]] = {}
    by_module: dict[int, WeightSite] = {}
    behind: dict[int, str] = {}
    for site in sites:
        module, name = site.holder
        by_module.setdefault(id(module), site)
        for vector in module._parameters.values():
            if vector is not None and vector.ndim == 1 and site.index is ...:
                beside.setdefault(id(vector), []).append(site.name)
        how = None if site.packed else site.recomputed
        if how is None:
            held: Tensor | None = module._parameters.get(name)  # if offloaded, the placeholder
            if held is None and site.packed is None:
                held = site.stored_in[0]
            of_parameter = by_parameter.setdefault(id(held), {})
            of_parameter.setdefault(_without_expert(site), []).append(site)
            continue
        for source in how.sources:
            behind[id(source)] = f"{site.name} is recomputed from it by {how.by}"

    def rows() -> Iterator[dict[str, object]]:
        for name, module, parameter in parameters:
            site_names = [*map(_names, by_parameter.get(id(parameter), {}).values())]
            reason = behind.get(id(parameter))
            if reason is None and not site_names:
                reason = reasons.get(id(parameter))
                reason = reason or _bias(beside.get(id(parameter), []))
                reason = reason or _reason(name, module, parameter, by_module)
            yield {
                "parameter": name,
                "shape": tuple(parameter.shape),
                "site": " + ".join(site_names) or None,
                "reason": reason,
            }

    return pd.DataFrame(rows(), columns=["parameter", "shape", "site", "reason"])


def _bias(beside: list[str]) -> str:
    """Where the gradient of a bias is; several weights share it where a whole layer is tied."""
    gradients = " + ".join(f"cache.bias_gradient({name!r})" for name in beside)
    return gradients and f"bias: its gradient is {gradients}"


def _without_expert(site: WeightSite) -> str:
    """A site's name with a placeholder for the expert."""
    if site.expert is None:
        return site.name
    return site.name.replace(f".experts.{site.expert}.", ".experts.{}.")


def _names(sites: Sequence[WeightSite]) -> str:
    """The name of a site, or one name for those of several experts."""
    experts = [site.expert for site in sites if site.expert is not None]
    if len(experts) < 2:
        return sites[0].name
    return _without_expert(sites[0]).format(f"{min(experts)}-{max(experts)}")


def _reason(
    name: str, module: nn.Module, parameter: Tensor, by_module: dict[int, WeightSite]
) -> str:
    kind = type(module).__name__
    beside = by_module.get(id(module))
    if beside and beside.index is not ... and name.endswith("bias"):
        where = _without_expert(beside).rpartition(".")[0].format("e")
        return f"biases of experts: cache.bias_gradient('{where}.W_out') is part of their gradient"
    if "Norm" in kind or ".ln" in name:
        return f"gain or bias of a norm ({kind})"
    if isinstance(module, nn.Conv1d):
        return "convolution: it filters each channel over positions, and is no x W + b"
    if parameter.ndim < 2:
        return f"a vector of a {kind}, no matrix"
    return f"part of a {kind}, which does not use it as x W + b in a module of its own"
