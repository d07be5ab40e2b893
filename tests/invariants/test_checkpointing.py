"""Gradient checkpointing: the backward pass repeats parts of the forward pass, hooks included."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers.versions import MODELS
from torch.utils.checkpoint import checkpoint
from transformers import Cache

import tl_backward as tlb
from tl_backward.sites import attached_hook_points

TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5
PATCHED = {
    "fwd_hooks": [("blocks.1.mlp.out.hook_in", lambda tensor, hook: 1.5 * tensor)],
    "bwd_hooks": [("blocks.1.attn.o.hook_out", lambda vjp, hook: 2 * vjp)],
}
SELECTED = {"weights": ["W_out"], "layers": [1]}


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def repeated(forward, how, *args, **kwargs):
    """Without the cache of keys and values, as in transformers: it would have them twice."""
    args = [None if isinstance(value, Cache) else value for value in args]
    kwargs = {n: None if isinstance(value, Cache) else value for n, value in kwargs.items()}
    return checkpoint(partial(forward, **kwargs), *args, **how)


@contextmanager
def checkpointed(model, **how):
    """The model with every block checkpointed, as transformers does it in training mode."""
    blocks = [getattr(block, "original_component", block) for block in model.blocks]
    for block in blocks:
        vars(block)["forward"] = partial(repeated, block.forward, how)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


@pytest.mark.parametrize("options", [{}, SELECTED, PATCHED, {**SELECTED, **PATCHED}])
def test_the_factors_are_the_same(model, options):
    _, want = tlb.run_with_backward_cache(model, TOKENS, TARGET, **options)
    with checkpointed(model, use_reentrant=False):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, **options)
    assert cache.keys() == want.keys()
    for name, g in want.items():
        assert torch.equal(cache[name].inputs, g.inputs), name
        assert torch.equal(cache[name].vjps, g.vjps), name


def test_hooks_that_are_on_the_model_run_in_the_repetition_too(model):
    """A patch inside of a block: its backward pass needs the patched activation."""
    patch = ("blocks.1.mlp.in.hook_out", lambda tensor, hook: tensor.square())
    with attached_hook_points(model), model.hooks(fwd_hooks=[patch]):
        _, want = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        with checkpointed(model, use_reentrant=False):
            _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
            _, own = tlb.run_with_backward_cache(model, TOKENS, TARGET, weights="W_O")
    for name, g in want.items():
        assert torch.equal(cache[name].vjps, g.vjps), name
    assert torch.equal(own["W_O", 0].vjps, want["W_O", 0].vjps)


def test_hooks_of_the_capture_run_in_the_repetition_too(model):
    patch = ("blocks.1.mlp.in.hook_out", lambda tensor, hook: tensor.square())
    _, want = tlb.run_with_backward_cache(model, TOKENS, TARGET, fwd_hooks=[patch])
    with checkpointed(model, use_reentrant=False):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, fwd_hooks=[patch])
    for name, g in want.items():
        assert torch.equal(cache[name].vjps, g.vjps), name


def test_the_reentrant_kind_is_refused_by_name(models):
    model = models(MODELS[-1] if "hooked" in MODELS[-1] else "bridge-gpt2")
    with (
        checkpointed(model, use_reentrant=True),
        pytest.raises(NotImplementedError, match=r"blocks\.0\.\S+ under torch.no_grad\(\).*reentr"),
    ):
        tlb.run_with_backward_cache(model, TOKENS, TARGET)
