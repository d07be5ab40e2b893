"""Sites of experts, routers and shared experts: names, parameters, and why some have none."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make
from helpers.mixtures import TARGET, TOKENS, assert_autograds, autograd
from helpers.versions import NEEDS_BRIDGE
from torch import nn
from torch.nn.utils import parametrize

import tl_backward as tlb
from tl_backward.sites.names import parse_site_name

pytestmark = NEEDS_BRIDGE


@pytest.fixture
def mixtral(tokenizer):
    return make("mixtral", tokenizer)


def experts_of(model, layer=0):
    return model.blocks[layer].mlp.original_component.experts


def test_names_kinds_and_layers(mixtral):
    sites = {site.name: site for site in tlb.weight_sites(mixtral)}
    site = sites["blocks.1.mlp.experts.3.W_in"]
    assert (site.kind, site.layer, site.expert) == ("W_in", 1, 3)
    assert (site.d_in, site.d_out) == (28, 44)
    assert parse_site_name(site.name) == (1, "W_in", 3)
    assert sites["blocks.1.mlp.W_router"].expert is None
    assert sites["blocks.1.attn.W_Q"].expert is None
    of_kind = tlb.weight_sites(mixtral, "W_out", layers=-1)
    assert [one.expert for one in of_kind] == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_the_parameter_is_a_live_view_of_the_stack(tokenizer, family):
    """Of the halves of a stack, or of every second column of it."""
    model = make(family, tokenizer)
    seen = {}
    for site in tlb.weight_sites(model):
        stack, index = site.stored_in
        assert isinstance(stack, nn.Parameter)
        assert torch.equal(stack[index], site.parameter)
        if site.expert is None:
            assert site.parameter is stack and index is ...
            continue
        assert (
            site.parameter.shape
            == site.to_parameter_layout(torch.ones(site.d_in, site.d_out)).shape
        )
        with torch.no_grad():
            site.parameter[0, 0] += 1
        marked = seen.setdefault(id(stack), (stack, []))[1]
        marked.append(stack[index].untyped_storage().data_ptr())
        assert stack[index][0, 0] == site.parameter[0, 0]
    for stack, marked in seen.values():  # no two of them share an element
        sites = [s for s in tlb.weight_sites(model) if s.stored_in[0] is stack]
        counts = torch.zeros_like(stack)
        for site in sites:
            counts[site.stored_in[1]] += 1
        assert (counts == 1).all() and len(sites) == len(marked)


def test_experts_are_not_tied_and_tied_ones_are(mixtral):
    assert not any(site.tied_to or site.in_storage_with for site in tlb.weight_sites(mixtral))
    experts_of(mixtral, 1).down_proj = experts_of(mixtral, 0).down_proj
    sites = tlb.weight_sites(mixtral, "W_out")
    assert [site.tied_to for site in sites] == [
        (f"blocks.{1 - layer}.mlp.experts.{expert}.W_out",)
        for layer in (0, 1)
        for expert in range(4)
    ]
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET, weights="W_out")
    one, other = sites[2], sites[6]
    got = one.to_parameter_layout((cache[one.name] + cache[other.name]).dense())
    torch.testing.assert_close(got, autograd(mixtral, [one])[one.name], rtol=1e-10, atol=1e-14)


def test_hooks_are_refused_for_a_reason(tokenizer):
    model = make("qwen2_moe", tokenizer)
    sites = {site.name: site for site in tlb.weight_sites(model)}
    with pytest.raises(NotImplementedError, match="is a matrix of one expert"):
        _ = sites["blocks.0.mlp.experts.0.W_in"].hook_points
    with pytest.raises(NotImplementedError, match="no HookPoint on both sides"):
        _ = sites["blocks.0.mlp.W_router"].hook_points
    shared = sites["blocks.0.mlp.shared_experts.W_in"]
    assert set(shared.hook_points) <= set(model.hook_dict)


def expert_parallel(model):
    experts_of(model)._is_expert_parallel = True


def behind_a_norm(model):
    experts_of(model).has_post_expert_norm = True


def recomputed(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(experts_of(model), "down_proj", Doubled())


def quantised(model):
    down = experts_of(model).down_proj
    experts_of(model).down_proj = nn.Parameter(down.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("obstruct", "reason"),
    [
        (expert_parallel, "expert parallelism"),
        (behind_a_norm, "a norm after each expert"),
        (recomputed, r"recomputed in every forward pass by torch.nn.utils.parametrize \(Doubled\)"),
        (quantised, "stores down_proj quantised or sharded"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(mixtral, obstruct, reason):
    obstruct(mixtral)
    with pytest.raises(NotImplementedError, match=rf"blocks\.0\.mlp\.experts\.W_out.*{reason}"):
        tlb.weight_sites(mixtral, "W_out", layers=0)
    assert [site.expert for site in tlb.weight_sites(mixtral, "W_out")] == [0, 1, 2, 3]
    reasons = tlb.coverage(mixtral).set_index("parameter").reason
    assert reasons.str.contains(reason).any()


def test_a_router_whose_output_is_not_its_logits(tokenizer):
    model = make("laguna", tokenizer)
    router = model.blocks[1].mlp.original_component.gate.original_component
    router.router_logit_softcapping = 0.5
    with pytest.raises(NotImplementedError, match=r"W_router.*does not return the logits"):
        tlb.weight_sites(model, "W_router")


def test_coverage_joins_the_names_of_all_experts(tokenizer):
    covered = tlb.coverage(make("gpt_oss", tokenizer)).set_index("parameter")
    experts = "model.layers.1.mlp.experts."
    assert covered.site[f"{experts}down_proj"] == "blocks.1.mlp.experts.0-3.W_out"
    assert covered.site[f"{experts}gate_up_proj"] == (
        "blocks.1.mlp.experts.0-3.W_gate + blocks.1.mlp.experts.0-3.W_in"
    )
    assert (
        "bias_gradient('blocks.1.mlp.experts.e.W_out')"
        in covered.reason[f"{experts}down_proj_bias"]
    )
    assert covered.site["model.layers.1.mlp.router.weight"] == "blocks.1.mlp.W_router"


def test_a_missing_expert_is_named(mixtral):
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    assert_autograds(mixtral, tlb.weight_sites(mixtral), cache)
    assert cache["W_in", 1, 3] is cache["blocks.1.mlp.experts.3.W_in"]
    with pytest.raises(KeyError, match=r"matrix of each expert; choose one of the experts 0 to 3"):
        cache["W_in", 1]
    with pytest.raises(KeyError, match=r"was not captured; choose one of the experts 0 to 3"):
        cache["W_in", 1, 4]
