"""Edits in the vocabulary, against dense decompositions of what they add."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.edits import added, factors, random_edit
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import unembed

BY_INPUT = ("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U")


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


@pytest.fixture
def edit(model):
    """Of rank 3 at every weight of a layer, at the embedding and at the unembedding."""
    sites = [site for site in tlb.weight_sites(model) if site.layer in (1, None)]
    return WeightEdit(model, {site.name: factors(site, n=3) for site in sites})


def test_directions_are_those_of_the_dense_update(model, edit):
    read = tlb.BackwardLogitLens(model).edit(edit, k=2, top_k=4)
    assert [one.site for one in read.directions] == [name for name in edit.factors for _ in "12"]
    for i, one in enumerate(read.directions):
        dense = added(edit, one.site)
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        n, by_input = one.number, one.site.rpartition(".")[2] in BY_INPUT
        assert one.norm == read.norms[one.site] == pytest.approx(float(dense.norm()), rel=1e-10)
        assert one.singular_value == pytest.approx(float(S[n]), rel=1e-10)
        assert one.share == pytest.approx(float((S[n] / S.norm()) ** 2), rel=1e-10)
        residual, other = (U[:, n], Vh[n]) if by_input else (Vh[n], U[:, n])
        assert abs(one.vector @ residual) == pytest.approx(1, abs=1e-9)
        assert one.feature_index == int(other.abs().argmax())
        logits = unembed(model, one.vector.unsqueeze(0))[0]
        assert read.readout.top_ids[i].tolist() == logits.topk(4).indices.tolist()
        assert read.readout.bottom_ids[i].tolist() == (-logits).topk(4).indices.tolist()


def test_the_top_goes_with_inputs_in_which_the_feature_is_positive(model, edit):
    """Applied to the input that the readout names, the update moves what it says, that way."""
    for one in tlb.BackwardLogitLens(model).edit(edit, k=3).directions:
        U, S, Vh = torch.linalg.svd(added(edit, one.site), full_matrices=False)
        of_direction = S[one.number] * torch.outer(U[:, one.number], Vh[one.number])
        assert one.feature_value > 0
        if one.site.rpartition(".")[2] in BY_INPUT:
            assert (one.vector @ of_direction)[one.feature_index] > 0
        else:
            moved = of_direction[one.feature_index]
            expected = one.singular_value * one.feature_value * one.vector
            torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)


def test_the_data_frame_has_both_ends(model, edit):
    read = tlb.BackwardLogitLens(model).edit(edit, k=2, top_k=3, bottom_k=2, return_type="logits")
    rows = read.to_dataframe()
    assert len(rows) == len(edit.factors) * 2 * (3 + 2)
    assert set(zip(rows.end, rows.input, strict=True)) == {("top", "+"), ("bottom", "-")}
    one = rows[(rows.site == "blocks.1.mlp.W_out") & (rows.direction == 1) & (rows.end == "top")]
    assert one.k.tolist() == [0, 1, 2] and (one.layer == 1).all() and (one.weight == "W_out").all()
    i = [d.site for d in read.directions].index("blocks.1.mlp.W_out") + 1
    assert one.token_id.tolist() == read.readout.top_ids[i].tolist()
    assert one.logit.tolist() == pytest.approx(read.readout.top_values[i].tolist())
    assert one.feature.unique().tolist() == [f"neuron {one.feature_index.iloc[0]}"]
    of_attention = rows[rows.weight == "W_O"].iloc[0]
    head, dimension = divmod(of_attention.feature_index, model.cfg.d_head)
    assert of_attention.feature == f"head {head}, dimension {dimension}"
    assert rows[rows.weight == "W_E"].layer.isna().all()


def test_targets_have_ranks(model, edit):
    target = 5
    read = tlb.BackwardLogitLens(model).edit(edit, k=1, targets=target)
    for one, rank in zip(read.directions, read.readout.target_ranks.tolist(), strict=True):
        logits = unembed(model, one.vector.unsqueeze(0))[0]
        assert rank == int((logits > logits[target]).sum())
    assert read.to_dataframe().target_rank.unique().tolist() == list(
        dict.fromkeys(read.readout.target_ranks.tolist())
    )


def test_directions_within_rounding_of_zero_are_not_read(model):
    edit = random_edit(model, "blocks.1.mlp.W_out", n=3)
    lens, name = tlb.BackwardLogitLens(model), "blocks.1.mlp.W_out"
    before = lens.edit(edit, k=9).directions
    assert len(before) == 3
    after = lens.edit(edit - edit.direction(name, 0), k=9).directions
    assert [one.singular_value for one in after] == pytest.approx(
        [one.singular_value for one in before[1:]]
    )
    with pytest.raises(ValueError, match="it adds exactly zero"):
        lens.edit(0 * edit)


def test_an_edit_in_parts(model):
    name = "blocks.1.mlp.W_out"
    edit = random_edit(model, name, n=4)
    dense = added(edit, name)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    for k in (1, 3, 4, 50):
        expected = (U[:, :k] * S[:k]) @ Vh[:k]
        truncated = edit.truncate(k)
        assert len(truncated.factors[name].vjps) == min(k, 4) and truncated.model is model
        torch.testing.assert_close(truncated.factors[name].dense(), expected)
    torch.testing.assert_close(
        edit.direction(name, 2).factors[name].dense(), S[2] * torch.outer(U[:, 2], Vh[2])
    )
    rest = edit - edit.direction(name, 2)
    expected = dense - S[2] * torch.outer(U[:, 2], Vh[2])
    torch.testing.assert_close(rest.factors[name].dense(), expected)
    with pytest.raises(KeyError, match=r"'embed.W_E' is not in this edit; it changes blocks"):
        edit.direction("embed.W_E")
    with pytest.raises(ValueError, match=r"number must be an integer in \[0, 3\], got 4"):
        edit.direction(name, 4)
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        edit.truncate(0)
    with pytest.raises(TypeError):
        edit - 1


# summary


def test_the_summary_says_where_the_norm_sits(model):
    """Singular values that are known: orthogonal rows of known lengths."""
    sites = {site.name: site for site in tlb.weight_sites(model, layers=1)}
    lengths = {"blocks.1.mlp.W_out": [3.0, 3.0], "blocks.1.mlp.W_in": [4.0, 0.0, 2.0]}
    edit = WeightEdit(
        model,
        {
            name: GradientFactors(
                torch.eye(len(values), sites[name].d_in).double() * torch.tensor(values)[:, None],
                torch.eye(len(values), sites[name].d_out).double(),
            )
            for name, values in lengths.items()
        },
    )
    sites_of, tokens = edit.summary()
    assert sites_of.site.tolist() == ["blocks.1.mlp.W_in", "blocks.1.mlp.W_out"]
    assert sites_of.norm.tolist() == pytest.approx([math.sqrt(20), math.sqrt(18)])
    assert sites_of.energy_share.tolist() == pytest.approx([20 / 38, 18 / 38])
    assert sites_of["rank"].tolist() == [2, 2]
    spread = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert sites_of.effective_rank.tolist() == pytest.approx([spread, 2])
    read = tlb.BackwardLogitLens(model).edit(edit, top_k=5).to_dataframe()
    assert (
        sites_of.top[1]
        == read.query("weight == 'W_out' and direction == 0 and end == 'top'").token.tolist()
    )
    energy = {0: {"W_in": 16, "W_out": 9}, 1: {"W_in": 4, "W_out": 9}}
    side = {"W_in": "reads", "W_out": "writes"}
    for row in tokens.itertuples():
        where = read[(read.token_id == row.token_id) & (read.weight.map(side) == row.side)]
        where = where.drop_duplicates(["site", "direction"])
        assert row.n_directions == len(where)
        expected = sum(energy[d][w] for d, w in zip(where.direction, where.weight, strict=True))
        assert row.energy_share == pytest.approx(expected / 38)
    assert tokens.n_directions.is_monotonic_decreasing
    assert len(tokens) == len(read.assign(side=read.weight.map(side)).groupby(["side", "token_id"]))


# figures and pages


def test_the_figure_shows_layers_and_weights(models, tmp_path):
    model = models(MODELS[0])
    sites = [site for site in tlb.weight_sites(model) if site.kind in ("W_in", "W_out", "W_E")]
    edit = WeightEdit(model, {site.name: factors(site, seed=i) for i, site in enumerate(sites)})
    read = tlb.BackwardLogitLens(model).edit(edit)
    (heatmap,) = read.plot().data
    last = model.cfg.n_layers - 1
    assert list(heatmap.y) == [*(str(n) for n in range(last, -1, -1)), "embed"]
    assert list(heatmap.x) == ["W_E", "W_in", "W_out"]
    column = list(heatmap.x).index("W_out")
    norms = [read.norms[f"blocks.{n}.mlp.W_out"] for n in range(last, -1, -1)]
    largest = max(read.norms.values())
    assert [row[column] for row in heatmap.z[:-1]] == pytest.approx(
        [(norm / largest) ** (1 / 3) for norm in norms]
    )
    assert heatmap.z[-1][column] is None
    path = read.to_html(tmp_path / "edit.html")
    page = path.read_text(encoding="utf-8")
    assert "What the edit adds" in page and "Plotly.newPlot" in page
    with pytest.raises(ValueError, match="a figure needs top_k and bottom_k of at least 1"):
        tlb.BackwardLogitLens(model).edit(edit, vocab=[1, 2]).plot()


# what is refused


def test_what_cannot_be_read_is_named(models, unchecked):
    model = models(MODELS[0])
    lens = tlb.BackwardLogitLens(model)
    edit = random_edit(model, "blocks.1.mlp.W_out")
    for k in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="k must be a positive integer"):
            lens.edit(edit, k=k)
    with pytest.raises(ValueError, match="edit: it is empty"):
        lens.edit(WeightEdit(model, {}))
    other = WeightEdit(
        None, {"blocks.1.mlp.W_out": GradientFactors(torch.ones(1, 7), torch.ones(1, 3))}
    )
    with pytest.raises(ValueError, match=r"of another model: its blocks.1.mlp.W_out is \[7, 3\]"):
        lens.edit(other)
    far = WeightEdit(None, {"blocks.99.mlp.W_out": edit.factors["blocks.1.mlp.W_out"]})
    with pytest.raises(ValueError, match="the model of the lens has no such weight"):
        lens.edit(far)
    with pytest.raises(ValueError, match=r"what it adds to blocks\.1\.mlp\.W_out is not finite"):
        g = edit.factors["blocks.1.mlp.W_out"]
        lens.edit(WeightEdit(model, {"blocks.1.mlp.W_out": GradientFactors(g.inputs / 0, g.vjps)}))


@NEEDS_BRIDGE
def test_matrices_of_adapters_beside_the_stream_are_read(tokenizer):
    from helpers.adapters import adapted

    bridge, _ = adapted(tokenizer, target_modules=["down_proj"])
    lens = tlb.BackwardLogitLens(bridge)
    read = lens.edit(random_edit(bridge, "blocks.1.mlp.W_out.lora_B"))
    assert read.directions[0].vector.shape == (28,)
    with pytest.raises(ValueError, match="neither reads nor writes the residual stream"):
        lens.edit(random_edit(bridge, "blocks.1.mlp.W_out.lora_A"))
