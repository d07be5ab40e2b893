"""SmolLM2-135M-Instruct, float32."""

from __future__ import annotations

import torch
from helpers.gradients import reference_loss, relative_error
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.demo_model import load_demo_model

pytestmark = NEEDS_BRIDGE

PROMPT, TARGET = "Lionel Messi plays for", " Paris"


def test_the_target_is_the_least_probable_token_in_late_layers(smollm2):
    result = tlb.BackwardLogitLens(smollm2)(PROMPT, TARGET, layers=range(22, 29))
    at_the_bottom = result["W_out"].target_ranks[:, -1] == result.d_vocab - 1
    assert at_the_bottom.sum() >= 3
    first = [layer[-1][0] for layer in result["W_out"].bottom_tokens()]
    assert [token == TARGET for token in first] == at_the_bottom.tolist()


def test_each_token_of_a_target_is_the_least_probable_where_it_is_predicted(smollm2):
    prompt, target = "The American football player is a", " linebacker"
    result = tlb.BackwardLogitLens(smollm2)(prompt, target, layers=[24, 27], top_k=1)
    bottom = [[token[0] for token in layer[-3:]] for layer in result["W_out"].bottom_tokens()]
    assert bottom == [[" line", "back", "er"]] * 2
    assert result["W_out"].target_ranks[:, -3:].eq(result.d_vocab - 1).all()


def test_the_last_layer_has_a_vjp_at_the_last_token_only(smollm2):
    _, cache = tlb.run_with_backward_cache(
        smollm2, PROMPT, TARGET, weights=("W_in", "W_gate", "W_out"), layers=-1
    )
    for g in cache.values():
        assert g.vjps[:-1].eq(0).all() and g.vjps[-1].ne(0).any()


def test_a_batch_is_as_near_to_float64_as_its_examples_alone(smollm2):
    """In float32 the sum over the vocabulary at the unembedding leaves 1e-4 of rounding."""
    prompts = [PROMPT, "The capital of France is", "Water freezes at a temperature of zero"]
    arguments = {"weights": ("W_O", "W_out"), "layers": (0, 14, 29)}
    _, batch = tlb.run_with_backward_cache(smollm2, prompts, TARGET, **arguments)
    alone = [
        tlb.run_with_backward_cache(smollm2, prompt, TARGET, **arguments)[1] for prompt in prompts
    ]
    exact_model = load_demo_model().double()
    for b, prompt in enumerate(prompts):
        _, exact = tlb.run_with_backward_cache(exact_model, prompt, TARGET, **arguments)
        for name, g in exact.items():
            for cache in (batch.example(b), alone[b]):
                assert relative_error(cache[name].inputs.double(), g.inputs) <= 1e-5, name
                assert relative_error(cache[name].vjps.double(), g.vjps) <= 3e-4, name


def test_factors_equal_autograd(smollm2):
    _, cache = tlb.run_with_backward_cache(smollm2, PROMPT, TARGET)
    sites = [site for site in tlb.weight_sites(smollm2) if site.layer in (0, 14, 29)]
    loss = reference_loss(smollm2, smollm2.to_tokens(PROMPT), smollm2.to_single_token(TARGET))
    gradients = torch.autograd.grad(loss, [site.parameter for site in sites])
    for site, gradient in zip(sites, gradients, strict=True):
        got = site.to_parameter_layout(cache[site.name].dense())
        assert relative_error(got, gradient) <= 1e-4, site.name
