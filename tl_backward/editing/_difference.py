"""What a fine-tune added to each weight, as truncated singular value decompositions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._integers import is_integer
from tl_backward._precision import full_precision, stable_norm, upcast_dtype
from tl_backward._user_warnings import warn_user
from tl_backward.factors import FactoredSVD, GradientFactors
from tl_backward.sites import (
    FoundSites,
    Model,
    WeightSite,
    find_sites,
    parameters_without_site,
    weights_processing,
)
from tl_backward.sites.site import UnsupportedWeight

OVERSAMPLED = 10
"""Directions that the randomised decomposition looks for beyond those that are kept."""
ITERATIONS = 2
"""Its power iterations; each costs two products with the matrix."""
LARGE = 4
"""A matrix is large where its smaller side is this many times what is looked for."""


class SiteDifference(NamedTuple):
    """What a fine-tune wrote into one weight.

    Attributes:
        site: Name of the site.
        norm: Frobenius norm of the whole difference.
        rank: How many singular directions the edit holds of it.
        left_out: Share of the energy (squared Frobenius norm) that the edit does not hold.
    """

    site: str
    norm: float
    rank: int
    left_out: float


class OutsideDifference(NamedTuple):
    """A parameter that differs and that an edit cannot hold.

    Attributes:
        parameter: Its name.
        norm: Norm of the difference.
        reason: Why it has no site.
    """

    parameter: str
    norm: float
    reason: str


@dataclass(frozen=True)
class DifferenceReport:
    """How much of a fine-tune an edit holds.

    Attributes:
        sites: The weights, in the order of the model, also those that do not differ.
        outside: Parameters without a site that differ: norms, biases and so on. Empty where only
            some weights or layers were asked for.
    """

    sites: tuple[SiteDifference, ...]
    outside: tuple[OutsideDifference, ...]


def difference_factors(
    base: Model,
    tuned: Model,
    weights: str | Iterable[str] | None,
    layers: int | Iterable[int] | None,
    rank: int | float,
) -> tuple[dict[str, GradientFactors], DifferenceReport]:
    """See :meth:`WeightEdit.from_difference`."""
    _require_rank(rank)
    kinds = weights if weights is None or isinstance(weights, str) else list(weights)
    which = layers if layers is None or not isinstance(layers, Iterable) else list(layers)
    ours, theirs = find_sites(base), find_sites(tuned)
    _require_same_kind(base, tuned)
    pairs = _fitting_pairs(ours, theirs, kinds, which)
    factors: dict[str, GradientFactors] = {}
    found = []
    for site, other in pairs:
        kept, difference = _of_site(site, other, rank)
        found.append(difference)
        if kept is not None:
            factors[site.name] = kept
    whole = weights is None and layers is None
    outside = tuple(_outside(base, tuned)) if whole else ()
    if outside:
        warn_user(
            f"base, tuned: {len(outside)} parameters differ that an edit cannot hold, such as "
            f"{outside[0].parameter} ({outside[0].reason}); edit.report.outside lists them"
        )
    return factors, DifferenceReport(tuple(found), outside)


def _require_rank(rank: Any) -> None:
    is_share = isinstance(rank, float) and 0 < rank < 1
    if not is_share and not (is_integer(rank) and rank >= 1):
        raise ValueError(
            f"rank must be a positive integer, or a share of the energy in (0, 1), got {rank!r}"
        )


def _fitting_pairs(
    ours: FoundSites,
    theirs: FoundSites,
    weights: str | Sequence[str] | None,
    layers: int | Sequence[int] | None,
) -> list[tuple[WeightSite, WeightSite]]:
    """The sites of both models, each weight once."""
    for model, found in (("base", ours), ("tuned", theirs)):
        _require_plain(model, found)
    if ours.n_layers != theirs.n_layers:
        raise ValueError(f"base has {ours.n_layers} layers and tuned {theirs.n_layers}")
    sites = {site.name: site for site in ours.select(weights, layers)}
    others = {site.name: site for site in theirs.select(weights, layers)}
    for name in [*sites, *others]:
        for model, names in (("base", sites), ("tuned", others)):
            if name not in names:
                advice = "; merge the adapters first" if "lora_" in name else ""
                raise ValueError(f"{model} has no site {name}, and the other model has{advice}")
    pairs: list[tuple[WeightSite, WeightSite]] = []
    seen: set[str] = set()
    for name, site in sites.items():
        other = others[name]
        if (site.d_in, site.d_out) != (other.d_in, other.d_out):
            raise ValueError(
                f"{name} is [{site.d_in}, {site.d_out}] in base and [{other.d_in}, {other.d_out}] "
                "in tuned; compare models of one shape and vocabulary"
            )
        untied = [tie for tie in site.tied_to if tie not in other.tied_to]
        if untied:
            raise ValueError(
                f"{name} and {untied[0]} share a weight in base and have one each in tuned, so no "
                "edit of base makes tuned of it; untie them in base first"
            )
        if not seen.intersection(site.tied_to):
            pairs.append((site, other))
        seen.add(name)
    return pairs


def _require_plain(model: str, found: FoundSites) -> None:
    """Refuse quantised weights: what was written into them is below their rounding."""
    every: list[WeightSite | UnsupportedWeight] = [*found.sites, *found.unsupported]
    for one in every:
        parameter = one.parameter
        if parameter is None:
            continue
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            kind = f"{type(parameter.data).__name__}, {parameter.dtype}"
            raise NotImplementedError(
                f"{one.name} of {model} is stored quantised ({kind}); load {model} in float32 or "
                "bfloat16, or read the adapter with WeightEdit.from_peft"
            )
        if parameter.device.type == "meta":
            raise NotImplementedError(
                f"{one.name} of {model} is offloaded; load {model} without offloading"
            )


def _require_same_kind(base: Model, tuned: Model) -> None:
    """Refuse equal shapes of another meaning."""
    for what, of_base, of_tuned in (
        ("architecture", _architecture(base), _architecture(tuned)),
        ("processing of the weights", weights_processing(base), weights_processing(tuned)),
    ):
        if of_base != of_tuned:
            raise ValueError(f"base and tuned differ in their {what}: {of_base} and {of_tuned}")
    ours, theirs = _vocabulary(base), _vocabulary(tuned)
    if not ours or not theirs:
        return
    for token in ours.keys() & theirs.keys():
        if ours[token] != theirs[token]:
            raise ValueError(
                f"base and tuned have other tokenizers: {token!r} is token {ours[token]} in base "
                f"and {theirs[token]} in tuned"
            )
    strings = {i: token for token, i in ours.items()}
    for token, i in theirs.items():
        if strings.get(i, token) != token:
            raise ValueError(
                f"base and tuned have other tokenizers: token {i} is {strings[i]!r} in base and "
                f"{token!r} in tuned"
            )


def _architecture(model: Model) -> str | None:
    name = getattr(model.cfg, "original_architecture", None) or getattr(
        model.cfg, "architecture", None
    )
    return None if name is None else str(name)


def _vocabulary(model: Model) -> dict[str, int]:
    return {} if model.tokenizer is None else dict(model.tokenizer.get_vocab())


def _of_site(
    site: WeightSite, other: WeightSite, rank: int | float
) -> tuple[GradientFactors | None, SiteDifference]:
    """The leading singular directions of one weight's difference."""
    return leading_directions(site.name, _difference(site, other), rank)


@torch.no_grad()
def leading_directions(
    name: str, D: Float[Tensor, "d_in d_out"], rank: int | float
) -> tuple[GradientFactors | None, SiteDifference]:
    """The leading singular directions of a matrix, which is overwritten; none of zero.

    Args:
        name: The site.
        D: The matrix, in float32 or float64.
        rank: As in :meth:`WeightEdit.from_difference`.
    """
    with full_precision(D.device):
        largest = torch.stack(D.aminmax()).abs().amax()
        if largest == 0:
            return None, SiteDifference(name, 0.0, 0, 0.0)
        D /= largest  # in place, and so that no square overflows or vanishes
        unit = torch.linalg.vector_norm(D)
        D /= unit
        norm = largest * unit
        U, S, Vh = _share(D, float(rank)) if isinstance(rank, float) else _leading(D, rank)
        left_out = torch.linalg.vector_norm(D.addmm_(U * S, Vh, alpha=-1)) ** 2
        factors = GradientFactors((U * (S * norm)).mT.contiguous(), Vh.contiguous())
    return factors, SiteDifference(name, float(norm), len(S), float(left_out))


@torch.no_grad()
def _difference(site: WeightSite, other: WeightSite) -> Float[Tensor, "d_in d_out"]:
    """``W_tuned - W_base`` in a precision to compute in."""
    ours, theirs = site.parameter.detach(), other.parameter.detach()
    for model, weight in (("base", ours), ("tuned", theirs)):
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"{site.name} of {model} has values that are not finite")
    dtype = upcast_dtype(ours.dtype, theirs.dtype)
    D = torch.empty(site.d_in, site.d_out, dtype=dtype, device=ours.device)
    other.to_parameter_layout(D).copy_(theirs)
    site.to_parameter_layout(D).sub_(ours)
    return D


def _leading(D: Float[Tensor, "d_in d_out"], k: int) -> FactoredSVD:
    """The ``k`` leading singular directions, or all there are."""
    looked_for = k + OVERSAMPLED
    if LARGE * looked_for > min(D.shape):
        return _kept(_dense_svd(D), min(k, *D.shape))
    return _kept(_randomised_svd(D, looked_for), k)


def _share(D: Float[Tensor, "d_in d_out"], share: float) -> FactoredSVD:
    """The fewest singular directions with this share of the energy of a matrix of norm 1."""
    looked_for = 2 * OVERSAMPLED
    while LARGE * looked_for <= min(D.shape):
        svd = _randomised_svd(D, looked_for)
        energy = svd.S.square().cumsum(0)
        if energy[-1] >= share:
            return _kept(svd, int((energy < share).sum()) + 1)
        looked_for *= 2
    svd = _dense_svd(D)
    return _kept(svd, min(int((svd.S.square().cumsum(0) < share).sum()) + 1, len(svd.S)))


def _kept(svd: FactoredSVD, k: int) -> FactoredSVD:
    return FactoredSVD(svd.U[:, :k], svd.S[:k], svd.Vh[:k])


def _dense_svd(D: Float[Tensor, "d_in d_out"]) -> FactoredSVD:
    return FactoredSVD(*torch.linalg.svd(D, full_matrices=False))


def _randomised_svd(D: Float[Tensor, "d_in d_out"], q: int) -> FactoredSVD:
    """An approximation of rank ``q``, the same each time; the random state stays as it is."""
    devices = [D.device] if D.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(D, q, niter=ITERATIONS)
    return FactoredSVD(U, S, V.mT)


@torch.no_grad()
def _outside(base: Model, tuned: Model) -> list[OutsideDifference]:
    """The parameters without a site that differ."""
    ours, theirs = parameters_without_site(base), parameters_without_site(tuned)
    missing = ours.keys() ^ theirs.keys()
    if missing:
        name = min(missing)
        model = "tuned" if name in ours else "base"
        raise ValueError(f"{model} has no parameter {name}, and the other model has")
    found = []
    for name, (parameter, reason) in ours.items():
        other = theirs[name][0]
        if parameter.shape != other.shape:
            raise ValueError(
                f"{name} is {list(parameter.shape)} in base and {list(other.shape)} in tuned"
            )
        difference = other.detach().to(parameter.device) - parameter.detach()
        norm = float(stable_norm(difference))
        if norm != 0:
            found.append(OutsideDifference(name, norm, reason))
    return found
