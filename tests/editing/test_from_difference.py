"""What a fine-tune wrote, against dense differences and their singular value decompositions."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from helpers.edits import TOKENS, logits, same_bits, weights
from helpers.state import state
from helpers.versions import MODELS, NEEDS_BRIDGE
from torch import nn

import tl_backward as tlb
from tl_backward.editing import WeightEdit, _difference
from tl_backward.sites import all_parameters

ASKED_FOR = ["W_in", "W_out", "W_Q"]


@pytest.fixture(params=[name for name in MODELS if "compatibility" not in name])
def name(request):
    return request.param


@pytest.fixture
def base(models, name):
    return models(name)


@pytest.fixture
def untouched(make_model, name):
    """Another model with the weights of the base."""
    return make_model(name)


@pytest.fixture
def tuned(untouched):
    return moved(untouched)


def sites_of(model):
    return {site.name: site for site in tlb.weight_sites(model)}


def moved(tuned):
    """The model, its weights, and nothing else, moved at random."""
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    for site in tlb.weight_sites(tuned):
        if seen.isdisjoint(site.tied_to):
            n = min(site.d_in, site.d_out)
            u = torch.randn(n, site.d_in, generator=generator, dtype=torch.float64)
            v = torch.randn(n, site.d_out, generator=generator, dtype=torch.float64)
            decay = 0.5 ** torch.arange(n, dtype=torch.float64)
            with torch.no_grad():
                site.parameter.add_(site.to_parameter_layout(0.05 * (u.mT * decay) @ v))
        seen.add(site.name)
    return tuned


def difference(base, tuned, name):
    """``W_tuned - W_base`` as ``[d_in, d_out]``, made column by column by the layout."""
    site, other = sites_of(base)[name], sites_of(tuned)[name]
    ours, theirs = torch.zeros(2, site.d_in, site.d_out, dtype=torch.float64)
    site.to_parameter_layout(ours).copy_(site.parameter.detach())
    other.to_parameter_layout(theirs).copy_(other.parameter.detach())
    return theirs - ours


def test_full_rank_is_the_difference(base, tuned):
    before = state(base)
    edit = WeightEdit.from_difference(base, tuned, rank=10**6)
    assert state(base) == before
    for name, g in edit.factors.items():
        dense = difference(base, tuned, name)
        assert (g.dense() - dense).norm() <= 1e-12 * dense.norm(), name
    tied = {name for site in tlb.weight_sites(base) for name in site.tied_to}
    assert set(edit.factors) | tied == set(sites_of(base))
    with edit.applied():
        torch.testing.assert_close(logits(base), logits(tuned), rtol=1e-9, atol=1e-9)


def test_an_edit_of_rank_k_is_the_nearest_one(base, tuned):
    edit = WeightEdit.from_difference(base, tuned, ASKED_FOR, layers=1, rank=3)
    assert {name.rpartition(".")[2] for name in edit.factors} == set(ASKED_FOR)
    for of_site in edit.report.sites:
        dense = difference(base, tuned, of_site.site)
        S = torch.linalg.svdvals(dense)
        got = edit.factors[of_site.site]
        assert of_site.rank == len(got.vjps) == 3
        assert of_site.norm == pytest.approx(float(dense.norm()), rel=1e-12)
        expected = float(S[3:].square().sum() / S.square().sum())
        assert of_site.left_out == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close((got.dense() - dense).norm(), S[3:].norm())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_share_of_the_energy_takes_as_few_directions_as_can_be(base, tuned, share):
    edit = WeightEdit.from_difference(base, tuned, "W_out", rank=share)
    for of_site in edit.report.sites:
        energy = torch.linalg.svdvals(difference(base, tuned, of_site.site)).square()
        shares = (energy / energy.sum()).cumsum(0).tolist()
        assert of_site.rank == next(k for k, reached in enumerate(shares, 1) if reached >= share)
        assert of_site.left_out == pytest.approx(1 - shares[of_site.rank - 1], rel=1e-6)


@pytest.mark.parametrize("shape", [(400, 90), (90, 400)])
@pytest.mark.parametrize("rank", [4, 0.99])
def test_large_matrices_are_decomposed_at_random_and_nearly_as_well(shape, rank, monkeypatch):
    """Against the best there is, by the full decomposition."""
    generator = torch.Generator().manual_seed(2)
    Q = [
        torch.linalg.qr(torch.randn(n, 90, generator=generator, dtype=torch.float64)).Q
        for n in shape
    ]
    S = 0.6 ** torch.arange(90, dtype=torch.float64)
    D = (Q[0] * S) @ Q[1].mT / S.norm()
    monkeypatch.setattr(_difference, "_dense_svd", None)  # not called
    before = torch.get_rng_state()
    svd = _difference._leading(D, 4) if rank == 4 else _difference._share(D, rank)
    assert torch.equal(torch.get_rng_state(), before)
    again = _difference._leading(D, 4) if rank == 4 else _difference._share(D, rank)
    assert torch.equal(svd.U, again.U)
    energy = (S / S.norm()).square()
    k = len(svd.S)
    if rank != 4:
        assert energy[:k].sum() >= 0.99 - 1e-6 and energy[: k - 1].sum() < 0.99
    left_out = (D - (svd.U * svd.S) @ svd.Vh).norm() ** 2
    assert left_out <= 1.001 * energy[k:].sum()


def test_half_precision_is_compared_in_float32(make_model):
    base, tuned = (make_model(MODELS[0]).to(torch.bfloat16) for _ in range(2))
    site, other = tlb.weight_sites(base, "W_out", 1)[0], tlb.weight_sites(tuned, "W_out", 1)[0]
    with torch.no_grad():
        other.parameter[1, 2] += 0.25
    (g,) = WeightEdit.from_difference(base, tuned, rank=2).factors.values()
    expected = other.parameter.float() - site.parameter.float()
    torch.testing.assert_close(site.to_parameter_layout(g.dense()), expected)


def test_equal_models_give_an_empty_edit(base, untouched):
    edit = WeightEdit.from_difference(base, untouched)
    assert not edit.factors and not edit.report.outside
    assert all(one == (one.site, 0.0, 0, 0.0) for one in edit.report.sites)


def test_what_an_edit_cannot_hold_is_named(base, untouched):
    tuned = untouched
    held = {id(site.parameter) for site in tlb.weight_sites(tuned)}
    with torch.no_grad():
        for parameter in all_parameters(tuned):
            if id(parameter) not in held:
                parameter.data = parameter + 0.5
    with pytest.warns(UserWarning, match=r"parameters differ that an edit cannot hold"):
        edit = WeightEdit.from_difference(base, tuned)
    assert not edit.factors
    outside = pd.DataFrame(edit.report.outside)
    rows = tlb.coverage(tuned).set_index("parameter")
    in_use = ~rows.reason.str.contains("split into W_Q").fillna(False)
    assert set(outside.parameter) == set(rows.index[rows.site.isna() & in_use])
    assert outside.norm.tolist() == pytest.approx(
        [0.5 * torch.Size(rows["shape"][name]).numel() ** 0.5 for name in outside.parameter]
    )
    assert not WeightEdit.from_difference(base, tuned, "W_out").report.outside


# models that do not fit


def test_other_shapes_are_named(models):
    from helpers.hooked import build
    from helpers.versions import HAS_HOOKED_TRANSFORMER

    if not HAS_HOOKED_TRANSFORMER:
        pytest.skip("made of HookedTransformers")
    base = build()
    with pytest.raises(
        ValueError, match=r"embed.W_E is \[31, 14\] in base and \[33, 14\] in tuned"
    ):
        WeightEdit.from_difference(base, build(d_vocab=33))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.W_in is \[14, 22\] in base and \[14, 23\]"):
        WeightEdit.from_difference(base, build(d_mlp=23), "W_in")
    with pytest.raises(ValueError, match="base has 2 layers and tuned 3"):
        WeightEdit.from_difference(base, build(n_layers=3))
    with pytest.raises(ValueError, match=r"base has no site blocks.0.mlp.W_gate"):
        WeightEdit.from_difference(base, build(gated_mlp=True))


@NEEDS_BRIDGE
def test_other_families_and_vocabularies_are_refused(boot, make_family):
    with pytest.raises(ValueError, match=r"differ in their architecture: Llama.* and GPT2"):
        WeightEdit.from_difference(boot("llama"), boot("gpt2"))
    base, tuned = make_family("llama"), make_family("mistral")
    with pytest.raises(ValueError, match=r"differ in their architecture: Llama.* and Mistral"):
        WeightEdit.from_difference(base, tuned)


@NEEDS_BRIDGE
def test_other_tokenizers_are_refused_and_new_tokens_are_not(boot, tokenizer):
    base, tuned = boot("llama"), boot("llama")
    base.tokenizer, tuned.tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    tuned.tokenizer.add_tokens("<more>")
    WeightEdit.from_difference(base, tuned, "W_out")
    base.tokenizer.add_tokens("<other>")
    with pytest.raises(ValueError, match=r"token \d+ is '<other>' in base and '<more>' in tuned"):
        WeightEdit.from_difference(base, tuned, "W_out")


@NEEDS_BRIDGE
def test_a_weight_that_is_tied_in_base_alone_is_refused(make_family):
    base, tuned = make_family("llama_tied"), make_family("llama_tied")
    lm_head = tlb.weight_sites(tuned, "W_U")[0].holder[0]
    lm_head.weight = nn.Parameter(lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"embed.W_E and unembed.W_U share a weight in base"):
        WeightEdit.from_difference(base, tuned)
    edit = WeightEdit.from_difference(tuned, base, rank=100)  # the other way round there is one
    assert list(edit.factors) == ["unembed.W_U"]


@NEEDS_BRIDGE
def test_weights_that_were_processed_alike_are_compared(models, make_model):
    base, tuned = (make("bridge-gpt2-compatibility") for make in (models, make_model))
    site, other = (tlb.weight_sites(model, "W_in", 1)[0] for model in (base, tuned))
    with torch.no_grad():
        other.parameter[1, 2] += 0.25
    (g,) = WeightEdit.from_difference(base, tuned, rank=1).factors.values()
    torch.testing.assert_close(
        site.to_parameter_layout(g.dense()), other.parameter - site.parameter
    )


@NEEDS_BRIDGE
def test_processed_and_raw_weights_are_not_compared(boot):
    processed = boot("gpt2")
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="processing of the weights: raw and fold_ln"):
        WeightEdit.from_difference(boot("gpt2"), processed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_values_that_are_not_finite_are_named(models, make_model, which, value):
    pair = {"base": models(MODELS[0]), "tuned": models(MODELS[0])}
    pair[which] = make_model(MODELS[0])
    with torch.no_grad():
        tlb.weight_sites(pair[which], "W_out", 1)[0].parameter[2, 1] = value
    with pytest.raises(ValueError, match=f"blocks.1.mlp.W_out of {which} has values that are not"):
        WeightEdit.from_difference(**pair)


@NEEDS_BRIDGE
def test_quantised_weights_are_refused(boot):
    base, tuned = boot("llama"), boot("llama")
    module = tlb.weight_sites(base, "W_out", 1)[0].holder[0]
    module.weight = nn.Parameter(torch.zeros(28, 44, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        NotImplementedError, match=r"blocks.1.mlp.W_out of base is stored quantised"
    ):
        WeightEdit.from_difference(base, tuned)


@pytest.mark.parametrize("rank", [0, -1, 1.0, 0.0, 2.5, True, "8", float("nan")])
def test_a_rank_that_is_none_is_refused(models, unchecked, rank):
    model = models(MODELS[0])
    with pytest.raises(ValueError, match="rank must be a positive integer, or a share"):
        WeightEdit.from_difference(model, model, rank=rank)


def test_what_is_no_model_is_refused(models):
    with pytest.raises(TypeError, match="model must be a TransformerLens"):
        WeightEdit.from_difference(models(MODELS[0]), nn.Linear(2, 2))


def test_neither_model_is_changed(base, tuned):
    before = weights(base), weights(tuned)
    WeightEdit.from_difference(base, tuned, rank=2)
    assert same_bits(weights(base), before[0]) and same_bits(weights(tuned), before[1])
    assert logits(base, tokens=TOKENS).isfinite().all()


@NEEDS_BRIDGE
def test_experts_are_compared_and_read_one_by_one(make_family):
    base, tuned = make_family("mixtral"), make_family("mixtral")
    names = ["blocks.1.mlp.experts.2.W_out", "blocks.1.mlp.experts.3.W_out"]
    for i, name in enumerate(names, start=1):
        with torch.no_grad():
            parameter = sites_of(tuned)[name].parameter
            parameter.add_(i * torch.eye(*parameter.shape, dtype=torch.float64))
    edit = WeightEdit.from_difference(base, tuned, rank=100)
    assert list(edit.factors) == names and not edit.report.outside
    for name in names:
        dense = difference(base, tuned, name)
        assert (edit.factors[name].dense() - dense).norm() <= 1e-12 * dense.norm()
    table = tlb.BackwardLogitLens(base).edit(edit).table()
    assert table.weights == ["W_out of expert 2", "W_out of expert 3"]
    with edit.applied():
        torch.testing.assert_close(logits(base), logits(tuned), rtol=1e-6, atol=1e-6)
