"""Texts against a loop over whole forward passes, with KV caches that work and that do not."""

from __future__ import annotations

import gc
import warnings
import weakref
from importlib.metadata import version

import pytest
import torch
from helpers.generation import greedy, lose_the_cache
from helpers.hooked import GATED, GQA, ROTARY, build
from helpers.versions import MODELS, NEEDS_BRIDGE

from tl_backward.evaluation import generate_tokens

PROMPTS = torch.tensor([[5, 7, 3, 11], [5, 2, 3, 6]])
N_NEW = 5  # the smallest context here is 9

TL2 = pytest.mark.filterwarnings("ignore:generation with the KV cache gives other logits")
"""TransformerLens 2 takes all tokens for padding where the pad token is 0."""


@pytest.fixture(params=MODELS)
def fresh(request, tokenizer):
    """A model that no other test has generated with."""
    if request.param.startswith("bridge"):
        made = request.getfixturevalue("boot")(request.param.split("-")[1])
        if request.param.endswith("compatibility"):
            made.enable_compatibility_mode(disable_warnings=True)
        return made

    llama = {**GATED, **GQA, **ROTARY, "normalization_type": "RMS"}
    made = build(d_vocab=len(tokenizer), **(llama if request.param.endswith("llama") else {}))
    made.set_tokenizer(tokenizer)
    return made


@TL2
def test_greedy_tokens_are_those_of_whole_passes(fresh):
    want = greedy(fresh, PROMPTS, N_NEW)
    random_state = torch.get_rng_state()
    assert generate_tokens(fresh, PROMPTS, N_NEW).tolist() == want
    assert generate_tokens(fresh, PROMPTS[:1, :1], 1).tolist() == greedy(fresh, PROMPTS[:1, :1], 1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not fresh.unembed._forward_hooks


def test_a_lost_cache_is_noticed_once_and_not_used(fresh):
    want = greedy(fresh, PROMPTS, N_NEW)
    lose_the_cache(fresh)
    with pytest.warns(UserWarning, match="texts are generated without it") as caught:
        assert generate_tokens(fresh, PROMPTS, N_NEW).tolist() == want
    assert f"transformers {version('transformers')}" in str(caught[0].message)
    assert f"transformer-lens {version('transformer-lens')}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = generate_tokens(fresh, PROMPTS.flip(1), N_NEW)
    assert again.tolist() == greedy(fresh, PROMPTS.flip(1), N_NEW)


@NEEDS_BRIDGE
def test_the_same_tokens_are_drawn_with_the_cache_and_without(boot, kind):
    with_cache, without = boot(kind), boot(kind)
    lose_the_cache(without)
    with pytest.warns(UserWarning, match="texts are generated without it"):
        generate_tokens(without, PROMPTS, 1)
    drawn = []
    for model in (with_cache, without):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            drawn.append(generate_tokens(model, PROMPTS, 20, top_k=5))
    assert drawn[0].tolist() == drawn[1].tolist() != greedy(with_cache, PROMPTS, 20)
    logits = with_cache(drawn[0])[:, PROMPTS.shape[1] - 1 : -1]
    ranks = (logits > logits.gather(-1, drawn[0][:, PROMPTS.shape[1] :, None])).sum(-1)
    assert int(ranks.max()) <= 4


@NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["bamba", "olmo_hybrid"])
def test_families_whose_cache_does_not_work_here(make_family, family):
    """TransformerLens misreads the cache of one, and does not find the class of the other's."""
    model = make_family(family)
    with pytest.warns(UserWarning, match="generation with the KV cache (gives other|fails with)"):
        tokens = generate_tokens(model, PROMPTS, N_NEW)
    assert tokens.tolist() == greedy(model, PROMPTS, N_NEW)


@NEEDS_BRIDGE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("error:generation with the KV cache")
def test_rounding_is_no_reason_to_give_up_the_cache(boot, kind, dtype):
    generate_tokens(boot(kind, dtype), PROMPTS, N_NEW)


@TL2
def test_training_mode_is_kept_where_it_changes_nothing(fresh):
    fresh.train()
    modes = {name: module.training for name, module in fresh.named_modules()}
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in fresh.modules()):
        with pytest.raises(ValueError, match="training mode"):
            generate_tokens(fresh, PROMPTS, N_NEW)
    else:
        assert generate_tokens(fresh, PROMPTS, N_NEW).tolist() == greedy(fresh, PROMPTS, N_NEW)
    assert {name: module.training for name, module in fresh.named_modules()} == modes


@NEEDS_BRIDGE
def test_a_model_is_not_kept_alive(boot):
    model = boot("llama")
    generate_tokens(model, PROMPTS, 1)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (PROMPTS, {"n_new": 0}, "n_new must be at least 1, got 0"),
        (PROMPTS, {"n_new": 2, "top_k": -1}, "top_k must be at least 1, got -1"),
        (PROMPTS[:, :0], {"n_new": 2}, "tokens is empty"),
        (PROMPTS[:0], {"n_new": 2}, "tokens is empty"),
        (PROMPTS, {"n_new": 10**30}, "has room for"),
    ],
)
def test_what_cannot_be_generated_is_named(fresh, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate_tokens(fresh, tokens, **options)
