"""Every parameter has a site, or a reason why not, and what the reason says is true."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.families import FAMILIES, FLOAT32_ONLY, make
from helpers.gradients import reference_loss
from helpers.matrices import DENSE, default_size, matrix_share
from helpers.versions import TL_VERSION

import tl_backward as tlb
from tl_backward.sites.transformer_bridge import named_parameters

TOKENS, TARGET = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5
BIAS = re.compile(r"cache\.bias_gradient\('([^']*)'\)")
NOT_IN_USE = re.compile("no longer used|replaced by a processed")
WITHOUT_GRADIENT = re.compile(r"indexer|correction_bias|expert_bias|z_L_init")
"""What only chooses experts or positions, or runs under ``torch.no_grad()`` (hrm_text)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_reasons_are_true(family, tokenizer):
    """By autograd: a bias has the gradient that is named, and what is not in use has none."""
    dtype = torch.float32 if family in FLOAT32_ONLY else torch.float64
    model = make(family, tokenizer, dtype)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    rows = tlb.coverage(model)
    assert family not in DENSE or matrix_share(model) == 1
    assert rows.parameter.is_unique and (rows.site.notna() ^ rows.reason.notna()).all()

    named = {one.name: one.parameter for one in named_parameters(model)}
    parameters = [named[name].requires_grad_() for name in rows.parameter]
    loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if family in FLOAT32_ONLY else {"rtol": 1e-9}
    for row, gradient in zip(rows.itertuples(), gradients, strict=True):
        if isinstance(row.site, str):
            assert gradient is not None
            continue
        says_unused = bool(NOT_IN_USE.search(row.reason))
        if WITHOUT_GRADIENT.search(row.parameter):
            assert gradient is None and not says_unused
            continue
        assert says_unused == (gradient is None), f"{row.parameter}: {row.reason}"
        if row.reason.startswith("bias: "):
            # the gradient of b_K is 0, because softmax does not see a shift
            got = sum(cache.bias_gradient(site) for site in BIAS.findall(row.reason))
            torch.testing.assert_close(got, gradient, **{"atol": 1e-12} | tolerance)


@pytest.mark.skipif(TL_VERSION < 4, reason="checked for TransformerLens 4.3")
@pytest.mark.parametrize(
    "model_type", ["mamba", "bamba", "recurrent_gemma", "rwkv", "zamba2", "qwen3_5_text"]
)
def test_recurrent_models_of_default_size(model_type, tokenizer):
    """What remains are convolutions, decays and a shared block's choice of adapters."""
    assert matrix_share(default_size(model_type, tokenizer)) >= 0.9
