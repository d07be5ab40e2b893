"""What the sites of a bridge say about themselves, and what has none."""

from __future__ import annotations

import pytest
import torch
from helpers.bridges import tiny_config
from helpers.families import make
from helpers.gradients import gradient_of_parameter, reference_loss, relative_error
from helpers.texts import PROMPT, TARGET
from helpers.versions import NO_BRIDGE
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

import tl_backward as tlb
from tl_backward.__main__ import app

TransformerBridge = pytest.importorskip(
    "transformer_lens.model_bridge", reason=NO_BRIDGE
).TransformerBridge

TOKENS = torch.tensor([[3, 9, 1, 17, 5, 11, 2]])


def test_names_and_order(boot):
    names = [site.name for site in tlb.weight_sites(boot("gpt2"), layers=[1])]
    block = ["attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"]
    assert names == [f"blocks.1.{name}" for name in block]
    sites = tlb.weight_sites(boot("gpt2"))
    assert [s.name for s in sites if s.layer is None] == [
        "embed.W_E",
        "pos_embed.W_pos",
        "unembed.W_U",
    ]
    (W_Q,) = tlb.weight_sites(boot("llama"), "W_Q", 1)
    assert (W_Q.kind, W_Q.layer, W_Q.d_in, W_Q.d_out) == ("W_Q", 1, 28, 24)
    assert (W_Q.hook_in, W_Q.hook_out) == ("blocks.1.attn.q.hook_in", "blocks.1.attn.q.hook_out")


def test_layout_wants_the_matrix_the_right_way_round(model):
    (site,) = tlb.weight_sites(model, "W_in", 0)
    with pytest.raises(ValueError, match=r"takes a \[28, 44\] matrix, got \(44, 28\)"):
        site.to_parameter_layout(torch.zeros(44, 28))


def test_parameter_is_the_live_tensor(model):
    """A change of it changes the model."""
    before = model(PROMPT)
    for site in tlb.weight_sites(model, layers=1):
        with torch.no_grad():
            site.parameter.add_(0.1)
            assert not torch.equal(model(PROMPT), before), site.name
            site.parameter.sub_(0.1)


def test_tied_embeddings_know_each_other(tokenizer):
    tied = {site.name: site for site in tlb.weight_sites(make("llama_tied", tokenizer))}
    assert tied["embed.W_E"].tied_to == ("unembed.W_U",)
    assert tied["unembed.W_U"].tied_to == ("embed.W_E",)
    assert tied["embed.W_E"].parameter is tied["unembed.W_U"].parameter
    assert tied["blocks.0.mlp.W_in"].tied_to == ()
    untied = tlb.weight_sites(make("llama", tokenizer))
    assert all(site.tied_to == () for site in untied)


def test_bias_gradients(boot):
    model = boot("gpt2")
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    loss = reference_loss(model, model.to_tokens(PROMPT), model.to_single_token(TARGET))
    for site in tlb.weight_sites(model, layers=[0, 1]):
        bias = site.x_tap().module.bias
        gradient = torch.autograd.grad(loss, bias, retain_graph=True)[0]
        # the gradient of b_K is 0, because softmax does not see a shift
        torch.testing.assert_close(cache.bias_gradient(site.name), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "glm4"])
@pytest.mark.parametrize(("kind", "hook"), [("W_out", "hook_mlp_out"), ("W_O", "hook_attn_out")])
def test_vjps_behind_a_post_norm(tokenizer, family, kind, hook):
    """At the residual stream: what a backward hook of TransformerLens sees there."""
    model = make(family, tokenizer)
    (site,) = tlb.weight_sites(model, kind, 0)
    assert site.hook_residual == f"blocks.0.{hook}"
    seen = []
    with model.hooks(bwd_hooks=[(site.hook_residual, lambda g, hook: seen.append(g[0].clone()))]):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, 5, weights=kind)
    torch.testing.assert_close(cache.residual_vjps((kind, 0)), seen[0].reshape(len(TOKENS[0]), -1))
    assert relative_error(cache.residual_vjps((kind, 0)), cache[kind, 0].vjps) > 0.1

    lens = tlb.BackwardLogitLens(model)
    by_default = lens(TOKENS, 5, weights=kind)[kind].norms
    at_output = lens(TOKENS, 5, weights=kind, vjps="output")[kind].norms
    torch.testing.assert_close(by_default[0], cache.residual_vjps((kind, 0)).norm(dim=-1))
    torch.testing.assert_close(at_output[0], cache[kind, 0].vjps.norm(dim=-1))


def test_without_a_post_norm_there_is_one_vjp(model):
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights="W_out")
    assert cache.residual_vjps("blocks.1.mlp.W_out") is cache["W_out", 1].vjps
    assert all(site.hook_residual is None for site in tlb.weight_sites(model))


PROCESSING = {
    "fold_ln": "fold_ln",
    "center_writing_weights": "center_writing_weights",
    "center_unembed": "center_unembed",
    "fold_value_biases": "fold_value_biases",
}


@pytest.mark.parametrize("family", ["gpt2_untied", "llama_heads", "phi3", "opt", "gpt_neox"])
@pytest.mark.parametrize("left_out", [None, *PROCESSING])
def test_compatibility_mode(tokenizer, family, left_out):
    """Gradients are with respect to the processed weights, and the cache says so."""
    model = make(family, tokenizer)
    model.enable_compatibility_mode(
        disable_warnings=True, **{step: step != left_out for step in PROCESSING}
    )
    loss, cache = tlb.run_with_backward_cache(model, TOKENS, 5)
    sites = tlb.weight_sites(model)
    for site in sites:
        site.parameter.requires_grad_()  # TransformerLens 3 processes weights into plain tensors
    reference = reference_loss(model, TOKENS, 5)
    torch.testing.assert_close(loss, reference)
    gradients = torch.autograd.grad(reference, [site.parameter for site in sites])
    for site, gradient in zip(sites, gradients, strict=True):
        got = gradient_of_parameter(sites, cache, site)
        assert got.shape == site.parameter.shape
        assert relative_error(got, gradient) <= 1e-10, site.name
        assert {site.hook_in, site.hook_out} <= {None, *model.hook_dict}
    steps = set(cache.weights_processing.split(", "))
    assert left_out not in steps
    if family == "gpt2_untied":
        assert steps == set(PROCESSING) - {left_out}


def test_raw_weights_are_called_raw(model):
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, layers=0)
    assert cache.weights_processing == "raw"
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, layers=0)
    assert cache.weights_processing == "raw"


def reasons(model):
    covered = tlb.coverage(model)
    return dict(zip(covered.parameter, covered.reason, strict=True))


def test_coverage_gives_sites_and_reasons(tokenizer):
    covered = tlb.coverage(make("llama_tied", tokenizer)).set_index("parameter")
    assert covered.site["model.embed_tokens.weight"] == "embed.W_E + unembed.W_U"
    assert covered["shape"]["model.layers.1.mlp.down_proj.weight"] == (28, 44)
    assert covered.site["model.layers.1.mlp.down_proj.weight"] == "blocks.1.mlp.W_out"
    assert (
        "bias_gradient('blocks.0.attn.W_Q')"
        in covered.reason["model.layers.0.self_attn.q_proj.bias"]
    )
    assert "norm" in covered.reason["model.layers.0.input_layernorm.weight"]
    by_name = reasons(make("gpt2", tokenizer))
    fused = [name for name in by_name if ".qkv." in name]
    assert fused and all("split into W_Q, W_K and W_V" in by_name[name] for name in fused)
    by_name = reasons(make("mamba", tokenizer))
    assert any("convolution" in str(reason) for reason in by_name.values())


def test_coverage_has_every_parameter(tokenizer):
    model = make("jamba", tokenizer)
    everything = {id(p) for p in (*model.parameters(), *torch.nn.Module.parameters(model))}
    assert len(tlb.coverage(model)) == len(everything)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("deepseek_v3", {"weights": "W_Q"}, "no 'q' projection"),
        ("mamba", {"weights": "W_V"}, "SSMMixerBridge 'mixer' instead"),
        ("jamba", {"weights": "W_Q", "layers": 0}, r"blocks\.0\.attn\.W_Q.*'mixer' instead"),
        ("recurrent_gemma", {"weights": "W_Q", "layers": 0}, "names no part of its RecurrentG"),
        ("mamba", {"weights": "W_dt"}, "multiplies by the weight without calling the module"),
        ("glm_moe_dsa", {"weights": "W_wk"}, "only chooses positions"),
        ("deepseek_v4", {"weights": "W_o_a_proj"}, "DeepseekV4GroupedLinear does not compute x W"),
    ],
)
def test_weights_without_a_site_are_refused_by_name(tokenizer, family, arguments, message):
    model = make(family, tokenizer)
    with pytest.raises(NotImplementedError, match=message):
        tlb.weight_sites(model, **arguments)
    assert len(tlb.weight_sites(model)) >= 2


def test_layers_that_have_the_weight_are_found_where_some_have_not(tokenizer):
    model = make("jamba", tokenizer)
    assert [site.layer for site in tlb.weight_sites(model, "W_Q")] == [1, 3]


@pytest.mark.parametrize("setting", ["use_split_qkv_input", "use_attn_in"])
def test_inputs_by_head_are_refused(boot, setting):
    model = boot("llama")
    getattr(model, f"set_{setting}")(True)
    with pytest.raises(NotImplementedError, match=f"cfg.{setting}"):
        tlb.weight_sites(model, "W_Q")
    assert "blocks.0.attn.W_O" in {site.name for site in tlb.weight_sites(model)}


def test_results_by_head_are_refused(boot):
    model = boot("llama")
    model.set_use_attn_result(True)
    with pytest.raises(NotImplementedError, match=r"cfg\.use_attn_result"):
        tlb.weight_sites(model, "W_O")


def encoder_decoder(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer), d_model=28, d_kv=8, d_ff=44, num_layers=2, num_heads=4
    )
    hf = T5ForConditionalGeneration(config).eval()
    return TransformerBridge.boot_transformers("t5", hf_model=hf, tokenizer=tokenizer)


def vision_model(tokenizer):
    config = ViTConfig(
        hidden_size=28, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
    )
    hf = ViTForImageClassification(config).eval()
    hf.config.architectures = ["ViTForImageClassification"]
    return TransformerBridge.boot_transformers("vit", hf_model=hf)


def test_models_of_other_kinds_are_refused(tokenizer):
    with pytest.raises(NotImplementedError, match=r"encoder-decoder model \(T5For"):
        tlb.weight_sites(encoder_decoder(tokenizer))
    with pytest.raises(NotImplementedError, match=r"vision model \(ViTFor"):
        tlb.coverage(vision_model(tokenizer))


@pytest.mark.usefixtures("unchecked")
def test_objects_of_other_kinds_are_refused(boot):
    hf = boot("llama").original_model
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; wrap it with .*hf_model="):
        tlb.weight_sites(hf)


@pytest.mark.usefixtures("unchecked")
def test_a_remote_bridge_is_refused():
    remote = pytest.importorskip(
        "transformer_lens.model_bridge.remote_bridge",
        reason="TransformerLens 3 has no RemoteBridge",
    )
    with pytest.raises(TypeError, match="got RemoteBridge"):
        tlb.coverage(remote.RemoteBridge.__new__(remote.RemoteBridge))


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(torch.nn.Linear):
    pass


def test_linear_layers_of_unknown_type_are_tried(boot):
    model = boot("llama")
    down = model.blocks[1].mlp.original_component.down_proj.original_component
    down.__class__ = Renamed
    assert len(tlb.weight_sites(model, "W_out")) == 3
    down.__class__ = Scaled
    with pytest.raises(NotImplementedError, match=r"Scaled does not compute x W \+ b"):
        tlb.weight_sites(model, "W_out", 1)
    assert [site.layer for site in tlb.weight_sites(model, "W_out")] == [0, 2]


def test_quantised_tensor_subclasses_are_exact(tokenizer):
    """torchao's int8 weights: the factors are those of the dequantised weights."""
    torchao = pytest.importorskip(
        "torchao.quantization",
        reason="torchao is installed for TransformerLens 3 only (noxfile.py)",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).eval()
    torchao.quantize_(
        hf, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith("_proj")
    )
    exact = AutoModelForCausalLM.from_config(hf.config).eval()
    exact.load_state_dict(
        {n: w.dequantize() if "_proj" in n else w for n, w in hf.state_dict().items()}
    )
    caches = []
    for wrapped in (hf, exact):
        model = TransformerBridge.boot_transformers("llama", hf_model=wrapped, tokenizer=tokenizer)
        caches.append(tlb.run_with_backward_cache(model, TOKENS, 5)[1])
        assert all(site.tied_to == () for site in tlb.weight_sites(model))
    quantised, reference = caches
    assert len(quantised) == len(reference) == 23
    for name, g in reference.items():
        assert relative_error(quantised[name].dense(), g.dense()) <= 1e-4, name


def test_quantised_weights_are_refused_by_name(boot):
    model = boot("llama")
    linear = model.blocks[0].mlp.original_component.up_proj.original_component
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.mlp\.W_in.*quantised.*int8"):
        tlb.weight_sites(model, "W_in", 0)
    assert "int8" in reasons(model)["model.layers.0.mlp.up_proj.weight"]


def test_a_local_model_is_not_needed_to_list_sites(boot, monkeypatch):
    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: boot("llama"))
    shown = CliRunner().invoke(app, ["sites"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "model.layers.1.mlp.down_proj.weight │ 28 x 44 │ blocks.1.mlp.W_out" in text
    assert f"23 of {len(tlb.coverage(boot('llama')))} parameters have a site" in text


def test_half_precision_factors_keep_their_dtype(boot, kind):
    model = boot(kind, torch.bfloat16)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert {g.vjps.dtype for g in cache.values()} == {torch.bfloat16}
    assert {g.inputs.dtype for g in cache.values()} == {torch.bfloat16}
    exact = boot(kind, torch.float32)
    with torch.no_grad():
        for half, full in zip(model.parameters(), exact.parameters(), strict=True):
            full.copy_(half)
    _, reference = tlb.run_with_backward_cache(exact, PROMPT, TARGET)
    for name in ("blocks.1.mlp.W_in", "blocks.1.attn.W_O"):
        assert cache[name].cosine(reference[name]) > 0.99
