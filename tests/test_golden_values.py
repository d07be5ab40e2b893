"""The numbers of the paper's own demo, on GPT-2 small, which has to be downloaded."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

NORMS = [0.1152, 0.1888, 0.2457, 0.2588, 0.2834, 0.2969]
NORMS += [0.3333, 0.3002, 0.2762, 0.2441, 0.2107, 0.1932]
RANKS = [49593, 50250, 50243, 50255, 50255, 50255, 50256, 50256, 50256, 50255, 50255, 50255]

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(
        "TL_BACKWARD_NETWORK" not in os.environ,
        reason="downloads GPT-2 small from the hub; set TL_BACKWARD_NETWORK=1 to run it",
    ),
    NEEDS_BRIDGE,
]


@pytest.fixture(scope="module")
def result():
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers("gpt2").eval()
    lens = tlb.BackwardLogitLens(model)
    return lens("Obama grew up in", " Paris", weights="W_out", prepend_bos=False)


def test_loss(result):
    assert float(result.loss) == pytest.approx(7.4214, abs=1e-4)


def test_norms_at_the_last_token(result):
    norms = result["W_out"].norms
    torch.testing.assert_close(norms[:, -1], torch.tensor(NORMS), rtol=0, atol=1e-4)
    assert (norms[11, :-1] == 0).all()


def test_ranks_of_the_target_at_the_last_token(result):
    ranks = result["W_out"].target_ranks[:, -1]
    assert (ranks - torch.tensor(RANKS)).abs().max() <= 1
