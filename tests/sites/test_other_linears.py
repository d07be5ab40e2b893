"""Linear layers beside attention and MLPs: names, lens, edits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make
from helpers.gradients import reference_loss, relative_error
from helpers.versions import NEEDS_BRIDGE
from torch import nn

import tl_backward as tlb
from tl_backward.editing.gradient_step import gradient_step

pytestmark = NEEDS_BRIDGE

TOKENS, TARGET = torch.tensor([[3, 9, 1, 17, 5, 11, 2, 8, 30]]), 5


@pytest.fixture(scope="module")
def family(tokenizer):
    """A function that makes the tiny bridge of a family, once."""
    made = {}

    def model(name):
        return made[name] if name in made else made.setdefault(name, make(name, tokenizer))

    return model


@pytest.mark.parametrize(
    ("name", "module", "site"),
    [
        ("mamba", "backbone.layers.1.mixer.x_proj", "blocks.1.mixer.W_x"),
        ("falcon_h1", "model.layers.0.mamba.in_proj", "blocks.0.mamba.W_in_proj"),
        ("granitemoehybrid", "model.layers.0.mamba.out_proj", "blocks.0.mixer.W_out_proj"),
        ("nemotron_h", "model.layers.2.mixer.q_proj", "blocks.2.mixer.W_Q"),
        ("nemotron_h", "model.layers.3.mixer.down_proj", "blocks.3.mixer.W_out"),
        ("zamba2", "model.layers.1.linear", "blocks.1.W_linear"),
        ("lfm2", "model.layers.0.conv.in_proj", "blocks.0.conv.W_in_proj"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba", "blocks.0.linear_attn.W_BA"),
        ("olmo_hybrid", "model.layers.0.linear_attn.g_proj", "blocks.0.linear_attn.W_Z"),
        ("youtu", "model.layers.0.self_attn.kv_b_proj", "blocks.0.attn.W_UKV"),
        ("rwkv", "rwkv.blocks.1.feed_forward.value", "blocks.1.channel_mix.W_V_channel"),
        ("recurrent_gemma", "model.layers.2.mlp_block.up_proj", "blocks.2.mlp_block.W_in"),
        ("hrm_text", "model.L_module.layers.1.self_attn.gate_proj", "L_blocks.1.attn.W_G"),
        ("opt", "model.decoder.embed_positions", "pos_embed.W_pos"),
        ("bert", "cls.predictions.transform.dense", "mlm_head.W_mlm_head"),
    ],
)
def test_names(family, name, module, site):
    """The module of transformers that a site stands for, by the parameter that it has."""
    rows = tlb.coverage(family(name)).set_index("parameter")
    assert site in rows.site[f"{module}.weight"].split(" + ")


def test_kinds_of_attention_are_found_where_another_part_has_them(family):
    """Only some blocks of Nemotron-H have attention, and under the name of the mixer."""
    assert [site.layer for site in tlb.weight_sites(family("nemotron_h"), "W_Q", 2)] == [2]
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn\.W_Q .* 'mixer' instead"):
        tlb.weight_sites(family("nemotron_h"), "W_Q", 0)


def test_the_lens_reads_the_side_of_the_stream(family):
    """By the vectors themselves, read as vectors."""
    model = family("mamba2")
    lens = tlb.BackwardLogitLens(model)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    result = lens(cache=cache, weights=("W_in_proj", "W_out_proj"), top_k=4)
    x = torch.stack([cache["W_in_proj", layer].inputs for layer in (0, 1)])
    delta = torch.stack([cache["W_out_proj", layer].vjps for layer in (0, 1)])
    assert torch.equal(result["W_in_proj"].top_ids, lens.read(x, top_k=4).top_ids.squeeze(1))
    assert torch.equal(result["W_out_proj"].top_ids, lens.read(delta, top_k=4).top_ids.squeeze(1))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mamba", "W_x"), ("youtu", "W_UKV"), ("rwkv", "W_V_channel"), ("zamba2", "W_q_proj")],
)
def test_the_lens_refuses_what_is_not_beside_the_stream(family, name, kind):
    lens = tlb.BackwardLogitLens(family(name))
    with pytest.raises(ValueError, match=f"weights='{kind}' neither reads nor writes the residual"):
        lens(TOKENS, TARGET, weights=kind)
    _, cache = tlb.run_with_backward_cache(family(name), TOKENS, TARGET, weights=kind)
    with pytest.raises(ValueError, match=f"{kind}.*neither reads the residual stream nor writes"):
        lens.singular_vectors(cache, kind, 1)


@pytest.mark.parametrize(
    ("name", "kind"), [("mamba2", "W_out_proj"), ("youtu", "W_DKV"), ("qwen3_5_text", "W_QKV")]
)
def test_a_gradient_step(family, name, kind):
    model = family(name)
    (site,) = tlb.weight_sites(model, kind, 0)
    before = site.parameter.detach().clone()
    site.parameter.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reference_loss(model, TOKENS, TARGET), site.parameter)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    edit = gradient_step(cache, lr=0.1, weights=kind, layers=0, model=model)
    with edit.applied():
        torch.testing.assert_close(site.parameter.detach(), before - 0.1 * gradient)
        edited = model(TOKENS)
    assert torch.equal(site.parameter, before)
    if site.hook_in is None:
        with pytest.raises(NotImplementedError, match=f"{kind} has no HookPoint on both sides"):
            edit.fwd_hooks()
    else:
        hooked = model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks())
        torch.testing.assert_close(hooked, edited)
        assert relative_error(hooked, model(TOKENS)) > 1e-3


def test_positions_of_opt_have_no_hook_for_an_edit(family):
    """The HookPoint before them sees the attention mask, and no positions."""
    model = family("opt")
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    edit = gradient_step(cache, lr=0.1, weights="W_pos", model=model)
    with pytest.raises(NotImplementedError, match=r"W_pos has no HookPoint on both sides"):
        edit.fwd_hooks()


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_opt_in_a_padded_batch(tokenizer, side):
    """By each text alone; row 2 is the first position."""
    model = make("opt", tokenizer, torch.float32)
    prompts = [[3, 9, 1, 17, 5], [4, 7, 2]]
    _, cache = tlb.run_with_backward_cache(model, prompts, TARGET, padding_side=side)
    for b, prompt in enumerate(prompts):
        _, alone = tlb.run_with_backward_cache(model, prompt, TARGET)
        whole = cache.example(b)["pos_embed.W_pos"].dense()
        torch.testing.assert_close(whole, alone["pos_embed.W_pos"].dense(), rtol=1e-4, atol=1e-6)
        assert whole.any(1).nonzero().flatten().tolist() == [*range(2, 2 + len(prompt))]


def test_rows_that_are_no_positions_are_refused(tokenizer):
    """A layer that sees every two positions as one has no factors by position."""
    model = make("lfm2", tokenizer)
    block = model.blocks[0].original_component
    block.pooling = nn.Linear(2 * 28, 28).double()
    own = block.forward

    def forward(x, *arguments, **more):
        pooled = block.pooling(x[:, :8].reshape(1, 4, 56))
        return own(x + pooled.mean(1, keepdim=True), *arguments, **more)

    block.forward = forward
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.W_pooling \[1, 4, 56\] and not one"):
        tlb.run_with_backward_cache(model, TOKENS, TARGET)
    others = [site.kind for site in tlb.weight_sites(model) if site.kind != "W_pooling"]
    assert tlb.run_with_backward_cache(model, TOKENS, TARGET, weights=others)


def test_a_layer_in_a_block_of_unknown_make_is_found(tokenizer):
    """By autograd: a layer that no table knows, in a list of two of which the block takes one."""
    model = make("llama", tokenizer)
    block = model.blocks[1].original_component
    block.choice = nn.ModuleList([nn.Linear(28, 28), nn.Linear(28, 28)]).double()
    block.extra = nn.Linear(28, 28).double()
    own = block.forward
    block.forward = lambda x, *arguments, **more: own(x + block.extra(x), *arguments, **more)
    (site,) = tlb.weight_sites(model, "W_extra")
    assert (site.name, site.layer, site.hook_in) == ("blocks.1.W_extra", 1, None)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    loss = reference_loss(model, TOKENS, TARGET)
    (gradient,) = torch.autograd.grad(loss, block.extra.weight)
    assert relative_error(site.to_parameter_layout(cache["W_extra", 1].dense()), gradient) <= 1e-10
    with pytest.raises(NotImplementedError, match="one of a list of layers, from which the block"):
        tlb.weight_sites(model, "W_choice_0")


def test_passes_without_gradients_are_no_part_of_the_factors(family):
    """The first passes of hrm_text's lower blocks are under ``torch.no_grad()``."""
    model = family("hrm_text")
    calls = []
    module = tlb.weight_sites(model, "W_G")[0].holder[0]
    handle = module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(TOKENS)
    handle.remove()
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    assert set(calls) == {True, False}
    assert len(cache["L_blocks.0.attn.W_G"].inputs) == 9 * sum(calls)
