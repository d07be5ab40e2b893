"""Pruned, normalised and parametrized weights: exact captures, hooks that work, no apply()."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.bridges import tiny_config
from helpers.edits import added, factors, hooked_logits, logits
from helpers.gradients import relative_error
from helpers.hooked import GATED
from helpers.hooked import build as build_hooked
from helpers.versions import CLASSES
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import tl_backward as tlb
from tl_backward.editing import WeightEdit

TARGET = 5
TOKENS = torch.tensor([[3, 17, 3, 29, 8, 9]])


class Doubled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, W: Tensor) -> Tensor:
        return self.scale * W


class Halving:
    """What somebody's own forward pre-hook may do."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        module.register_parameter(f"whole_{name}", module._parameters.pop(name))
        self(module, ())
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: object) -> None:
        setattr(module, self.name, 0.5 * module.get_parameter(f"whole_{self.name}"))


WAYS: dict[str, Callable[[nn.Module, str], object]] = {
    "prune": lambda module, name: prune.random_unstructured(module, name, 0.3),
    "prune twice": lambda module, name: [
        prune.random_unstructured(module, name, 0.3),
        prune.l1_unstructured(module, name, 0.3),
    ],
    "weight_norm": lambda module, name: utils.weight_norm(module, name),
    "spectral_norm": lambda module, name: utils.spectral_norm(module, name),
    "parametrized weight_norm": lambda module, name: parametrizations.weight_norm(module, name),
    "parametrized spectral_norm": lambda module, name: parametrizations.spectral_norm(module, name),
    "parametrized twice": lambda module, name: [
        parametrize.register_parametrization(module, name, Doubled()),
        parametrize.register_parametrization(module, name, Doubled()),
    ],
}
REMEDIES = {
    "prune": prune.remove,
    "prune twice": prune.remove,
    "weight_norm": utils.remove_weight_norm,
    "spectral_norm": utils.remove_spectral_norm,
}


def places(model: object, kind: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Weights of every kind, by the names of their sites."""
    if kind == "hooked":
        yield "embed.W_E", model.embed, "W_E"
        yield "blocks.1.attn.W_Q", model.blocks[1].attn, "W_Q"
        yield "blocks.0.attn.W_O", model.blocks[0].attn, "W_O"
        for weight in ("W_in", "W_gate", "W_out"):
            yield f"blocks.1.mlp.{weight}", model.blocks[1].mlp, weight
        yield "unembed.W_U", model.unembed, "W_U"
        return
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    if kind == "llama":
        yield "embed.W_E", model.model.embed_tokens, "weight"
        yield "blocks.1.attn.W_Q", blocks[1].self_attn.q_proj, "weight"
        yield "blocks.1.mlp.W_gate", blocks[1].mlp.gate_proj, "weight"
        yield "blocks.2.mlp.W_out", blocks[2].mlp.down_proj, "weight"
        yield "unembed.W_U", model.lm_head, "weight"
        return
    yield "pos_embed.W_pos", model.transformer.wpe, "weight"
    yield "blocks.1.attn.W_O", blocks[1].attn.c_proj, "weight"
    yield "blocks.1.mlp.W_in", blocks[1].mlp.c_fc, "weight"


def build(kind: str, tokenizer, change: Callable[[nn.Module, str], object] = lambda m, n: None):
    """A random model with some of its weights changed, and their sites' names.

    The Hugging Face models are changed before they are wrapped.
    """
    torch.manual_seed(0)
    if kind == "hooked":
        model = build_hooked(**GATED)
        names = [name for name, *place in places(model, kind) if [change(*place)]]
        return model.eval(), names
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer))).double().eval()
    names = [name for name, *place in places(hf, kind) if [change(*place)]]
    model = TransformerBridge.boot_transformers(
        kind, hf_model=hf, tokenizer=tokenizer, dtype=torch.float64, device="cpu"
    )
    return model.eval(), names


KINDS = ["llama", "gpt2"] * ("bridge" in CLASSES) + ["hooked"] * ("hooked" in CLASSES)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=WAYS)
def way(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _no_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def sites_of(model):
    return {site.name: site for site in tlb.weight_sites(model)}


def sources_of(site) -> list[nn.Parameter]:
    """The parameters behind a weight, found by their names."""
    module, name = site.holder
    found = dict(module.named_parameters())
    return [p for at, p in found.items() if at.startswith((f"{name}_", f"parametrizations.{name}"))]


def test_captures_are_exact(kind, way, tokenizer):
    """Autograd's gradients of the parameters behind a weight are those of it, carried on."""
    model, names = build(kind, tokenizer, WAYS[way])
    plain, _ = build(kind, tokenizer)
    assert sites_of(model).keys() == sites_of(plain).keys()
    before = logits(model)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    assert torch.equal(logits(model), before)
    loss = -model(TOKENS)[0, -1].log_softmax(-1)[TARGET]
    for name in names:
        site = sites_of(model)[name]
        sources = sources_of(site)
        assert sources and not site.tied_to
        expected = torch.autograd.grad(loss, sources, retain_graph=True)
        of_weight = site.to_parameter_layout(cache[name].dense())
        got = torch.autograd.grad(site.parameter, sources, of_weight, retain_graph=True)
        for ours, theirs in zip(got, expected, strict=True):
            assert relative_error(ours, theirs) <= 1e-10, name


def test_the_coverage_says_what_the_parameters_are(kind, way, tokenizer):
    model, names = build(kind, tokenizer, WAYS[way])
    table = tlb.coverage(model)
    for name in names:
        rows = table[table.reason.fillna("").str.startswith(f"{name} is recomputed from it by")]
        assert len(rows) == len(sources_of(sites_of(model)[name])), name
        assert sites_of(model)[name].recomputed.by in rows.reason.iloc[0]


def test_apply_is_refused_and_hooks_work(kind, way, tokenizer):
    """The hooks give what the update gives, written into the weight after the remedy."""
    model, names = build(kind, tokenizer, WAYS[way])
    remedied, _ = build(kind, tokenizer, WAYS[way])
    sites = sites_of(model)
    plain = logits(model)
    remedy = REMEDIES.get(way, parametrize.remove_parametrizations)
    for name in names:
        remedy(*sites_of(remedied)[name].holder)
    for name in names:
        edit = WeightEdit(model, {name: factors(sites[name])})
        advice = rf"{remedy.__name__}\(module, '{sites[name].holder[1]}'\)"
        with pytest.raises(NotImplementedError, match=f"{name} is recomputed.*{advice}"):
            edit.apply()
        with pytest.raises(NotImplementedError, match="or use fwd_hooks"), edit.applied():
            pass
        assert not edit.is_applied and torch.equal(logits(model), plain)
        stored = sites_of(remedied)[name]
        original = stored.parameter.detach().clone()
        with torch.no_grad():
            stored.parameter.add_(stored.to_parameter_layout(added(edit, name)))
            expected = logits(remedied)
            stored.parameter.copy_(original)
        torch.testing.assert_close(hooked_logits(edit), expected, rtol=1e-9, atol=1e-9)
        assert relative_error(expected, plain) > 1e-4
        with WeightEdit(remedied, edit.factors).applied():
            torch.testing.assert_close(logits(remedied), expected, rtol=1e-9, atol=1e-9)


def test_a_hook_of_the_users_own(kind, tokenizer):
    model, names = build(kind, tokenizer, Halving)
    site = sites_of(model)[names[1]]
    assert site.recomputed.by == "a forward pre-hook of its module"
    edit = WeightEdit(model, {site.name: factors(site)})
    with pytest.raises(NotImplementedError, match=r"make \w+ a parameter"):
        edit.apply()
    assert relative_error(hooked_logits(edit), logits(model)) > 1e-4


@pytest.mark.skipif("bridge" not in CLASSES, reason="there is no bridge")
def test_a_parameter_that_another_weight_is_recomputed_from(tokenizer):
    """The pruned unembedding of tied embeddings: a change of W_E would change both."""

    def pruned(module, name):
        if isinstance(module, nn.Linear) and module.out_features == len(tokenizer):
            module.weight = embeddings[0].weight
            prune.random_unstructured(module, name, 0.3)
        elif isinstance(module, nn.Embedding):
            embeddings.append(module)

    embeddings: list[nn.Embedding] = []
    model, _ = build("llama", tokenizer, pruned)
    site = sites_of(model)["embed.W_E"]
    assert site.feeds == ("unembed.W_U",) and not site.tied_to
    edit = WeightEdit(model, {site.name: factors(site)})
    with pytest.raises(NotImplementedError, match="W_U is recomputed from the parameter"):
        edit.apply()
    row = tlb.coverage(model).query("site == 'embed.W_E'")
    assert row.reason.str.startswith("unembed.W_U is recomputed from it").all() and len(row) == 1
    assert relative_error(hooked_logits(edit), logits(model)) > 1e-4
