"""Only the positions whose logits the loss reads are unembedded, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers.products import Products
from helpers.versions import MODELS

import tl_backward as tlb

PROMPTS = [[3, 17, 3, 29, 8, 9], [4, 7, 2], [11, 5, 6, 13, 21]]
LOSSES = {
    "target": (lambda d_vocab: {"target": 5}, 1),
    "several tokens": (lambda d_vocab: {"target": [[5], [8, 2], [1, 9, 4, 6]]}, 4),
    "logit_diff": (lambda d_vocab: {"loss_fn": tlb.logit_diff(5, 7)}, 1),
    "kl_divergence": (
        lambda d_vocab: {"loss_fn": tlb.kl_divergence([torch.arange(d_vocab) / 50.0] * 3)},
        1,
    ),
}
CLOSE = {"rtol": 1e-11, "atol": 1e-14}


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def rows_of_logits(products: Products, d_vocab: int) -> set[int]:
    return {shape[0] for shape in products.shapes if shape[-1] == d_vocab}


@pytest.mark.parametrize(("loss", "n_last"), LOSSES.values(), ids=LOSSES.keys())
def test_all_is_as_where_a_hook_needs_every_logit(model, loss, n_last):
    seen = []
    see = [("unembed.hook_out", lambda logits, hook: seen.append(logits.shape[:2].numel()))]
    arguments = {"padding_side": "right", **loss(model.cfg.d_vocab)}
    want_loss, want = tlb.run_with_backward_cache(model, PROMPTS, fwd_hooks=see, **arguments)
    with Products() as products:
        got_loss, got = tlb.run_with_backward_cache(model, PROMPTS, **arguments)
    width = max(len(text) for text in want.tokens)
    assert seen == [3 * width]
    assert rows_of_logits(products, model.cfg.d_vocab) == {3 * n_last}
    torch.testing.assert_close(got_loss, want_loss, **CLOSE)
    for name, g in want.items():
        torch.testing.assert_close(got[name].inputs, g.inputs, **CLOSE)
        torch.testing.assert_close(got[name].vjps, g.vjps, **CLOSE)
    for name, vjps in want.residual.vjps.items():
        torch.testing.assert_close(got.residual.vjps[name], vjps, **CLOSE)


def test_a_hook_of_pytorch_around_the_unembedding_sees_every_logit(model):
    seen = []
    handle = model.register_forward_hook(lambda module, args, logits: seen.append(logits.shape))
    try:
        tlb.run_with_backward_cache(model, PROMPTS[0], 5)
    finally:
        handle.remove()
    assert [shape[-2] for shape in seen] == [len(PROMPTS[0])]


def test_a_function_gets_every_logit(model):
    seen = []

    def loss_fn(logits, tokens):
        seen.append(tuple(logits.shape[:2]))
        return logits[:, -1, 5]

    tlb.run_with_backward_cache(model, PROMPTS[0], loss_fn=loss_fn)
    assert seen == [(1, len(PROMPTS[0]))]
