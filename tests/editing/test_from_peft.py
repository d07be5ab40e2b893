"""Adapters as edits, against the weights that peft merges; and edited models on disk."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from helpers.adapters import boot, config, hf_model, randomised
from helpers.edits import TOKENS, logits, random_edit, same_bits, weights
from helpers.families import FAMILIES, make
from helpers.gradients import relative_error
from helpers.state import state
from helpers.versions import NEEDS_BRIDGE, NEEDS_HOOKED_TRANSFORMER
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import tl_backward as tlb
from tl_backward.editing import WeightEdit

pytestmark = NEEDS_BRIDGE

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.up_proj": 7, "up_proj": 3, "^model.layers.2.*": 2},
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["down_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "gaussian, with dropout": {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
}
GPT2 = {"target_modules": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]}


def with_adapter(tokenizer, kind="llama", **settings):
    return randomised(get_peft_model(hf_model(tokenizer, kind), config(kind, **settings)))


def assert_merges(edit, merged):
    """The edit adds to every site of its model what the other model has there."""
    differing = 0
    pairs = zip(tlb.weight_sites(edit.model), tlb.weight_sites(merged), strict=True)
    for site, other in pairs:
        difference = other.parameter.detach() - site.parameter.detach()
        differing += bool(difference.any())
        if site.name in edit.factors:
            got = site.to_parameter_layout(edit.factors[site.name].dense())
            assert relative_error(got, difference) <= 1e-12, site.name
        else:
            assert not difference.any(), site.name
    assert differing == len(edit.factors) > 0
    with edit.applied():
        torch.testing.assert_close(logits(edit.model), logits(merged), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("given", ["folder", "file", "model"])
def test_an_adapter_is_what_peft_merges(tokenizer, tmp_path, settings, given):
    peft_model = with_adapter(tokenizer, **settings)
    peft_model.save_pretrained(tmp_path)
    adapter = {
        "folder": str(tmp_path),
        "file": tmp_path / "adapter_model.safetensors",
        "model": peft_model,
    }[given]
    base = boot(hf_model(tokenizer), tokenizer)
    before = state(base)
    edit = WeightEdit.from_peft(base, adapter)
    assert state(base) == before
    if given != "model":  # peft sorts the patterns when it saves, and takes the first that matches
        peft_model = peft.PeftModel.from_pretrained(hf_model(tokenizer), tmp_path).double()
    assert_merges(edit, boot(peft_model.merge_and_unload(), tokenizer))


@pytest.mark.parametrize("given", ["folder", "model"])
def test_transposed_and_fused_weights(tokenizer, tmp_path, given):
    """GPT-2's weights are stored as [in, out], and its W_Q, W_K and W_V are one."""
    peft_model = with_adapter(tokenizer, "gpt2", **GPT2)
    peft_model.save_pretrained(tmp_path)
    edit = WeightEdit.from_peft(
        boot(hf_model(tokenizer, "gpt2"), tokenizer), tmp_path if given == "folder" else peft_model
    )
    kinds = {name.rpartition(".")[2] for name in edit.factors}
    assert kinds == {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}
    assert_merges(edit, boot(peft_model.merge_and_unload(), tokenizer))


FUSED = {
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "falcon_new": ["query_key_value"],
    "gpt_bigcode": ["c_attn"],
    "mpt": ["Wqkv"],
    "glm": ["gate_up_proj"],
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_weights_are_split_as_the_bridge_splits_them(tokenizer, family, tmp_path):
    base = make(family, tokenizer)
    inner = make(family, tokenizer).original_model
    inner = inner.__class__(inner.config).double().eval()
    clean = {name.replace("._original_component", ""): p for name, p in inner.named_parameters()}
    source = {
        name.replace("._original_component", ""): p
        for name, p in base.original_model.named_parameters(remove_duplicate=False)
    }
    with torch.no_grad():
        for name, parameter in clean.items():
            parameter.copy_(source[name])
    peft_model = randomised(get_peft_model(inner, config(target_modules=FUSED[family])))
    rng = torch.get_rng_state()
    edit = WeightEdit.from_peft(base, peft_model)
    assert torch.equal(torch.get_rng_state(), rng)
    merged = peft_model.merge_and_unload()
    merged.config.architectures = base.original_model.config.architectures
    assert_merges(edit, boot(merged, tokenizer))


def test_several_active_adapters_are_added(tokenizer, tmp_path):
    peft_model = get_peft_model(hf_model(tokenizer), config(target_modules=["down_proj"]))
    peft_model.add_adapter("french", config(r=2, target_modules=["down_proj", "q_proj"]))
    peft_model.add_adapter("german", config(r=4))
    randomised(peft_model)
    peft_model.base_model.set_adapter(["default", "french"])
    base = boot(hf_model(tokenizer), tokenizer)
    both = WeightEdit.from_peft(base, peft_model)
    assert len(both.factors["blocks.1.mlp.W_out"].vjps) == 3 + 2
    peft_model.save_pretrained(tmp_path)
    default, french = (WeightEdit.from_peft(base, tmp_path / name) for name in ("", "french"))
    for name, g in (default + french).factors.items():
        torch.testing.assert_close(g.dense(), both.factors[name].dense())
    merged = peft_model.merge_and_unload(adapter_names=["default", "french"])
    assert_merges(both, boot(merged, tokenizer))


def test_the_report_has_the_scale_of_every_module(tokenizer, tmp_path):
    settings = {"alpha_pattern": {"up_proj": 7}, "target_modules": ["up_proj", "q_proj"]}
    with_adapter(tokenizer, **settings).save_pretrained(tmp_path)
    report = WeightEdit.from_peft(boot(hf_model(tokenizer), tokenizer), tmp_path).report
    assert report.source == str(tmp_path)
    assert report.modules == {
        f"model.layers.{layer}.{module}": alpha / 3
        for layer in range(3)
        for module, alpha in (("mlp.up_proj", 7), ("self_attn.q_proj", 5))
    }


def test_a_scale_that_was_changed_is_heeded(tokenizer):
    peft_model = with_adapter(tokenizer, target_modules=["down_proj"])
    base = boot(hf_model(tokenizer), tokenizer)
    plain = WeightEdit.from_peft(base, peft_model)
    for layer in peft_model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)
    edit = WeightEdit.from_peft(base, peft_model)
    for name, g in edit.factors.items():
        torch.testing.assert_close(g.dense(), 3 * plain.factors[name].dense())


def test_an_adapter_is_an_ordinary_edit(tokenizer, tmp_path):
    peft_model = with_adapter(tokenizer)
    base = boot(hf_model(tokenizer), tokenizer)
    edit = WeightEdit.from_peft(base, peft_model)
    original = weights(base)
    expected = logits(boot(peft_model.merge_and_unload(), tokenizer))
    torch.testing.assert_close(logits(base, edit.fwd_hooks()), expected)
    loaded = WeightEdit.load(edit.save(tmp_path / "edit.safetensors"), base)
    with loaded.applied():
        torch.testing.assert_close(logits(base), expected)
    torch.testing.assert_close(logits(base, (2 * edit + (-1) * edit).fwd_hooks()), expected)
    assert same_bits(weights(base), original)


# what is refused


def refused(tokenizer, tmp_path, error, message, kind="llama", base=None, **settings):
    peft_model = get_peft_model(hf_model(tokenizer, kind), config(kind, **settings))
    peft_model.save_pretrained(tmp_path)
    base = base or boot(hf_model(tokenizer, kind), tokenizer)
    for adapter in (peft_model, tmp_path):
        with pytest.raises(error, match=message):
            WeightEdit.from_peft(base, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"no plain LoRA: use_dora=True \(DoRA\); merge it into the base"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
    ],
)
def test_more_than_two_matrices_are_refused(tokenizer, tmp_path, settings, message):
    refused(tokenizer, tmp_path, NotImplementedError, message, **settings)


def test_other_methods_of_peft_are_refused(tokenizer, tmp_path):
    model = hf_model(tokenizer)
    peft_model = get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    peft_model.save_pretrained(tmp_path)
    for adapter in (peft_model, tmp_path):
        with pytest.raises(NotImplementedError, match=r"is no LoRA \(peft_type=IA3\)"):
            WeightEdit.from_peft(boot(hf_model(tokenizer), tokenizer), adapter)


def test_modules_that_the_model_lacks_are_named(tokenizer, tmp_path):
    base = boot(hf_model(tokenizer, "gpt2"), tokenizer)
    refused(
        *(tokenizer, tmp_path, ValueError),
        "the model has no module model.layers.0.self_attn.q_proj; load the adapter's own base",
        base=base,
        target_modules=["q_proj"],
    )


def test_an_adapter_with_another_base_is_refused(tokenizer, tmp_path):
    """peft stores the embeddings with adapters of them."""
    with_adapter(tokenizer, target_modules=["lm_head"]).save_pretrained(tmp_path)
    inner = hf_model(tokenizer)
    inner.lm_head.weight.data[3, 4] += 1
    with pytest.raises(ValueError, match="it brings a weight of its own for lm_head, and that of"):
        WeightEdit.from_peft(boot(inner, tokenizer), tmp_path)


def test_other_shapes_are_named(tokenizer, tmp_path):
    with_adapter(tokenizer, target_modules=["down_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v[:, :-1].clone() if "lora_A" in k else v for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj is \[44, 28\] in the model, and"):
        WeightEdit.from_peft(boot(hf_model(tokenizer), tokenizer), tmp_path)


def test_a_model_that_has_the_adapter_already_is_refused(tokenizer, tmp_path):
    peft_model = with_adapter(tokenizer, target_modules=["down_proj"])
    peft_model.save_pretrained(tmp_path)
    base = boot(peft_model.get_base_model(), tokenizer)
    with pytest.raises(ValueError, match="has the adapter 'default' already"):
        WeightEdit.from_peft(base, tmp_path)
    peft_model.base_model.disable_adapter_layers()
    edit = WeightEdit.from_peft(base, tmp_path)
    added = edit.factors["blocks.1.mlp.W_out"].dense()
    layer = base.blocks[1].mlp.out.original_component
    torch.testing.assert_close(added.mT, layer.get_delta_weight("default"))


def test_quantised_bases_are_refused(tokenizer, tmp_path):
    with_adapter(tokenizer, target_modules=["down_proj"]).save_pretrained(tmp_path)
    base = boot(hf_model(tokenizer), tokenizer)
    module = tlb.weight_sites(base, "W_out", 1)[0].holder[0]
    module.weight = nn.Parameter(torch.zeros(28, 44, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        NotImplementedError,
        match=r"layers.1.mlp.down_proj has no site: its Linear stores a quantised",
    ):
        WeightEdit.from_peft(base, tmp_path)


def test_tied_embeddings_are_refused(tokenizer, tmp_path):
    inner = AutoModelForCausalLM.from_config(FAMILIES["llama_tied"](len(tokenizer))).double()
    with pytest.warns(UserWarning):
        peft_model = get_peft_model(inner, config(target_modules=["embed_tokens"]))
    base = make("llama_tied", tokenizer)
    with pytest.raises(NotImplementedError, match=r"shares its weight with unembed\.W_U"):
        WeightEdit.from_peft(base, peft_model)


def test_processed_weights_are_refused(tokenizer, tmp_path):
    base = boot(hf_model(tokenizer, "gpt2"), tokenizer)
    base.enable_compatibility_mode(disable_warnings=True)
    refused(
        *(tokenizer, tmp_path, ValueError, "made for raw weights, and those of the model are fold"),
        kind="gpt2",
        base=base,
    )


def test_folders_and_files_that_hold_no_adapter(tokenizer, tmp_path):
    base = boot(hf_model(tokenizer), tokenizer)
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config\.json in"):
        WeightEdit.from_peft(base, tmp_path)
    with_adapter(tokenizer).save_pretrained(tmp_path / "french")
    with pytest.raises(FileNotFoundError, match="there are adapters in french"):
        WeightEdit.from_peft(base, tmp_path)
    (tmp_path / "french" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        WeightEdit.from_peft(base, tmp_path / "french")
    (tmp_path / "french" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no file"):
        WeightEdit.from_peft(base, tmp_path / "french")
    with pytest.raises(TypeError, match="adapter must be the folder or the safetensors file"):
        WeightEdit.from_peft(base, {"lora_A": 1})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_tomorrow": {"k": 2}}, r"use_tomorrow=\{'k': 2\}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' has changed"),
    ],
)
def test_settings_that_change_more_are_refused(tokenizer, tmp_path, setting, message):
    with_adapter(tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(NotImplementedError, match=message):
        WeightEdit.from_peft(boot(hf_model(tokenizer), tokenizer), tmp_path)


@NEEDS_HOOKED_TRANSFORMER
def test_a_hooked_transformer_is_refused(models, tmp_path):
    with pytest.raises(NotImplementedError, match="which a HookedTransformer does not have"):
        WeightEdit.from_peft(models("hooked-llama"), tmp_path)


# edited models on disk


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gpt_neox", "phi3", "gemma2"])
def test_an_exported_model_computes_what_the_edited_one_does(tokenizer, family, tmp_path):
    model = make(family, tokenizer)
    names = [site.name for site in tlb.weight_sites(model, layers=1)]
    edit = sum((random_edit(model, name) for name in names[1:]), random_edit(model, names[0]))
    if family == "llama_tied":
        edit = edit + random_edit(model, "embed.W_E")
    before = state(model)
    assert edit.export(tmp_path / "edited") == tmp_path / "edited"
    assert state(model) == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    assert loaded.dtype == torch.float64
    assert loaded.config.to_dict().keys() >= {"vocab_size"}
    with edit.applied(), torch.no_grad():
        expected = logits(model)
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        edit.export(tmp_path / "once")  # of an applied edit, once
    assert relative_error(expected, logits(model)) > 1e-3
    again = load_file(tmp_path / "once" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "edited" / "model.safetensors").items():
        assert torch.equal(again[name], tensor)


def test_what_no_checkpoint_can_hold_is_refused(tokenizer, tmp_path):
    model = boot(hf_model(tokenizer, "gpt2"), tokenizer)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(NotImplementedError, match=r"the weights are processed \(fold_ln"):
        random_edit(model, "blocks.1.mlp.W_out").export(tmp_path)
    adapted = boot(with_adapter(tokenizer).get_base_model(), tokenizer)
    with pytest.raises(NotImplementedError, match=r"q_proj has an adapter of peft"):
        random_edit(adapted, "blocks.1.mlp.W_out").export(tmp_path)
    with pytest.raises(ValueError, match="bound to no model"):
        WeightEdit(None, {}).export(tmp_path)
    assert not list(tmp_path.iterdir())


@NEEDS_HOOKED_TRANSFORMER
def test_a_hooked_transformer_has_no_checkpoint(models, tmp_path):
    with pytest.raises(NotImplementedError, match="holds no Hugging Face model"):
        random_edit(models("hooked-gpt2"), "blocks.1.mlp.W_out").export(tmp_path)
