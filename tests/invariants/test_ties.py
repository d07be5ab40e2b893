"""Weights tied across kinds and orientations: gradients, hooks, applied edits and steps agree."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bridges import tiny_config
from helpers.edits import applied_logits, factors, hooked_logits, logits
from helpers.gradients import gradient_of_parameter, reference_loss, relative_error
from helpers.hooked import build
from helpers.versions import CLASSES, HAS_BRIDGE, NEEDS_BRIDGE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tl_backward as tlb
from tl_backward.editing import WeightEdit, edit_hooks, gradient_step
from tl_backward.editing.weight_edit import _seen_from
from tl_backward.factors import GradientFactors
from tl_backward.sites import attached_hook_points
from tl_backward.sites.site import WeightSite, unchanged
from tl_backward.sites.ties import shares_memory

TARGET = 5
TOKENS = torch.tensor([[3, 17, 3, 29, 8, 9]])


def parameter_of(values: Tensor) -> nn.Parameter:
    """A parameter of its own in the memory of the values."""
    return nn.Parameter(values.detach())


def bridge(tokenizer, tie):
    """A Llama whose W_Q, W_K, W_V and W_O are square, tied before it is wrapped."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama", len(tokenizer))
    config.hidden_size, config.head_dim, config.num_key_value_heads = 24, 6, 4
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).double().eval()
    tie(hf.model.layers[1].self_attn, hf.model.layers[1].mlp, hf)
    return TransformerBridge.boot_transformers(
        "llama", hf_model=hf, tokenizer=tokenizer, dtype=torch.float64, device="cpu"
    )


def tie_keys(attn, mlp, hf):
    attn.k_proj.weight = attn.q_proj.weight


def tie_outputs(attn, mlp, hf):
    attn.o_proj.weight = attn.v_proj.weight


def tie_all_of_attention(attn, mlp, hf):
    attn.k_proj.weight = attn.v_proj.weight = attn.o_proj.weight = attn.q_proj.weight


def tie_outputs_transposed(attn, mlp, hf):
    attn.o_proj.weight = parameter_of(attn.v_proj.weight.T)


def tie_gates(attn, mlp, hf):
    mlp.gate_proj.weight = mlp.up_proj.weight


def tie_mlp_transposed(attn, mlp, hf):
    mlp.down_proj.weight = parameter_of(mlp.up_proj.weight.T)


def tie_layers(attn, mlp, hf):
    attn.q_proj.weight = hf.model.layers[0].self_attn.v_proj.weight


def tie_unembedding(attn, mlp, hf):
    hf.lm_head.weight = hf.model.embed_tokens.weight


BRIDGES = {
    tie_keys: ("blocks.1.attn.W_Q", "blocks.1.attn.W_K"),
    tie_outputs: ("blocks.1.attn.W_V", "blocks.1.attn.W_O"),
    tie_all_of_attention: tuple(f"blocks.1.attn.{kind}" for kind in ("W_Q", "W_K", "W_V", "W_O")),
    tie_outputs_transposed: ("blocks.1.attn.W_V", "blocks.1.attn.W_O"),
    tie_gates: ("blocks.1.mlp.W_gate", "blocks.1.mlp.W_in"),
    tie_mlp_transposed: ("blocks.1.mlp.W_in", "blocks.1.mlp.W_out"),
    tie_layers: ("blocks.0.attn.W_V", "blocks.1.attn.W_Q"),
    tie_unembedding: ("embed.W_E", "unembed.W_U"),
}


def hooked_keys(model):
    attn = model.blocks[1].attn
    attn.W_K = attn.W_Q


def hooked_outputs(model):
    """``W_V[h, m, d]`` and ``W_O[h, d, m]`` are neither equal nor each other's transpose."""
    attn = model.blocks[1].attn
    attn.W_O = attn.W_V


def hooked_outputs_transposed(model):
    attn = model.blocks[1].attn
    attn.W_O = parameter_of(attn.W_V.mT)


def hooked_mlp_transposed(model):
    mlp = model.blocks[1].mlp
    mlp.W_out = parameter_of(mlp.W_in.T)


def hooked_unembedding(model):
    model.unembed.W_U = parameter_of(model.embed.W_E.T)


SQUARE_HEADS = {"d_model": 6, "d_head": 6}
HOOKED = {
    hooked_keys: ({}, ("blocks.1.attn.W_Q", "blocks.1.attn.W_K")),
    hooked_outputs: (SQUARE_HEADS, ("blocks.1.attn.W_V", "blocks.1.attn.W_O")),
    hooked_outputs_transposed: ({}, ("blocks.1.attn.W_V", "blocks.1.attn.W_O")),
    hooked_mlp_transposed: ({}, ("blocks.1.mlp.W_in", "blocks.1.mlp.W_out")),
    hooked_unembedding: ({}, ("embed.W_E", "unembed.W_U")),
}
CASES = [*(BRIDGES if HAS_BRIDGE else ()), *(HOOKED if "hooked" in CLASSES else ())]


@pytest.fixture(scope="module", params=CASES, ids=lambda tie: tie.__name__)
def tied(request, tokenizer):
    """A model, and the names of the sites that share memory in it."""
    if request.param in BRIDGES:
        return bridge(tokenizer, request.param), BRIDGES[request.param]
    settings_, names = HOOKED[request.param]
    model = build(**settings_)
    request.param(model)
    return model, names


def sites_of(model) -> dict[str, WeightSite]:
    return {site.name: site for site in tlb.weight_sites(model)}


def gradients_by_autograd(model, sites) -> dict[str, Tensor]:
    loss = reference_loss(model, TOKENS, TARGET)
    parameters = [site.parameter for site in sites]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {site.name: gradient for site, gradient in zip(sites, found, strict=True)}


def test_gradients_are_those_of_autograd(tied):
    """Every parameter's, as the sum over the sites that share it, each in its own layout."""
    model, names = tied
    sites = tlb.weight_sites(model)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    for name, expected in gradients_by_autograd(model, sites).items():
        (site,) = (site for site in sites if site.name == name)
        assert relative_error(gradient_of_parameter(sites, cache, site), expected) <= 1e-10, name
    one, *others = (sites_of(model)[name] for name in names)
    shared = [name for name in names if sites_of(model)[name].parameter is one.parameter]
    assert set(one.tied_to) == set(shared) - {one.name}
    assert all(shares_memory(one, other) for other in others)


def test_the_coverage_joins_the_names(tied):
    model, names = tied
    sites = sites_of(model)
    if sites[names[0]].tied_to:
        assert " + ".join(names) in set(tlb.coverage(model).site)


@pytest.mark.parametrize("n_edited", [1, 2])
def test_hooks_and_applied_edits_are_the_update_written_by_hand(tied, n_edited):
    model, names = tied
    sites = sites_of(model)
    edit = WeightEdit(model, {n: factors(sites[n], seed=i) for i, n in enumerate(names[:n_edited])})
    plain, by_hooks, by_weights = logits(model), hooked_logits(edit), applied_logits(edit)
    with torch.no_grad():
        originals = [(site.parameter, site.parameter.clone()) for site in sites.values()]
        changed = torch.zeros_like(sites[names[0]].parameter)
        for name, g in edit.factors.items():
            before = sites[names[0]].parameter.clone()
            dense = sum(torch.outer(u, v) for u, v in zip(g.inputs, g.vjps, strict=True))
            sites[name].parameter.add_(sites[name].to_parameter_layout(dense))
            changed += sites[names[0]].parameter - before
        expected = logits(model)
        for parameter, original in originals:
            parameter.copy_(original)
    assert relative_error(expected, plain) > 1e-3
    torch.testing.assert_close(by_hooks, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_weights, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(edit.norm(), changed.norm())


def test_each_row_has_its_own_edit(tied):
    model, names = tied
    sites = sites_of(model)
    edits = [WeightEdit(model, {n: factors(sites[n], seed=i)}) for i, n in enumerate(names)]
    rows = [-1, *range(len(edits))]
    with attached_hook_points(model):
        got = logits(model, edit_hooks(model, edits, rows), TOKENS.repeat(len(rows), 1))
    for row, index in enumerate(rows):
        expected = (
            logits(model, tokens=TOKENS) if index < 0 else applied_logits(edits[index], TOKENS)
        )
        torch.testing.assert_close(got[row], expected[0], rtol=1e-6, atol=1e-6)


def test_a_gradient_step_is_that_of_autograd(tied):
    """Of separate parameters in one memory, the steps add up, as an optimizer's do."""
    model, names = tied
    sites = sites_of(model)
    gradients = gradients_by_autograd(model, [sites[name] for name in names])
    distinct = {id(sites[n].parameter): (sites[n].parameter, gradients[n]) for n in names}
    with torch.no_grad():
        originals = [(parameter, parameter.clone()) for parameter, _ in distinct.values()]
        for parameter, gradient in distinct.values():
            parameter.sub_(0.3 * gradient)
        expected = [sites[name].parameter.clone() for name in names]
        for parameter, original in originals:
            parameter.copy_(original)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    only = {name: cache[name] for name in names}
    step = -0.3 * WeightEdit(model, only)
    with step.applied():
        for name, want in zip(names, expected, strict=True):
            torch.testing.assert_close(sites[name].parameter.detach(), want)
    kinds = {site.kind for site in sites.values()}
    whole = gradient_step(cache, lr=0.3, weights=kinds, model=model)
    torch.testing.assert_close(hooked_logits(whole), applied_logits(whole), rtol=1e-9, atol=1e-9)


def test_reverted_bit_for_bit(tied):
    model, names = tied
    sites = sites_of(model)
    before = [site.parameter.detach().clone() for site in sites.values()]
    edits = [WeightEdit(model, {name: factors(sites[name])}) for name in names]
    with edits[0].applied(), edits[-1].applied(), (edits[0] + edits[-1]).applied():
        pass
    for site, original in zip(sites.values(), before, strict=True):
        assert torch.equal(site.parameter, original)


@NEEDS_BRIDGE
def test_memory_that_is_shared_in_part_is_refused(tokenizer):
    """W_K in the first rows of W_Q: an update of W_Q changes it in part."""

    def overlap(attn, mlp, hf):
        both = torch.cat([attn.q_proj.weight.detach(), torch.randn(4, 24).double()])
        attn.q_proj.weight, attn.k_proj.weight = parameter_of(both[:24]), parameter_of(both[4:])

    model = bridge(tokenizer, overlap)
    sites = sites_of(model)
    for kind in ("W_Q", "W_K"):
        name = f"blocks.1.attn.{kind}"
        edit = WeightEdit(model, {name: factors(sites[name])})
        for act in (edit.apply, edit.fwd_hooks, edit.norm):
            with pytest.raises(NotImplementedError, match="share part of their memory"):
                act()
    apart = WeightEdit(model, {"blocks.1.attn.W_V": factors(sites["blocks.1.attn.W_V"])})
    torch.testing.assert_close(hooked_logits(apart), applied_logits(apart))


@NEEDS_BRIDGE
def test_one_module_under_two_names_has_no_site(tokenizer):
    """Both uses pass the one module: rows of both would count for each name."""

    def share(attn, mlp, hf):
        attn.k_proj = attn.q_proj

    model = bridge(tokenizer, share)
    names = sites_of(model).keys()
    assert "blocks.1.attn.W_Q" not in names and "blocks.1.attn.W_K" not in names
    assert "blocks.0.attn.W_Q" in names
    with pytest.raises(NotImplementedError, match="give each a module of its own"):
        tlb.weight_sites(model, "W_Q", 1)
    reasons = tlb.coverage(model).query("site.isna()").reason
    assert reasons.str.contains("blocks.1.attn.W_Q, and one module|one module does not").any()


@NEEDS_BRIDGE
def test_parts_of_one_memory_that_do_not_overlap_are_strangers(make_family):
    """GPT-2's W_Q, W_K and W_V are columns of what was one parameter."""
    model = make_family("gpt2")
    sites = sites_of(model)
    Q, K = sites["blocks.0.attn.W_Q"], sites["blocks.0.attn.W_K"]
    assert Q.parameter.untyped_storage().data_ptr() == K.parameter.untyped_storage().data_ptr()
    assert not shares_memory(Q, K) and shares_memory(Q, Q)
    before = K.parameter.detach().clone()
    with WeightEdit(model, {Q.name: factors(Q)}).applied():
        assert torch.equal(K.parameter, before)


def test_a_copy_of_a_tied_model_is_tied_to_itself_only(tied):
    model, names = tied
    other = copy.deepcopy(model)
    assert [site.tied_to for site in tlb.weight_sites(other)] == [
        site.tied_to for site in tlb.weight_sites(model)
    ]
    assert not shares_memory(sites_of(model)[names[0]], sites_of(other)[names[0]])


# how any two sites see one memory, against a look at every element


LAYOUTS = {
    "in out": unchanged,
    "out in": lambda matrix: matrix.mT,
    "m (h d)": lambda matrix: matrix.unflatten(1, (2, -1)).movedim(1, 0),
    "(h d) m": lambda matrix: matrix.unflatten(0, (2, -1)),
}


def site_at(name: str, layout: str, memory: Tensor, turned: bool) -> WeightSite:
    """A site whose parameter is all of the memory, as its layout has it, or with turned axes."""
    d = 4
    module = nn.Module()
    shape = LAYOUTS[layout](torch.empty(d, d)).shape
    view = memory.view(shape) if not turned else memory.view(*shape[:-2], shape[-1], shape[-2]).mT
    module.weight = parameter_of(view)
    return WeightSite(
        name=name,
        kind=name,
        layer=None,
        hook_in="",
        hook_out="",
        d_in=d,
        d_out=d,
        x_tap=lambda: None,
        y_tap=lambda: None,
        holder=(module, "weight"),
        layout=LAYOUTS[layout],
    )


def addresses(site: WeightSite) -> dict[int, tuple[int, int]]:
    """Where in ``[d_in, d_out]`` each element of the memory is, found one by one."""
    found = {}
    for i in range(site.d_in):
        for j in range(site.d_out):
            one = torch.zeros(site.d_in, site.d_out, dtype=torch.float64)
            one[i, j] = 1
            at = site.to_parameter_layout(one).bool()
            found[int(site.parameter[at])] = i, j
    return found


layouts = st.tuples(st.sampled_from(sorted(LAYOUTS)), st.booleans())


@settings(deadline=None, max_examples=60)
@given(layouts, layouts, st.integers(1, 3))
def test_an_update_is_seen_element_by_element(one, other, n):
    memory = torch.arange(16, dtype=torch.float64)
    site, seen_at = (
        site_at("one", *one[:1], memory, one[1]),
        site_at("other", other[0], memory, other[1]),
    )
    g = GradientFactors(torch.randn(n, 4).double(), torch.randn(n, 4).double())
    dense, seen = g.dense(), _seen_from(seen_at, site, g).dense()
    there = addresses(seen_at)
    assert shares_memory(site, seen_at)
    for address, (i, j) in addresses(site).items():
        torch.testing.assert_close(seen[there[address]], dense[i, j])
