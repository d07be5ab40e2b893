"""The capture of mixtures of experts: at the boundary, and expanded when asked for."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers.families import make
from helpers.gradients import gradients_of_sites
from helpers.mixtures import TARGET, TARGETS, TEXTS, TOKENS, assert_autograds, autograd
from helpers.state import state
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE


@pytest.fixture(params=["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def family(request):
    return request.param


@pytest.fixture
def mixtral(tokenizer):
    model = make("mixtral", tokenizer)
    model(TOKENS)  # adds hooks to its norms
    return model


def experts_of(model, layer=0):
    return model.blocks[layer].mlp.original_component.experts


def expert_names(cache):
    return [name for name in cache if ".experts." in name]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation(tokenizer, implementation):
    """In float32, as the grouped kernels know no float64: near autograd of the same in float64."""
    exact = make("mixtral", tokenizer)
    model = make("mixtral", tokenizer, torch.float32)
    for layer in (0, 1):
        experts_of(model, layer).config._experts_implementation = implementation
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    sites = tlb.weight_sites(model)
    for name, expected in autograd(exact, tlb.weight_sites(exact)).items():
        site = next(site for site in sites if site.name == name)
        got = site.to_parameter_layout(cache[name].dense())
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def test_positions_keep_the_rows_of_their_tokens(tokenizer, family):
    model = make(family, tokenizer)
    _, whole = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    parts = [
        tlb.run_with_backward_cache(model, TOKENS, TARGET, positions=some)[1]
        for some in ([0, 3, 8], [1, 2], [4, 5, 6, 7])
    ]
    for name in expert_names(whole):
        total = sum(part[name].dense() for part in parts)
        torch.testing.assert_close(total, whole[name].dense(), rtol=1e-10, atol=1e-14)
        assert sum(len(part[name].inputs) for part in parts) == len(whole[name].inputs)
    routed = sum(
        len(whole[name].inputs) for name in expert_names(whole) if name.endswith("1.W_out")
    )
    assert 0 < routed < 2 * TOKENS.shape[1] * 2


def test_files_hold_the_factors_of_experts(tokenizer, family, tmp_path):
    model = make(family, tokenizer)
    _, cache = tlb.run_with_backward_cache(model, TEXTS, TARGETS, padding_side="right")
    path = cache.save(tmp_path / "cache.safetensors")
    expected = {name: (g.inputs, g.vjps, g.lengths) for name, g in cache.items()}
    routings = cache.routings
    del model, cache
    gc.collect()
    loaded = tlb.BackwardCache.load(path)
    assert list(loaded) == list(expected)
    for name, (inputs, vjps, lengths) in expected.items():
        assert torch.equal(loaded[name].inputs, inputs) and torch.equal(loaded[name].vjps, vjps)
        assert loaded[name].lengths == lengths
    for name, routing in routings.items():
        assert torch.equal(loaded.routings[name].experts, routing.experts)
        assert torch.equal(loaded.example(1).routings[name].weights, routing.example(1).weights)


def test_a_cache_on_another_device(tokenizer, family):
    model = make(family, tokenizer)
    _, there = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    _, moved = tlb.run_with_backward_cache(model, TOKENS, TARGET, device="cpu")
    for name, g in there.items():
        assert torch.equal(moved[name].inputs, g.inputs) and torch.equal(moved[name].vjps, g.vjps)


def test_an_expert_without_tokens_has_an_empty_gradient(mixtral):
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS[:, :1], TARGET)
    chosen = set(cache.routings["blocks.0.mlp.experts"].experts.flatten().tolist())
    assert len(chosen) == 2
    (idle, *_) = {0, 1, 2, 3} - chosen
    for kind, shape in {"W_gate": (28, 44), "W_in": (28, 44), "W_out": (44, 28)}.items():
        g = cache[kind, 0, idle]
        assert g.inputs.shape == (0, shape[0]) and g.vjps.shape == (0, shape[1])
        assert not g.dense().any() and g.dense().shape == shape
        assert g.rank() == 0 and g.norm() == 0 and g.svd().S.shape == (0,)
        assert g.inner(g) == 0 and not (g @ torch.ones(shape[1], dtype=g.vjps.dtype)).any()


def test_biases_of_experts(tokenizer):
    model = make("gpt_oss", tokenizer)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    experts = experts_of(model)
    into, out = torch.autograd.grad(
        -model(TOKENS)[0, -1].log_softmax(-1)[TARGET],
        [experts.gate_up_proj_bias, experts.down_proj_bias],
    )
    for e in range(4):
        for kind, expected in {
            "W_gate": into[e, ::2],
            "W_in": into[e, 1::2],
            "W_out": out[e],
        }.items():
            got = cache.bias_gradient((kind, 0, e))
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def in_place(experts):
    with torch.no_grad():
        experts.down_proj[0, 0, 0] += 1


def past_autograd(experts):
    experts.gate_up_proj.data += 0.1


def replaced(experts):
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.clone())


@pytest.mark.parametrize("change", [in_place, past_autograd, replaced])
def test_factors_are_not_made_from_other_weights(mixtral, change):
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    known = cache["W_out", 0, 1].dense()
    change(experts_of(mixtral))
    assert torch.equal(cache["W_out", 0, 1].dense(), known)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.experts.*changed after the run"):
        cache["W_out", 0, 2]
    assert cache["W_out", 1, 2].shape == (44, 28)


def test_an_edit_that_is_reverted_changes_nothing(mixtral):
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    one, other = (
        tlb.gradient_step(c, lr=0.1, layers=0, model=mixtral)
        for c in (
            tlb.run_with_backward_cache(mixtral, TOKENS, t, weights="W_out")[1] for t in (3, 4)
        )
    )
    with one.applied():
        with pytest.raises(RuntimeError, match="revert the edit"):
            cache["W_out", 0, 1]
        with other.applied(), pytest.raises(RuntimeError, match="revert the edit"):
            cache["W_out", 0, 1]
    assert_autograds(mixtral, tlb.weight_sites(mixtral), cache)


def test_a_cache_keeps_no_model_alive(tokenizer):
    model = make("mixtral", tokenizer)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    del model
    gc.collect()
    assert cache["W_Q", 0].shape == (28, 32)
    with pytest.raises(RuntimeError, match="the model is gone"):
        cache["W_out", 0, 1]


def test_the_capture_computes_no_expert_twice(mixtral):
    """The boundary is all that it keeps: expanding calls the experts' function, capturing not."""
    calls = []
    handle = experts_of(mixtral).act_fn.register_forward_hook(lambda *_: calls.append(1))
    mixtral(TOKENS)
    n_forward = len(calls)
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    assert len(calls) == 2 * n_forward > 0
    cache["W_in", 0, 0], cache["W_out", 0, 0], cache["W_gate", 0, 0]
    assert len(calls) == 2 * n_forward + 1
    handle.remove()


def test_frozen_parameters_and_a_model_that_is_left_as_it_came(mixtral):
    sites = tlb.weight_sites(mixtral)
    expected = autograd(mixtral, sites)
    for parameter in mixtral.original_model.parameters():
        parameter.requires_grad_(False)
    before = state(mixtral)
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    for site in sites:
        got = site.to_parameter_layout(cache[site.name].dense())
        torch.testing.assert_close(got, expected[site.name], rtol=1e-10, atol=1e-14)
    assert state(mixtral) == before

    def interrupt(tensor, hook):
        raise KeyboardInterrupt

    for point in ("blocks.1.mlp.gate.hook_out", "blocks.1.mlp.hook_out"):
        with pytest.raises(KeyboardInterrupt):
            tlb.run_with_backward_cache(mixtral, TOKENS, TARGET, fwd_hooks=[(point, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        tlb.run_with_backward_cache(
            mixtral, TOKENS, TARGET, bwd_hooks=[("blocks.0.mlp.hook_out", interrupt)]
        )
    assert state(mixtral) == before


def test_hooks_that_send_tokens_elsewhere_take_part(mixtral):
    """The router's choice is changed by a hook, and an output is patched, for autograd as well."""
    point = "blocks.0.mlp.gate.hook_expert_indices"
    if point not in mixtral.hook_dict:
        pytest.skip("this TransformerLens has no HookPoint at the chosen experts")

    def elsewhere(indices, hook):
        return (indices + 1) % 4

    def patched(output, hook):
        return 1.5 * output

    hooks = [(point, elsewhere), ("blocks.0.mlp.hook_out", patched)]
    _, plain = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET, fwd_hooks=hooks)
    name = "blocks.0.mlp.experts"
    assert torch.equal(cache.routings[name].experts, (plain.routings[name].experts + 1) % 4)
    sites = tlb.weight_sites(mixtral)
    with mixtral.hooks(fwd_hooks=hooks):
        loss = -mixtral(TOKENS)[0, -1].log_softmax(-1)[TARGET]
    for site, expected in zip(sites, gradients_of_sites(loss, sites), strict=True):
        got = site.to_parameter_layout(cache[site.name].dense())
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("weights", ["W_router", "W_in", "W_out", ("W_router", "W_gate")])
def test_the_graph_may_begin_at_a_mixture(mixtral, weights):
    _, whole = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET, weights=weights, layers=1)
    assert cache and all(name.startswith("blocks.1.mlp.") for name in cache)
    for name, g in cache.items():
        torch.testing.assert_close(g.dense(), whole[name].dense(), rtol=1e-12, atol=1e-15)


def test_experts_that_are_not_there_are_refused(mixtral):
    """Experts that are spread over processes have others' as one number too high."""
    handle = experts_of(mixtral).register_forward_pre_hook(
        lambda module, args: (args[0], torch.where(args[1] == 0, 4, args[1]), args[2])
    )
    with pytest.raises(NotImplementedError, match=r"blocks\.\d\.mlp\.experts.*expert parallelism"):
        tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    handle.remove()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_autocast_is_as_exact_as_autograd(tokenizer, family):
    """The factors of experts are computed in the weights' own dtype: against the float64 truth."""
    exact, model = make(family, tokenizer), make(family, tokenizer, torch.float32)
    truth, sites = autograd(exact, tlb.weight_sites(exact)), tlb.weight_sites(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        own = autograd(model, sites)
        for site in (one for one in sites if one.expert is not None):
            expected = truth[site.name]
            got = site.to_parameter_layout(cache[site.name].dense())
            error, owns = (got - expected).norm(), (own[site.name] - expected).norm()
            assert error <= 2 * owns + 1e-6, site.name
