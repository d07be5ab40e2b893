"""The capture of mixtures of experts: what to record, and the factors built from the records."""

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
    """Record the inputs, routes and VJPs of a layer's experts."""
    for part, tap in mixture.taps.items():
        recorder.keep_value(tap(), (mixture.name, part))
    recorder.keep_place(mixture.output(), (mixture.name, "y"), alone=True)
    if mixture.residual_tap is not None:
        recorder.keep_place(mixture.residual_tap(), (mixture.name, "residual"))


def routing_of(
    recorder: Recorder, mixture: Mixture, vjps: Mapping[Any, list[Tensor]], rows: Rows
) -> Routing:
    """The recorded routing of a layer.

    Raises:
        NotImplementedError: If tokens were routed to experts that do not exist here.
    """
    uses = _uses(recorder, mixture)
    routes = [_routes(mixture, seen) for seen in uses]
    return Routing(
        rows.of([seen["input"] for seen in uses]),
        rows.of(vjps[mixture.name, "y"]),
        rows.of([one.experts for one in routes]),
        rows.of([one.weights for one in routes]),
        mixture.stacked is not None and mixture.stacked.plan.scales_input,
        rows.lengths(len(uses)),
    )


def factors_by_expert(
    recorder: Recorder,
    sites: Sequence[WeightSite],
    routings: Mapping[str, Routing],
    vjps: Mapping[Any, list[Tensor]],
    rows: Rows,
) -> dict[str, GradientFactors | ExpertFactors]:
    """The factors of experts' matrices; those of stacked experts are computed on access."""
    stacked = {
        name: RoutedExperts(routings[name], mixture.stacked.remembered())
        for name, mixture in mixtures_of(sites).items()
        if mixture.stacked is not None
    }
    found: dict[str, GradientFactors | ExpertFactors] = {}
    for site in sites:
        if site.mixture is None or site.expert is None:
            continue
        experts = stacked.get(site.mixture.name)
        if experts is not None:
            found[site.name] = ExpertFactors(
                experts, site.expert, site.kind, (site.d_in, site.d_out)
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
    """The factors of a matrix in its own module, which multiplies the routed tokens by it."""
    mixture, expert = site.mixture, site.expert
    assert mixture is not None and mixture.rows is not None and expert is not None
    picked = [mixture.rows(seen, expert) for seen in _uses(recorder, mixture)]
    n_tokens = len(rows.starts) * rows.width

    def routed(tensors: Sequence[Tensor]) -> Tensor:
        each = []
        for tensor, (indices, tokens) in zip(tensors, picked, strict=True):
            whole = tensor.new_zeros(n_tokens, tensor.shape[-1])
            whole[tokens.to(tensor.device)] = tensor[indices.to(tensor.device)]
            each.append(whole)
        return routing.rows(expert, rows.of(each))

    x, y = recorder.values(site.name), vjps.get((site.name, "y"), [])
    if not x:  # some models skip an expert without tokens
        lengths = routing.n_rows(expert)
        none = routing.inputs.new_zeros
        return GradientFactors(none(0, site.d_in), none(0, site.d_out), lengths)
    return GradientFactors(routed(x), routed(y), routing.n_rows(expert))


def _uses(recorder: Recorder, mixture: Mixture) -> list[dict[str, Tensor]]:
    """The tensors recorded by the taps, for each run of the experts."""
    seen = {part: recorder.values((mixture.name, part)) for part in mixture.taps}
    return [dict(zip(seen, use, strict=True)) for use in zip(*seen.values(), strict=True)]


def _routes(mixture: Mixture, seen: Mapping[str, Tensor]) -> Routes:
    routes = mixture.routes(seen)
    if (
        routes.experts.numel()
        and not 0 <= int(routes.experts.min()) <= int(routes.experts.max()) < mixture.n_experts
    ):
        raise NotImplementedError(
            f"{mixture.name}: tokens are routed to experts that do not exist here; experts "
            "distributed over processes (expert parallelism) are not supported"
        )
    return routes
