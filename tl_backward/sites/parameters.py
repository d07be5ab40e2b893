"""The parameters of a model with their sites, or the reasons why they have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    by_parameter: dict[int, list[str]] = {}
    by_module: dict[int, str] = {}
    behind: dict[int, str] = {}
    for site in sites:
        module, _ = site.holder
        by_module.setdefault(id(module), site.name)
        how = site.recomputed
        if how is None:
            by_parameter.setdefault(id(site.parameter), []).append(site.name)
            continue
        for source in how.sources:
            behind[id(source)] = f"{site.name} is recomputed from it by {how.by}"

    def rows() -> Iterator[dict[str, object]]:
        for name, module, parameter in parameters:
            site_names = by_parameter.get(id(parameter), [])
            reason = behind.get(id(parameter))
            if reason is None and not site_names:
                reason = reasons.get(id(parameter))
                reason = reason or _reason(name, module, parameter, by_module)
            yield {
                "parameter": name,
                "shape": tuple(parameter.shape),
                "site": " + ".join(site_names) or None,
                "reason": reason,
            }

    return pd.DataFrame(rows(), columns=["parameter", "shape", "site", "reason"])


def _reason(name: str, module: nn.Module, parameter: Tensor, by_module: dict[int, str]) -> str:
    kind = type(module).__name__
    beside = by_module.get(id(module))
    if beside and parameter.ndim == 1:
        return f"bias: its gradient is cache.bias_gradient({beside!r})"
    if "Norm" in kind or ".ln" in name:
        return f"gain or bias of a norm ({kind})"
    if "experts" in name:
        return f"weights of experts, stacked or shared ({kind}): no site yet"
    if "outer" in kind or "Gating" in kind:
        return f"router of a mixture of experts ({kind}): no site yet"
    if isinstance(module, nn.Conv1d):
        return "convolution: no site yet"
    return f"part of a {kind} that TransformerLens does not name: no site yet"
