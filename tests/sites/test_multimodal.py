"""Multimodal models, run on text: every site, by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import (
    finite_difference,
    gradient_of_parameter,
    gradients_of_sites,
    reference_loss,
    relative_error,
)
from helpers.multimodal import TEXT_MODELS, make_multimodal
from helpers.versions import NEEDS_BRIDGE, TL_VERSION

import tl_backward as tlb
from tl_backward.sites.transformer_bridge import named_parameters

pytestmark = [
    NEEDS_BRIDGE,
    pytest.mark.skipif(TL_VERSION < 4, reason="checked for TransformerLens 4.3"),
]

TOKENS, TARGET = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5


@pytest.fixture(scope="module", params=TEXT_MODELS)
def model(request, tokenizer):
    return make_multimodal(request.param, tokenizer)


def test_every_site(model):
    sites = tlb.weight_sites(model)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    gradients = gradients_of_sites(reference_loss(model, TOKENS, TARGET), sites)
    for site, gradient in zip(sites, gradients, strict=True):
        got = gradient_of_parameter(sites, cache, site)
        if site.expert is not None and not gradient.any():  # no token is routed to it
            assert not got.any()
            continue
        assert gradient.norm() > 0
        assert relative_error(got, gradient) <= 1e-10, site.name
    for name in ("blocks.1.attn.W_Q", "blocks.1.attn.W_O"):
        (site,) = [site for site in sites if site.name == name]
        got = site.to_parameter_layout(cache[name].dense())
        direction = got / got.norm()
        slope = finite_difference(model, TOKENS, TARGET, site.parameter, direction, 1e-3)
        assert (slope - got.norm()).abs() <= 1e-2 * got.norm()


def test_coverage(model):
    """What no text passes is named, and has no gradient."""
    rows = tlb.coverage(model)
    unused = rows[rows.reason.fillna("").str.contains("through which no text passes")]
    assert len(unused) and rows.site.notna().any()
    named = {one.name: one.parameter for one in named_parameters(model)}
    parameters = [named[name].requires_grad_() for name in rows.parameter]
    loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    without = {n for n, g in zip(rows.parameter, gradients, strict=True) if g is None}
    assert without - {"model.image_newline"} == set(unused.parameter)  # a vector of LLaVA-NeXT


def test_the_lens_reads_the_text_model(model):
    result = tlb.BackwardLogitLens(model)(TOKENS, TARGET, weights="W_O", layers=1, top_k=3)
    assert result["W_O"].top_ids.shape == (1, 9, 3)
