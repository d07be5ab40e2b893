"""Mixtures of experts of the class HookedTransformer."""

from __future__ import annotations

import pytest
import torch
import transformer_lens
from helpers.hooked import D_VOCAB, GATED, build
from helpers.mixtures import assert_autograds
from helpers.state import state
from helpers.versions import NEEDS_HOOKED_TRANSFORMER

import tl_backward as tlb

pytestmark = NEEDS_HOOKED_TRANSFORMER

EXPERTS = {**GATED, "num_experts": 5, "experts_per_token": 2, "normalization_type": "RMS"}
PROMPT, TEXTS, TARGETS = [3, 9, 1, 17, 5, 2], [[3, 9, 1, 17], [4, 7], [12]], [[5], [7], [11]]


@pytest.fixture(params=["Mixtral", "GptOss"])
def model(request):
    if request.param == "GptOss" and not _has_gpt_oss():
        pytest.skip("this TransformerLens has no GPT-OSS")
    return build(**EXPERTS, original_architecture=f"{request.param}ForCausalLM").double()


def _has_gpt_oss():
    components = transformer_lens.components
    return hasattr(components, "GptOssMoE") or hasattr(
        getattr(components, "mlps", None), "gpt_oss_moe"
    )


def test_every_matrix_against_autograd(model):
    sites = tlb.weight_sites(model)
    assert len([site for site in sites if site.expert is not None]) == 2 * 5 * 3
    before = state(model)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, 5)
    assert state(model) == before
    tokens = torch.tensor([PROMPT])
    assert_autograds(model, sites, cache, tokens=tokens)
    rows = [len(cache["W_in", 0, e].vjps) for e in range(5)]
    assert sum(rows) == 2 * len(PROMPT)


def test_batches_give_each_text_what_it_gets_alone(model):
    _, batch = tlb.run_with_backward_cache(model, TEXTS, TARGETS)
    for b, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        _, alone = tlb.run_with_backward_cache(model, text, target)
        of_one = batch.example(b)
        for name, g in alone.items():
            assert of_one[name].vjps.shape == g.vjps.shape, name
            torch.testing.assert_close(of_one[name].dense(), g.dense(), rtol=1e-9, atol=1e-12)


def test_hooks_inside_an_expert_take_part(model):
    """TransformerLens has HookPoints there, behind which autograd sees the same."""
    hooks = [("blocks.0.mlp.experts.1.hook_post", lambda post, hook: 2 * post)]
    _, cache = tlb.run_with_backward_cache(model, PROMPT, 5, fwd_hooks=hooks)
    with model.hooks(fwd_hooks=hooks):
        assert_autograds(model, tlb.weight_sites(model), cache, tokens=torch.tensor([PROMPT]))


def test_the_lens_reads_one_cell_for_each_layer(model):
    model.tokenizer = None
    _, cache = tlb.run_with_backward_cache(model, PROMPT, 5)
    routing = cache.routings["blocks.1.mlp.experts"]
    total = sum(cache["W_out", 1, e].vjps.square().sum() for e in range(5))
    scaled = routing.vjps * routing.weights.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(scaled.square().sum(), total, rtol=1e-6, atol=0)


def test_shifts_are_refused_by_name(model):
    with pytest.raises(NotImplementedError, match="use a TransformerBridge"):
        tlb.forward_pass_shift(model, PROMPT, 5, layer=0, lr=0.1)


def test_edits_are_applied_and_reverted(model):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _, cache = tlb.run_with_backward_cache(model, PROMPT, 5)
    edit = tlb.gradient_step(cache, lr=0.1, weights="W_out", model=model)
    loss = cache.loss
    with edit.applied():
        assert tlb.run_with_backward_cache(model, PROMPT, 5)[0] < loss
    assert all(map(torch.equal, model.parameters(), before))
    assert max(PROMPT) < D_VOCAB
