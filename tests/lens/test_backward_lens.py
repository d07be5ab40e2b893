"""Against the ``BackwardLens`` that TransformerLens 3.9 to 4.2 had, where it works."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE

peer = pytest.importorskip(
    "transformer_lens.tools.analysis.backward_lens",
    reason="only TransformerLens 3.9 to 4.2 has a BackwardLens",
)


@pytest.fixture(params=["gpt2", "gpt_neox"])
def model(request, boot, tokenizer):
    kind = request.param
    model = boot(kind, torch.float32) if kind == "gpt2" else make(kind, tokenizer, torch.float32)
    try:
        peer.BackwardLens(model)
    except (NotImplementedError, TypeError, ValueError) as error:
        pytest.skip(f"this TransformerLens's BackwardLens does not take {kind}: {error}")
    return model


@pytest.mark.parametrize("normalized", [False, True])
def test_rankings_norms_and_target_ranks(model, normalized):
    layers = list(range(model.cfg.n_layers))
    theirs = peer.BackwardLens(model).analyze(
        PROMPT, TARGET, layers, normalized=normalized, top_k=4
    )
    ours = tlb.BackwardLogitLens(model)(
        PROMPT, TARGET, top_k=4, normalize=normalized, return_type="logits"
    )
    assert float(ours.loss) == pytest.approx(theirs.loss, rel=1e-6)
    for layer in layers:
        of_layer = theirs.layer(layer)
        for kind, matrix in (
            ("W_in", of_layer.input_projection),
            ("W_out", of_layer.output_projection),
        ):
            readout = ours[kind]
            assert torch.equal(readout.zero_mask[layer], matrix.zero_norm_mask)
            torch.testing.assert_close(
                readout.norms[layer], matrix.factor_norms, rtol=1e-5, atol=1e-7
            )
            seen = ~readout.zero_mask[layer]
            for end, ids, values in (
                ("top", readout.top_ids, readout.top_values),
                ("bottom", readout.bottom_ids, readout.bottom_values),
            ):
                ranking = getattr(matrix, end)(k=4, normalized=normalized)
                assert torch.equal(ids[layer][seen], ranking.indices[seen])
                torch.testing.assert_close(
                    values[layer][seen], ranking.values[seen], rtol=1e-5, atol=1e-5
                )
            prefix = "normalized_" if normalized else ""
            ranks = getattr(matrix, f"{prefix}target_largest_ranks")
            assert torch.equal(readout.target_ranks[layer][seen], ranks[seen])
