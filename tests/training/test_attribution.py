"""Which examples wrote an edit: factored scores against dense inner products."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import added, factors, random_edit
from helpers.texts import PROMPT, TARGET
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import WeightEdit
from tl_backward.training import attribute

TEXTS = [PROMPT, "The Eiffel Tower is located in Rome", "Paris and Rome", PROMPT + TARGET]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


@pytest.fixture
def edit(model):
    return WeightEdit(model, {site.name: factors(site, n=3) for site in tlb.weight_sites(model)})


@pytest.mark.parametrize("lengths", [[6, 6], [6, 3, 5], [4]])
def test_the_alignment_is_minus_the_dense_inner_product(model, edit, lengths):
    prompts = [torch.arange(1, n + 1) for n in lengths]
    _, cache = tlb.run_with_backward_cache(model, prompts, 7)
    got = edit.alignment(cache)
    assert got.shape == (len(lengths),)
    for b, prompt in enumerate(prompts):
        _, alone = tlb.run_with_backward_cache(model, prompt, 7)
        expected = -sum(
            (g.dense() * alone[name].dense()).sum() for name, (_, g) in edit.at_sites().items()
        )
        assert float(got[b]) == pytest.approx(float(expected), rel=1e-10, abs=1e-12)
        assert edit.alignment(alone).shape == ()
        torch.testing.assert_close(edit.alignment(alone), expected, rtol=1e-10, atol=1e-12)


def test_the_alignment_is_what_a_small_edit_takes_off_the_loss(model):
    """By finite differences, for tied weights, too."""
    edit = WeightEdit(model, {site.name: factors(site) for site in tlb.weight_sites(model)})
    prompts = [torch.tensor([3, 7, 2, 9]), torch.tensor([5, 1])]
    _, cache = tlb.run_with_backward_cache(model, prompts, 4)
    step = 1e-3  # norms and rotary embeddings compute in float32
    with (step * edit).applied():
        ahead, _ = tlb.run_with_backward_cache(model, prompts, 4, weights="W_out")
    with (-step * edit).applied():
        behind, _ = tlb.run_with_backward_cache(model, prompts, 4, weights="W_out")
    torch.testing.assert_close(
        edit.alignment(cache), (behind - ahead) / (2 * step), rtol=1e-3, atol=1e-3
    )


@NEEDS_BRIDGE
def test_tied_weights_count_in_all_their_uses(make_family):
    model = make_family("llama_tied")
    edit = random_edit(model, "embed.W_E")
    _, cache = tlb.run_with_backward_cache(model, [torch.tensor([3, 7, 2])], 4)
    dense = added(edit, "embed.W_E")
    G = cache["embed.W_E"].dense() + cache["unembed.W_U"].dense().mT
    torch.testing.assert_close(
        edit.alignment(cache), -(dense * G).sum().reshape(1), rtol=1e-10, atol=1e-12
    )


def test_caches_that_do_not_fit_are_named(model, edit):
    _, cache = tlb.run_with_backward_cache(model, torch.tensor([3, 7, 2]), 4, weights="W_out")
    with pytest.raises(ValueError, match=r"cache lacks embed\.W_E, which the edit changes"):
        edit.alignment(cache)
    with pytest.raises(ValueError, match="bound to no model"):
        WeightEdit(None, edit.factors).alignment(cache)


@NEEDS_BRIDGE
@pytest.mark.parametrize("records", ["texts", "mappings"])
def test_a_data_set_is_ranked(boot, records, tmp_path):
    model = boot("llama")
    sites = tlb.weight_sites(model, ("W_out", "W_Q"), (0, 2))
    edit = WeightEdit(None, {site.name: factors(site) for site in sites})
    dataset = TEXTS if records == "texts" else [{"line": text, "id": 3} for text in TEXTS]
    table = attribute(edit, model, dataset, text="line", batch_size=3, path=tmp_path / "scores")
    assert table.score.is_monotonic_decreasing and sorted(table.record) == [0, 1, 2, 3]
    bound = edit.bind(model)
    for row in table.itertuples():
        loss, cache = tlb.run_with_backward_cache(
            model, TEXTS[row.record], loss_fn=tlb.lm_cross_entropy_loss
        )
        assert row.loss == pytest.approx(float(loss))
        assert row.score == pytest.approx(float(bound.alignment(cache)), rel=1e-9)
    again = attribute(edit, model, dataset, text="line", path=tmp_path / "scores")
    assert again.equals(table)
    with pytest.raises(ValueError, match="other"):
        attribute(2 * edit, model, dataset, text="line", path=tmp_path / "scores")


@NEEDS_BRIDGE
def test_the_example_that_a_step_was_taken_on_comes_first(boot):
    """Closed form: of a step down one gradient its own example gains most, for equal norms."""
    model = boot("llama")
    _, cache = tlb.run_with_backward_cache(
        model, TEXTS[2], loss_fn=tlb.lm_cross_entropy_loss, weights="W_out"
    )
    step = WeightEdit(model, {name: -0.1 * g for name, g in cache.items()})
    table = attribute(step, model, TEXTS, progress=False)
    norm = sum(float(g.norm()) ** 2 for g in cache.values())
    own = table[table.record == 2]
    assert own.score.tolist() == pytest.approx([0.1 * norm])
    assert table.record[0] == 2


@NEEDS_BRIDGE
def test_examples_without_a_text_are_named(boot):
    model = boot("llama")
    edit = random_edit(model, "blocks.1.mlp.W_out")
    with pytest.raises(TypeError, match=r"must be a text, or have one under 'text' \(text=\), got"):
        attribute(edit, model, [{"line": PROMPT}])
    with pytest.raises(TypeError, match="got 3"):
        attribute(edit, model, [3])
    with pytest.raises(ValueError, match="at least two tokens"):
        attribute(edit, model, [" Paris"], prepend_bos=False)
