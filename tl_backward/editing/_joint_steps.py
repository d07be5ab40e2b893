"""Joint search for the smallest steps of several terms, one step per term."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.editing._step_search import EXPONENTS, N_PARTS, N_ROUNDS

N_TURNS = 6
GROWTH = tuple(1.06**k for k in (1, 2, 4, 6, 9, 12, 16))
"""Factors, up to about 2.5, that raise the steps of failing terms in one turn."""

Gaps: TypeAlias = Callable[[Float[Tensor, "copy term"]], Float[Tensor, "copy term"]]


class Steps(NamedTuple):
    """The step of each term, and its gap with all steps in place."""

    sizes: Float[Tensor, "term"]
    gaps: Float[Tensor, "term"]


def smallest_steps(gaps: Gaps, n_terms: int, guess: float, margin: float) -> Steps:
    """For each term, approximately the smallest step with a gap of at least ``margin``.

    The steps of all terms are tried simultaneously: powers of two, then parts of the interval below
    each term's first success. Then steps that fail with the others in place are raised, up to six
    times. The search assumes that terms interact little.

    Args:
        gaps: The gaps of all terms for each of several choices of their steps.
        n_terms: Number of terms.
        guess: A step that adds as much as the output already has.
        margin: The gap to reach.

    Returns:
        The choice with the most successes; among equals, the one with the largest worst gap.
    """
    powers = guess * 2.0 ** torch.tensor(list(EXPONENTS), dtype=torch.float64)
    tried = powers[:, None].expand(-1, n_terms)
    below = torch.cat([torch.zeros(1, n_terms, dtype=tried.dtype), tried[:-1]])
    reached = gaps(tried).double()
    found = (reached >= margin).any(0)
    which = _first_success(reached, margin)
    sizes, least = _chosen(tried, which), _chosen(below, which)
    for _ in range(N_ROUNDS):
        parts = torch.arange(1, N_PARTS, dtype=torch.float64)[:, None] / N_PARTS
        tried = torch.where(found, least + parts * (sizes - least), sizes)
        reached = gaps(tried).double()
        better = found & (reached >= margin).any(0)
        which = _first_success(reached, margin)
        below = torch.cat([least[None], tried[:-1]])
        least = torch.where(better, _chosen(below, which), torch.where(found, tried[-1], least))
        sizes = torch.where(better, _chosen(tried, which), sizes)
    return _settled(gaps, sizes, margin)


def _settled(gaps: Gaps, sizes: Float[Tensor, "term"], margin: float) -> Steps:
    """Raise the steps that fail with the others in place."""
    best = steps = Steps(sizes, gaps(sizes[None])[0].double())
    for _ in range(N_TURNS):
        failing = steps.gaps < margin
        if not failing.any():
            break
        growth = torch.tensor(GROWTH, dtype=sizes.dtype)[:, None]
        tried = torch.where(failing, growth * steps.sizes, steps.sizes)
        which = _first_success(gaps(tried).double(), margin)
        sizes = torch.where(failing, _chosen(tried, which), steps.sizes)
        steps = Steps(sizes, gaps(sizes[None])[0].double())
        best = max(best, steps, key=lambda one: _merit(one, margin))
    return best


def _first_success(reached: Float[Tensor, "copy term"], margin: float) -> Tensor:
    """For each term, the first choice that succeeds, otherwise the one with the largest gap."""
    succeeds = reached >= margin
    return torch.where(succeeds.any(0), succeeds.int().argmax(0), reached.argmax(0))


def _chosen(tried: Float[Tensor, "copy term"], which: Tensor) -> Float[Tensor, "term"]:
    return tried.gather(0, which[None])[0]


def _merit(steps: Steps, margin: float) -> tuple[int, float]:
    return int((steps.gaps >= margin).sum()), float(steps.gaps.min())
