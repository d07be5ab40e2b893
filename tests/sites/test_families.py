"""Every site of every decoder-only family that TransformerLens's bridge boots offline."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.families import (
    FAMILIES,
    FLOAT32_INSIDE,
    FLOAT32_ONLY,
    PADDING_CHANGES_TL_3,
    SEE_PADDING_ON_THE_LEFT,
    TRUNCATED_BACKWARD,
    make,
)
from helpers.gradients import (
    finite_difference,
    gradient_of_parameter,
    gradients_of_sites,
    reference_loss,
    relative_error,
)
from helpers.state import left_as_it_came
from helpers.summary import SUMMARY
from helpers.versions import NEEDS_BRIDGE, TL_VERSION

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE

TOKENS = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]])
TARGET = 5
COARSE, NOISE = 2e-2, 1e-5
"""How exact a difference quotient is, and the norm of a gradient that is lost in its noise."""
PROMPTS, TARGETS = [[3, 9, 1, 17, 5, 11, 2, 8, 30], [4, 7, 2], [12, 1, 33, 6]], [[5], [7, 9], [11]]


@dataclass
class Row:
    sites: int
    without: int
    autograd: float
    finite_difference: float


@pytest.fixture(scope="module")
def report(request):
    """Adds the table that the README quotes to the summary of the test run."""
    rows: dict[str, Row] = {}
    yield rows
    if not rows:
        return
    exact = [row.autograd for family, row in rows.items() if family not in FLOAT32_ONLY]
    request.config.stash[SUMMARY].extend(
        [
            f"{'family':24} {'sites':>5} {'none':>5} {'autograd':>9} {'finite difference':>18}",
            *(
                f"{family:24} {row.sites:5} {row.without:5} {row.autograd:9.1e} "
                f"{row.finite_difference:18.1e}"
                for family, row in rows.items()
            ),
            f"{len(rows)} families, {sum(row.sites for row in rows.values())} sites; against "
            f"autograd, relative and in float64: at most {max(exact, default=0):.1e}",
        ]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def lent(family, tokenizer, dtype):
    model = make(family, tokenizer, dtype)
    model(TOKENS)  # adds hooks to its norms
    yield from left_as_it_came(model)


@pytest.fixture(scope="module")
def in_float64(family, tokenizer):
    yield from lent(family, tokenizer, torch.float32 if family in FLOAT32_ONLY else torch.float64)


@pytest.fixture(scope="module")
def in_float32(family, tokenizer):
    yield from lent(family, tokenizer, torch.float32)


@pytest.fixture(scope="module")
def alone(in_float32):
    """Loss and cache of each prompt without the others."""
    return [
        tlb.run_with_backward_cache(in_float32, prompt, target)
        for prompt, target in zip(PROMPTS, TARGETS, strict=True)
    ]


def test_every_site(family, in_float64, report):
    """Autograd to 1e-10 and a finite difference, for every site.

    Transformers computes RMSNorm, rotary embeddings and softmax in float32 whatever the model's
    dtype, so the difference quotient carries that noise: a large step, and a tolerance relative to
    the gradient's norm. A gradient that is below the noise has no quotient.
    """
    model = in_float64
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    sites = tlb.weight_sites(model)
    assert {"embed.W_E", "unembed.W_U"} <= set(cache) == {site.name for site in sites}
    reference = reference_loss(model, TOKENS, TARGET)
    gradients = gradients_of_sites(reference, sites)
    generator = torch.Generator().manual_seed(0)
    exact, coarse = 0.0, 0.0
    found = [gradient_of_parameter(sites, cache, site) for site in sites]
    for site, got, gradient in zip(sites, found, gradients, strict=True):
        assert got.shape == site.parameter.shape
        if site.expert is not None and not gradient.any():
            assert not got.any()
            continue
        assert gradient.norm() > 0
        error = relative_error(got, gradient)
        if site.kind in FLOAT32_INSIDE.get(family, ()):
            assert error <= 1e-6
        else:
            exact = max(exact, error)
        direction = torch.randn(got.shape, generator=generator, dtype=got.dtype)
        direction = direction / direction.norm() + got / got.norm()
        for step in (1e-3, 1e-4):  # the larger one may send tokens to other experts
            slope = finite_difference(model, TOKENS, TARGET, site.parameter, direction, step)
            error = float((slope - (got * direction).sum()).abs() / got.norm())
            if error <= COARSE or got.norm() < NOISE:
                break
        coarse = max(coarse, 0.0 if got.norm() < NOISE else error)
    covered = tlb.coverage(model)
    assert covered.parameter.is_unique
    assert (covered.site.notna() ^ covered.reason.notna()).all()
    report[family] = Row(len(sites), int(covered.site.isna().sum()), exact, coarse)
    assert exact <= (1e-4 if family in FLOAT32_ONLY else 1e-10)
    assert coarse <= COARSE or family in TRUNCATED_BACKWARD


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(family, side, in_float32, alone):
    """In float64 many of these models make nan of padding on the left."""
    if TL_VERSION < 4 and family in PADDING_CHANGES_TL_3:
        pytest.skip(f"TransformerLens 3: {PADDING_CHANGES_TL_3[family]}")
    arguments = {"padding_side": side}
    if family in SEE_PADDING_ON_THE_LEFT and side == "left":
        with pytest.raises(NotImplementedError, match="padding_side='right'"):
            tlb.run_with_backward_cache(in_float32, PROMPTS, TARGETS, **arguments)
        return
    losses, cache = tlb.run_with_backward_cache(in_float32, PROMPTS, TARGETS, **arguments)
    for b, (loss, one) in enumerate(alone):
        torch.testing.assert_close(losses[b], loss, rtol=1e-5, atol=1e-5)
        for name, g in cache.example(b).items():
            error = (g.dense() - one[name].dense()).norm()
            assert error <= 1e-4 * one[name].norm() + 1e-7, name  # a router's may cancel


def test_hook_points_exist(in_float64):
    names = {
        name
        for site in tlb.weight_sites(in_float64)
        for name in (site.hook_in, site.hook_out, site.hook_residual)
        if name is not None
    }
    assert names <= set(in_float64.hook_dict)
