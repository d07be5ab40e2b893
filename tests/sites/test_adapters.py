"""LoRA layers of peft: the base matrix, and both matrices of every adapter, are sites."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from helpers.adapters import RANK, SCALING, adapted, boot, config, hf_model, randomised
from helpers.families import FAMILIES, make
from helpers.gradients import gradient_of_parameter, reference_loss, relative_error
from helpers.texts import PROMPT, TARGET
from helpers.versions import NO_BRIDGE
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tl_backward as tlb
from tl_backward.editing import WeightEdit, forward_pass_shift, gradient_step
from tl_backward.factors import GradientFactors
from tl_backward.sites import all_parameters

TransformerBridge = pytest.importorskip(
    "transformer_lens.model_bridge", reason=NO_BRIDGE
).TransformerBridge

TOKENS, TARGET_ID = torch.tensor([[3, 9, 1, 17, 5, 11, 2]]), 5


@pytest.fixture
def bridge(tokenizer):
    return adapted(tokenizer)[0]


def assert_exact(bridge, tokens=TOKENS):
    """Every site against autograd."""
    frozen = [p for p in all_parameters(bridge) if not p.requires_grad]
    _, cache = tlb.run_with_backward_cache(bridge, tokens, TARGET_ID)
    assert all(not p.requires_grad for p in frozen) and all(
        p.grad is None for p in all_parameters(bridge)
    )
    sites = tlb.weight_sites(bridge)
    assert set(cache) == {site.name for site in sites}
    for parameter in frozen:
        parameter.requires_grad_(True)
    loss = reference_loss(bridge, tokens, TARGET_ID)
    gradients = torch.autograd.grad(loss, [site.parameter for site in sites])
    for parameter in frozen:
        parameter.requires_grad_(False)
    for site, gradient in zip(sites, gradients, strict=True):
        assert gradient.norm() > 0
        got = gradient_of_parameter(sites, cache, site)
        assert relative_error(got, gradient) <= 1e-10, site.name
    return cache


def kinds(bridge, layer=1):
    return [site.kind for site in tlb.weight_sites(bridge, layers=layer)]


def with_adapters(*weights):
    return [weight + end for weight in weights for end in ("", ".lora_A", ".lora_B")]


LLAMA = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
CONFIGS = {
    "plain": {},
    "with dropout": {"lora_dropout": 0.3},
    "rank-stabilised": {"use_rslora": True},
    "other ranks": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"down_proj": 1}},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_llama(tokenizer, settings):
    bridge, _ = adapted(tokenizer, **settings)
    assert kinds(bridge) == with_adapters(*LLAMA)
    assert_exact(bridge)


def test_gpt2(tokenizer):
    """Stored the other way round; W_Q, W_K and W_V are split from one matrix without adapters."""
    bridge, peft_model = adapted(tokenizer, "gpt2", lora_bias=True)
    adapters = with_adapters("W_O", "W_in", "W_out")
    assert kinds(bridge) == ["W_Q", "W_K", "W_V", *adapters]
    cache = assert_exact(bridge)
    loss = -peft_model(TOKENS).logits[0, -1].log_softmax(-1)[TARGET_ID]
    layer = bridge.blocks[1].mlp.out.original_component
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    of_A, of_B, bias = torch.autograd.grad(loss, [*matrices, layer.lora_B["default"].bias])
    torch.testing.assert_close(cache["W_out.lora_A", 1].dense().T, of_A)
    torch.testing.assert_close(cache["blocks.1.mlp.W_out.lora_B"].dense().T, of_B)
    torch.testing.assert_close(cache.bias_gradient(("W_out.lora_B", 1)), bias)


@pytest.mark.parametrize("family", ["gemma2", "llama_tied", "falcon", "apertus", "bert", "opt"])
def test_families(tokenizer, family):
    """Adapters come after booting: peft finds the wrapped layers by their names in the bridge."""
    bridge = make(family, tokenizer)
    linear = r".*(q_proj|o_proj|down_proj|dense|dense_4h_to_h|fc1|lm_head)\._original_component"
    before = len(tlb.weight_sites(bridge))
    randomised(get_peft_model(bridge.original_model, config(target_modules=linear)))
    assert len(tlb.weight_sites(bridge)) >= before + 6
    assert_exact(bridge)


def test_other_ways_to_the_same_model(tokenizer):
    """Adapters of transformers' own, and of peft after booting, are those of peft before it."""
    expected = assert_exact(adapted(tokenizer, target_modules=["q_proj", "down_proj"])[0])

    own = hf_model(tokenizer)
    own.add_adapter(config(target_modules=["q_proj", "down_proj"]))
    own = boot(randomised(own), tokenizer)

    later = boot(hf_model(tokenizer), tokenizer)
    wrapped = r".*(q_proj|down_proj)\._original_component"
    randomised(get_peft_model(later.original_model, config(target_modules=wrapped)))

    for bridge in (own, later):
        cache = assert_exact(bridge)
        assert list(cache) == list(expected)
        for name, g in cache.items():
            torch.testing.assert_close(g.dense(), expected[name].dense())


def test_what_the_sites_say(bridge):
    W_out, A, B = (tlb.weight_sites(bridge, kind, 1)[0] for kind in with_adapters("W_out"))
    assert (A.name, A.kind, A.layer) == ("blocks.1.mlp.W_out.lora_A", "W_out.lora_A", 1)
    hook_in, hook_out = (f"blocks.1.mlp.out.{end}" for end in ("hook_in", "hook_out"))
    assert (W_out.hook_in, W_out.hook_out) == (hook_in, hook_out)
    assert (A.hook_in, A.hook_out, B.hook_in, B.hook_out) == (hook_in, None, None, None)
    assert (A.d_in, A.d_out, B.d_in, B.d_out) == (44, RANK, RANK, 28)
    layer = bridge.blocks[1].mlp.out.original_component
    assert A.parameter is layer.lora_A["default"].weight
    assert W_out.parameter is layer.base_layer.weight
    covered = tlb.coverage(bridge).set_index("parameter")
    ours = covered[covered.index.str.contains(r"layers.1.mlp.down_proj")]
    assert list(ours.site) == [W_out.name, A.name, B.name]


def test_the_hook_point_of_the_base_sees_its_vjp(bridge):
    """What adapters add passes there too, and does not change the gradient at ``y``."""
    seen = []
    (site,) = tlb.weight_sites(bridge, "W_out", 1)
    hook = (site.hook_out, lambda vjp, hook: seen.append(vjp.clone()))
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID, bwd_hooks=[hook])
    torch.testing.assert_close(seen[0][0], cache[site.name].vjps)


def test_adapters_follow_from_the_base(bridge):
    """Closed form: at B's output the VJP is that of the weight, times the adapter's scaling."""
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    for layer in range(3):
        W, A, B = (cache[kind, layer] for kind in with_adapters("W_out"))
        held = bridge.blocks[layer].mlp.out.original_component
        torch.testing.assert_close(B.vjps, SCALING * W.vjps)
        torch.testing.assert_close(A.inputs, W.inputs)
        torch.testing.assert_close(B.inputs, W.inputs @ held.lora_A["default"].weight.T)
        torch.testing.assert_close(A.vjps, B.vjps @ held.lora_B["default"].weight)


def test_batches(bridge):
    prompts, targets = [[3, 9, 1, 17, 5], [4, 7], [12, 1, 33]], [[5], [7, 9], [11]]
    _, cache = tlb.run_with_backward_cache(bridge, prompts, targets)
    for b, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        _, alone = tlb.run_with_backward_cache(bridge, prompt, target)
        for name, g in cache.example(b).items():
            assert relative_error(g.dense(), alone[name].dense()) <= 1e-6, name


def test_save_and_load(bridge, tmp_path):
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    loaded = tlb.BackwardCache.load(cache.save(tmp_path / "cache.safetensors"))
    assert list(loaded) == list(cache)
    assert torch.equal(loaded["W_out.lora_B", 2].vjps, cache["W_out.lora_B", 2].vjps)


@pytest.mark.parametrize("trainable", ["adapters", "nothing", "everything"])
def test_what_is_trained_stays(bridge, trainable):
    for name, parameter in bridge.named_parameters():
        parameter.requires_grad_(
            trainable == "everything" or (trainable == "adapters" and "lora_" in name)
        )
    before = [p.requires_grad for p in all_parameters(bridge)]
    tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    assert [p.requires_grad for p in all_parameters(bridge)] == before
    assert all(p.grad is None for p in all_parameters(bridge))


# several adapters, and those that are not in use


@pytest.fixture
def two(tokenizer):
    """Two adapters, ``default`` and ``french-2``, on W_Q and W_out."""
    settings = {"target_modules": ["q_proj", "down_proj"]}
    peft_model = get_peft_model(hf_model(tokenizer), config(**settings))
    peft_model.add_adapter("french-2", config(r=4, **settings))
    randomised(peft_model)
    return boot(peft_model.get_base_model(), tokenizer), peft_model


def sites_of_W_out(bridge):
    return [kind for kind in kinds(bridge) if kind.startswith("W_out")]


def reasons(bridge, layer=1):
    covered = tlb.coverage(bridge).set_index("parameter").reason
    prefix = f"model.layers.{layer}.mlp.down_proj."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): reason
        for name, reason in covered[covered.notna()].items()
        if name.startswith(prefix)
    }


def test_one_of_two_is_active(two):
    bridge, peft_model = two
    assert sites_of_W_out(bridge) == with_adapters("W_out")
    assert_exact(bridge)
    peft_model.set_adapter("french-2")
    french = ["W_out", "W_out.lora_A.french-2", "W_out.lora_B.french-2"]
    assert sites_of_W_out(bridge) == french
    cache = assert_exact(bridge)
    assert cache["W_out.lora_A.french-2", 1].shape == (44, 4)
    assert set(reasons(bridge)) == {"lora_A.default", "lora_B.default"}
    assert "'default' is not active; see peft's set_adapter()" in reasons(bridge)["lora_A.default"]
    with pytest.raises(NotImplementedError, match=r"W_out\.lora_A has no site: .* is not active"):
        tlb.weight_sites(bridge, "W_out.lora_A")


def test_both_are_active(two):
    bridge, peft_model = two
    peft_model.base_model.set_adapter(["default", "french-2"])
    assert len(sites_of_W_out(bridge)) == 5
    assert_exact(bridge)
    assert reasons(bridge) == {}


def test_disabled(two):
    bridge, peft_model = two
    with peft_model.disable_adapter():
        assert sites_of_W_out(bridge) == ["W_out"]
        assert_exact(bridge)
        assert reasons(bridge)["lora_B.default"].endswith("the adapters are disabled")
    assert len(sites_of_W_out(bridge)) == 3


def test_merged(two):
    bridge, peft_model = two
    apart = bridge(TOKENS).detach()
    _, before = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    peft_model.merge_adapter()
    torch.testing.assert_close(bridge(TOKENS), apart, rtol=1e-6, atol=1e-6)
    assert sites_of_W_out(bridge) == ["W_out"]
    cache = assert_exact(bridge)
    assert relative_error(cache["W_out", 1].dense(), before["W_out", 1].dense()) <= 1e-6
    merged = "the adapter 'default' is merged into blocks.1.mlp.W_out"
    assert reasons(bridge)["lora_A.default"].endswith(merged)
    other = "no adapter is applied while 'default' is merged into blocks.1.mlp.W_out"
    assert reasons(bridge)["lora_A.french-2"].endswith(other)
    peft_model.unmerge_adapter()
    assert len(sites_of_W_out(bridge)) == 3


def test_merged_and_disabled_is_refused(two):
    """The forward pass of peft takes such adapters out of the weight, for good."""
    bridge, peft_model = two
    peft_model.merge_adapter()
    (site,) = tlb.weight_sites(bridge, "W_out", 1)
    merged = site.parameter.detach().clone()
    with peft_model.disable_adapter():
        with pytest.raises(NotImplementedError, match=r"merged and disabled.*unmerge_adapter\(\)"):
            tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
        assert torch.equal(site.parameter, merged)


def test_dropout_of_an_adapter(tokenizer):
    bridge, _ = adapted(tokenizer, lora_dropout=0.3)
    bridge.train()
    with pytest.raises(ValueError, match=r"p=0\.3 of Dropout at .*lora_dropout\.default"):
        tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    bridge.eval()
    assert_exact(bridge)


# what is no plain LoRA, or not at work


def attach(bridge, peft_config):
    return randomised(get_peft_model(bridge.original_model, peft_config))


WRAPPED = r".*layers\.1\..*down_proj\._original_component"
OTHERS = {
    "DoRA": (config(target_modules=WRAPPED, use_dora=True), "DoraLinearVariant"),
    "IA3": (
        peft.IA3Config(target_modules=WRAPPED, feedforward_modules=WRAPPED),
        "not plain LoRA \\(ia3 Linear\\)",
    ),
    "LoHa": (peft.LoHaConfig(target_modules=WRAPPED, r=2), "not plain LoRA \\(loha Linear\\)"),
    "AdaLoRA": (
        peft.AdaLoraConfig(target_modules=WRAPPED, total_step=9),
        "not plain LoRA \\(adalora SVDLinear\\)",
    ),
    "VeRA": (peft.VeraConfig(target_modules=WRAPPED, r=2), "not plain LoRA \\(vera Linear\\)"),
    "OFT": (peft.OFTConfig(target_modules=WRAPPED), "not plain LoRA \\(oft Linear\\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(tokenizer, kind):
    bridge = boot(hf_model(tokenizer), tokenizer)
    peft_config, message = OTHERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(bridge, copy.deepcopy(peft_config))
    with pytest.raises(NotImplementedError, match=f"blocks.1.mlp.W_out has no site.*{message}"):
        tlb.weight_sites(bridge, "W_out", layers=1)
    assert not any(kind.startswith("W_out") for kind in kinds(bridge))
    covered = tlb.coverage(bridge)
    assert (covered.site.notna() ^ covered.reason.notna()).all()


def test_dora_that_is_merged_or_disabled_has_the_base(tokenizer):
    bridge = boot(hf_model(tokenizer), tokenizer)
    peft_model = attach(bridge, config(target_modules=WRAPPED, use_dora=True))
    with peft_model.disable_adapter():
        assert sites_of_W_out(bridge) == ["W_out"]
        assert_exact(bridge)
    peft_model.merge_adapter()
    assert sites_of_W_out(bridge) == ["W_out"]
    assert_exact(bridge)


def test_embeddings(tokenizer):
    bridge, _ = adapted(tokenizer, target_modules=["embed_tokens", "lm_head"])
    names = [site.name for site in tlb.weight_sites(bridge) if site.layer is None]
    assert names == ["embed.W_E", "unembed.W_U", "unembed.W_U.lora_A", "unembed.W_U.lora_B"]
    assert_exact(bridge)
    with pytest.raises(NotImplementedError, match=r"W_E\.lora_A has no site: .* without a module"):
        tlb.weight_sites(bridge, "W_E.lora_A")


def test_adapters_that_embedding_and_unembedding_share(tokenizer):
    """They are two parameters of one storage, so an edit of one would change the other."""
    tied = AutoModelForCausalLM.from_config(FAMILIES["llama_tied"](len(tokenizer)))
    tied.config.architectures = [type(tied).__name__]
    settings = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    bridge = boot(get_peft_model(tied, config(**settings)).get_base_model(), tokenizer)
    shared = bridge.embed.original_component.lora_embedding_B["default"]
    own = bridge.unembed.original_component.lora_A["default"].weight
    assert shared is not own and shared.data_ptr() == own.data_ptr()
    with pytest.raises(NotImplementedError, match="shares memory with an adapter of embed"):
        tlb.weight_sites(bridge, "W_U.lora_A")


def test_trained_copies(tokenizer):
    """``modules_to_save``: a copy of the whole layer is trained, and in use."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    bridge, peft_model = adapted(tokenizer, **settings)
    copied = bridge.unembed.original_component.modules_to_save["default"].weight
    assert tlb.weight_sites(bridge, "W_U")[0].parameter is copied
    assert_exact(bridge)
    covered = tlb.coverage(bridge).set_index("parameter").reason
    assert "another copy is in use" in covered["lm_head.original_module.weight"]
    with peft_model.disable_adapter():
        assert tlb.weight_sites(bridge, "W_U")[0].parameter is not copied
        assert_exact(bridge)


@pytest.mark.parametrize(
    ("family", "target", "weights"),
    [
        ("gpt2", "c_attn", "W_Q, W_K and W_V"),
        ("gpt_neox", "query_key_value", "W_Q, W_K and W_V"),
        ("phi3", "gate_up_proj", "W_gate and W_in"),
        ("granitemoehybrid", "input_linear", "W_gate and W_in"),
    ],
)
def test_adapters_that_transformer_lens_leaves_out(tokenizer, family, target, weights):
    """It splits such a matrix into copies, and the adapter beside it is never called."""
    family_config = FAMILIES[family](len(tokenizer))
    family_config._experts_implementation = "eager"
    inner = AutoModelForCausalLM.from_config(family_config).double().eval()
    inner.config.architectures = [type(inner).__name__]
    peft_model = randomised(get_peft_model(inner, config(target_modules=[target])))
    expected = peft_model(TOKENS).logits.detach()
    bridge = boot(inner, tokenizer)
    assert relative_error(bridge(TOKENS).detach(), expected) > 0.01
    with pytest.raises(NotImplementedError, match=f"the adapter 'default'.*split into {weights}"):
        tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    with peft_model.disable_adapter():
        assert "unembed.W_U" in tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)[1]


def test_what_to_do_about_it(tokenizer):
    """The advice: merged before booting, the bridge computes the model with the adapter."""
    peft_model = randomised(
        get_peft_model(hf_model(tokenizer, "gpt2"), config("gpt2", target_modules=["c_attn"]))
    )
    expected = peft_model(TOKENS).logits.detach()
    bridge = boot(peft_model.merge_and_unload(), tokenizer)
    torch.testing.assert_close(bridge(TOKENS), expected)
    assert_exact(bridge)


def test_heads_apart(tokenizer):
    """With such a setting TransformerLens multiplies by the weight, and by no adapter."""
    bridge, _ = adapted(tokenizer)
    bridge.set_use_attn_result(True)
    with pytest.raises(NotImplementedError, match=r"leaves the adapter .*cfg\.use_attn_result"):
        tlb.weight_sites(bridge)
    bridge.set_use_attn_result(False)
    assert_exact(bridge)


def test_compatibility_mode(tokenizer):
    bridge = boot(hf_model(tokenizer), tokenizer)
    bridge.enable_compatibility_mode(disable_warnings=True)
    attach(bridge, config(target_modules=WRAPPED))
    left_out = r"leaves the adapter .*(compatibility mode|replaced by a processed W_out)"
    with pytest.raises(NotImplementedError, match=left_out):
        tlb.weight_sites(bridge)


def test_a_model_of_peft_is_no_bridge(tokenizer):
    _, peft_model = adapted(tokenizer)
    with pytest.raises(TypeError, match=r"hf_model=model\.get_base_model\(\)"):
        tlb.weight_sites(peft_model)


# the lens


def test_lens(bridge):
    """By what the base is read by: the same input, and the same VJP but for its length."""
    lens = tlb.BackwardLogitLens(bridge)
    read = lens(PROMPT, TARGET, weights=("W_in", "W_in.lora_A", "W_out", "W_out.lora_B"))
    assert torch.equal(read["W_in.lora_A"].top_ids, read["W_in"].top_ids)
    assert torch.equal(read["W_in.lora_A"].norms, read["W_in"].norms)
    torch.testing.assert_close(read["W_out.lora_B"].norms, SCALING * read["W_out"].norms)
    normed = lens(PROMPT, TARGET, weights=("W_out", "W_out.lora_B"), normalize=True)
    assert torch.equal(normed["W_out.lora_B"].bottom_ids, normed["W_out"].bottom_ids)
    descent = lens(PROMPT, TARGET, weights=("W_in.lora_A", "W_out.lora_B"), direction="descent")
    assert torch.equal(descent["W_in.lora_A"].top_ids, read["W_in"].top_ids)
    assert torch.equal(descent["W_out.lora_B"].top_ids, read["W_out.lora_B"].bottom_ids)
    assert {"W_in.lora_A", "W_out.lora_B"} <= set(read.to_dataframe().weight)


def test_lens_behind_a_post_norm(tokenizer):
    bridge = make("gemma2", tokenizer)
    attach(bridge, config(target_modules=r".*down_proj\._original_component"))
    (site,) = tlb.weight_sites(bridge, "W_out.lora_B", 1)
    assert site.hook_residual == "blocks.1.hook_mlp_out"
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    behind = cache.residual_vjps(("W_out.lora_B", 1))
    assert torch.equal(behind, cache.residual_vjps(("W_out", 1)))
    assert relative_error(behind, cache["W_out.lora_B", 1].vjps) > 0.1


@pytest.mark.parametrize("kind", ["W_in.lora_B", "W_out.lora_A", "W_Q.lora_B"])
def test_lens_of_what_is_between_two_adapters(bridge, kind):
    lens = tlb.BackwardLogitLens(bridge)
    with pytest.raises(ValueError, match=f"{kind}.* neither reads nor writes the residual stream"):
        lens(PROMPT, TARGET, weights=kind)
    _, cache = tlb.run_with_backward_cache(bridge, PROMPT, TARGET)
    with pytest.raises(ValueError, match=f"{kind}.*neither reads the residual stream nor writes"):
        lens.singular_vectors(cache, kind, 1)


def test_singular_vectors_and_neurons(bridge):
    lens = tlb.BackwardLogitLens(bridge)
    _, cache = tlb.run_with_backward_cache(bridge, PROMPT, TARGET)
    U, _, _ = torch.linalg.svd(cache["W_in.lora_A", 1].dense())
    read = lens.singular_vectors(cache, "W_in.lora_A", 1, k=2)
    expected = lens.read(U.T[:2])
    for b in range(2):
        same = read.top_ids[b].equal(expected.top_ids[b])
        assert same or read.top_ids[b].equal(lens.read(-U.T[:2]).top_ids[b])
    rows = cache["W_out.lora_B", 1].dense()[[0, 2]]
    of_rows = lens.neurons(cache, "W_out.lora_B", 1, [0, 2])
    assert torch.equal(of_rows.top_ids, lens.read(rows).top_ids)


def test_an_adapter_on_the_unembedding(tokenizer):
    """No single matrix makes the logits then, and the lens would leave the adapter out."""
    bridge, peft_model = adapted(tokenizer, target_modules=["lm_head"])
    lens = tlb.BackwardLogitLens(bridge)
    with pytest.raises(NotImplementedError, match=r"unembed\.W_U has the adapter 'default', so"):
        lens(PROMPT, TARGET)
    with pytest.raises(NotImplementedError, match=r"unembed\.W_U has the adapter 'default', so"):
        forward_pass_shift(bridge, PROMPT, TARGET, layer=1, lr=0.1)
    layer = bridge.unembed.original_component
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    peft_model.merge_adapter()
    vectors = torch.linspace(-1, 1, 28, dtype=torch.float64).expand(1, 1, -1)
    read = lens.read(vectors, apply_ln=False, return_type="logits", top_k=1)
    torch.testing.assert_close(read.top_values.item(), (vectors @ whole.T).max().item())


# edits


@pytest.mark.parametrize("kind", with_adapters("W_out", "W_Q"))
def test_a_gradient_step(bridge, kind):
    (site,) = tlb.weight_sites(bridge, kind, 1)
    before = site.parameter.detach().clone()
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    site.parameter.requires_grad_(True)
    loss = reference_loss(bridge, TOKENS, TARGET_ID)
    (gradient,) = torch.autograd.grad(loss, site.parameter)
    edit = gradient_step(cache, lr=0.1, weights=kind, layers=1, model=bridge)
    with edit.applied():
        torch.testing.assert_close(site.parameter.detach(), before - 0.1 * gradient)
    assert torch.equal(site.parameter, before)


def test_an_edit_of_the_base_by_hooks(bridge):
    g = GradientFactors(*(torch.randn(2, d, dtype=torch.float64) for d in (44, 28)))
    edit = WeightEdit(bridge, {"blocks.1.mlp.W_out": g})
    with edit.applied():
        expected = bridge(TOKENS)
    hooked = bridge.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks())
    torch.testing.assert_close(hooked, expected)
    assert relative_error(bridge(TOKENS), expected) > 1e-3


@pytest.mark.parametrize("kind", ["W_out.lora_A", "W_out.lora_B"])
def test_an_edit_of_an_adapter_by_hooks_is_refused(bridge, kind):
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    edit = gradient_step(cache, lr=0.1, weights=kind, model=bridge)
    with pytest.raises(NotImplementedError, match=f"{kind} has no HookPoint on both sides"):
        edit.fwd_hooks()


def test_vectors_of_an_edit(bridge):
    _, cache = tlb.run_with_backward_cache(bridge, TOKENS, TARGET_ID)
    step = gradient_step(cache, lr=0.1, weights="W_out.lora_B", layers=1, model=bridge)
    vectors, _ = step.residual_vectors()
    torch.testing.assert_close(vectors, cache["W_out.lora_B", 1].vjps)
    step = gradient_step(cache, lr=0.1, weights="W_in.lora_B", layers=1, model=bridge)
    with pytest.raises(ValueError, match=r"W_in\.lora_B neither reads nor writes the residual"):
        step.residual_vectors()
