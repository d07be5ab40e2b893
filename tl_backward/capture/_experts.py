"""The capture of mixtures of experts: where they are recorded, and what is made of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tl_backward.cache.routing import ExpertFactors, RoutedExperts, Routing
from tl_backward.cache.rows import Rows
from tl_backward.capture.recorder import Recorder
from tl_backward.factors import GradientFactors
from tl_backward.sites import Mixture, WeightSite
from tl_backward.sites.mixture import Routes


def mixtures_of(sites: Sequence[WeightSite]) -> dict[str, Mixture]:
    """The mixtures that some sites belong to, by name."""
    return {site.mixture.name: site.mixture for site in sites if site.mixture is not None}


def watch_mixture(recorder: Recorder, mixture: Mixture) -> None:
    """Record what goes into the experts of a layer, where it goes, and what comes back."""
    for part, tap in mixture.taps.items():
        recorder.keep_value(tap(), (mixture.name, part))
    recorder.keep_place(mixture.output(), (mixture.name, "y"), alone=True)
    if mixture.residual_tap is not None:
        recorder.keep_place(mixture.residual_tap(), (mixture.name, "residual"))


def routing_of(
    recorder: Recorder, mixture: Mixture, vjps: Mapping[Any, list[Tensor]], rows: Rows
) -> Routing:
    """What passed the experts of a layer.

    Raises:
        NotImplementedError: When tokens were routed to experts that are not there.
    """
    seen = _seen(recorder, mixture)
    routes = [_routes(mixture, of_use) for of_use in seen]
    return Routing(
        rows.of([of_use["input"] for of_use in seen]),
        rows.of(vjps[mixture.name, "y"]),
        rows.of([one.experts for one in routes]),
        rows.of([one.weights for one in routes]),
        mixture.stacked is not None and mixture.stacked.plan.scales_input,
        rows.lengths(len(seen)),
    )


def factors_by_expert(
    recorder: Recorder,
    sites: Sequence[WeightSite],
    routings: Mapping[str, Routing],
    vjps: Mapping[Any, list[Tensor]],
    rows: Rows,
) -> dict[str, GradientFactors | ExpertFactors]:
    """The factors of the matrices of experts, those that are read at their boundary yet to make."""
    of_layers = {
        name: RoutedExperts(routings[name], mixture.stacked.remembered())
        for name, mixture in mixtures_of(sites).items()
        if mixture.stacked is not None
    }
    found: dict[str, GradientFactors | ExpertFactors] = {}
    for site in sites:
        if site.mixture is None or site.expert is None:
            continue
        of_layer = of_layers.get(site.mixture.name)
        if of_layer is not None:
            found[site.name] = ExpertFactors(
                of_layer, site.expert, site.kind, (site.d_in, site.d_out)
            )
        else:
            routing = routings[site.mixture.name]
            found[site.name] = _factors_at_module(recorder, site, routing, vjps, rows)
    return found


def _factors_at_module(
    recorder: Recorder,
    site: WeightSite,
    routing: Routing,
    vjps: Mapping[Any, list[Tensor]],
    rows: Rows,
) -> GradientFactors:
    """The factors of a matrix that a module of its own multiplies the routed tokens by."""
    mixture, expert = site.mixture, site.expert
    assert mixture is not None and mixture.rows is not None and expert is not None
    picked = [mixture.rows(of_use, expert) for of_use in _seen(recorder, mixture)]
    n_tokens = len(rows.starts) * rows.width

    def routed(tensors: Sequence[Tensor]) -> Tensor:
        each = []
        for tensor, (indices, tokens) in zip(tensors, picked, strict=True):
            whole = tensor.new_zeros(n_tokens, tensor.shape[-1])
            whole[tokens.to(tensor.device)] = tensor[indices.to(tensor.device)]
            each.append(whole)
        return routing.rows(expert, rows.of(each))

    x, y = recorder.values(site.name), vjps.get((site.name, "y"), [])
    if not x:  # some models leave out an expert without tokens
        lengths = routing.n_rows(expert)
        none = routing.inputs.new_zeros
        return GradientFactors(none(0, site.d_in), none(0, site.d_out), lengths)
    return GradientFactors(routed(x), routed(y), routing.n_rows(expert))


def _seen(recorder: Recorder, mixture: Mixture) -> list[dict[str, Tensor]]:
    """What the taps have seen, each time that the experts were run."""
    seen = {part: recorder.values((mixture.name, part)) for part in mixture.taps}
    return [dict(zip(seen, of_use, strict=True)) for of_use in zip(*seen.values(), strict=True)]


def _routes(mixture: Mixture, seen: Mapping[str, Tensor]) -> Routes:
    routes = mixture.routes(seen)
    if (
        routes.experts.numel()
        and not 0 <= int(routes.experts.min()) <= int(routes.experts.max()) < mixture.n_experts
    ):
        raise NotImplementedError(
            f"{mixture.name}: tokens are routed to experts that are not there, as where experts "
            "are spread over processes (expert parallelism), which is not supported"
        )
    return routes
