"""The same weights in a TransformerBridge and in a HookedTransformer, where there are both."""

from __future__ import annotations

import pytest
import torch
from helpers.bridges import tiny_config
from helpers.hooked import hooked
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BOTH_CLASSES
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_backward as tlb

pytestmark = NEEDS_BOTH_CLASSES


def pair(hf, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    model = hooked(hf, tokenizer)
    kind = hf.config.model_type
    bridge = TransformerBridge.boot_transformers(
        kind, hf_model=hf, tokenizer=tokenizer, dtype=hf.dtype, device="cpu"
    )
    return model, bridge


@pytest.fixture
def tiny_pair(kind, tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
        for parameter in hf.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return pair(hf.eval(), tokenizer)


def assert_alike(model, bridge, prompt, target, tolerance, layers=None, weights=None):
    described = [
        [
            (s.name, s.kind, s.layer, s.hook_in, s.hook_out, s.hook_residual, s.d_in, s.d_out)
            for s in tlb.weight_sites(m)
        ]
        for m in (model, bridge)
    ]
    assert described[0] == described[1]
    loss, cache = tlb.run_with_backward_cache(model, prompt, target, layers=layers, weights=weights)
    same_loss, same = tlb.run_with_backward_cache(
        bridge, prompt, target, layers=layers, weights=weights
    )
    torch.testing.assert_close(loss, same_loss, rtol=tolerance, atol=tolerance)
    assert cache.str_tokens == same.str_tokens and list(cache) == list(same)
    for name, g in cache.items():
        # keys share a direction that softmax does not see, so their VJPs are small differences
        for ours, theirs in ((g.inputs, same[name].inputs), (g.vjps, same[name].vjps)):
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), name


def assert_read_alike(model, bridge, prompt, target, **arguments):
    ours = tlb.BackwardLogitLens(model)(prompt, target, **arguments)
    theirs = tlb.BackwardLogitLens(bridge)(prompt, target, **arguments)
    for kind, read in ours.items():
        seen = ~read.zero_mask
        assert torch.equal(read.zero_mask, theirs[kind].zero_mask)
        torch.testing.assert_close(
            read.top_values[seen], theirs[kind].top_values[seen], rtol=1e-3, atol=1e-3
        )
        assert (read.top_ids == theirs[kind].top_ids)[seen].float().mean() > 0.99
        moved = (read.target_ranks - theirs[kind].target_ranks).abs()
        assert (moved <= 1 + ours.d_vocab // 1000).all()


def test_tiny_models(tiny_pair):
    assert_alike(*tiny_pair, PROMPT, TARGET, 1e-5)
    assert_read_alike(*tiny_pair, PROMPT, TARGET, top_k=4)


def test_added_hook_points_are_in_the_same_places(tiny_pair):
    """Both classes show a hook the same VJP under the same name."""
    model, bridge = tiny_pair
    tlb.add_hook_points(model)
    for site in tlb.weight_sites(bridge, layers=1):
        seen = []
        for m in (model, bridge):
            hook = (site.hook_out, lambda g, hook, seen=seen: seen.append(g[0].flatten(1).clone()))
            with m.hooks(bwd_hooks=[hook]):
                tlb.run_with_backward_cache(m, PROMPT, TARGET, weights="W_E")
        ours, theirs = seen
        assert (ours - theirs.reshape(ours.shape)).norm() <= 1e-5 * theirs.norm(), site.name


def test_smollm2():
    from tl_backward.demo_model import demo_model_path

    folder = demo_model_path()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, bridge = pair(hf, AutoTokenizer.from_pretrained(folder))
    prompt, target = "Lionel Messi plays for", " Paris"
    assert_alike(model, bridge, prompt, target, 2e-5)
    assert_read_alike(model, bridge, prompt, target, layers=[0, 12, 24, 29])
