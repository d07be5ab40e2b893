"""The paper's experiments on tiny models, against dense gradients and plain loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.facts import RECORDS, Reference, at, lens_logits, rank_of, record
from helpers.hooked import LIKE, build
from helpers.state import state
from helpers.versions import CLASSES, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward import analysis

pytestmark = NEEDS_BRIDGE

QUIET = {"progress": False, "batch_size": 2}
TOLERANCE = 1e-5  # transformers computes the softmax of Llama in float32 in any dtype


@pytest.fixture(
    params=[f"{cls}-{kind}" for cls in CLASSES for kind in ("llama", "gpt2")],
    scope="module",
)
def model(request, tokenizer_with_bos):
    cls, kind = request.param.split("-")
    if cls == "bridge":
        return request.getfixturevalue("boot")(kind, tokenizer=tokenizer_with_bos)
    model = build(**LIKE[kind], n_layers=3, n_ctx=32, d_vocab=len(tokenizer_with_bos))
    model.set_tokenizer(tokenizer_with_bos)
    tlb.add_hook_points(model)
    return model


@pytest.fixture(scope="module")
def references(model):
    return [Reference(model, record) for record in RECORDS]


def each(frame, references, model, kinds=("W_in", "W_out")):
    """Every record, kind and layer with its rows, and the reference's name of the site."""
    seen = 0
    for b, reference in enumerate(references):
        for name, site in reference.sites.items():
            if site.kind in kinds:
                rows = at(frame, record=b, weight=site.kind, layer=site.layer)
                seen += len(rows)
                yield reference, name, site, rows
    assert seen == len(frame)


def column(rows, name):
    return torch.tensor(rows[name].tolist(), dtype=torch.float64)


def assert_close(got, want, tolerance=TOLERANCE):
    torch.testing.assert_close(got, want.to(got), rtol=tolerance, atol=tolerance)


def test_gradient_rank_is_that_of_the_dense_gradient(model, references):
    frame = analysis.gradient_rank(model, RECORDS, **QUIET)
    for reference, name, site, rows in each(frame, references, model):
        (row,) = rows.to_dict("records")
        values = torch.linalg.svdvals(reference.dense[name])
        assert row["rank"] == torch.linalg.matrix_rank(reference.dense[name]), name
        assert row["n_tokens"] == reference.n
        assert row["vjp_rank"] == (1 if site.layer == 2 else reference.n)
        assert row["input_rank"] == torch.linalg.matrix_rank(reference.x[name])
        assert row["stable_rank"] == pytest.approx(
            float(values.square().sum() / values[0] ** 2), rel=TOLERANCE
        )
    assert frame.query("layer == 2")["rank"].eq(1).all()
    assert frame.query("layer < 2")["rank"].eq(frame["n_tokens"]).any()


def test_norms_are_those_of_autograds_vjps(model, references):
    frame = analysis.vjp_norms(model, RECORDS, weights=("W_in", "W_out"), **QUIET)
    for reference, name, _, rows in each(frame, references, model):
        assert rows["position"].tolist() == list(range(reference.n))
        assert rows["segment"].tolist() == reference.segments
        assert_close(column(rows, "vjp_norm"), reference.vjps[name].norm(dim=-1))
        assert_close(column(rows, "input_norm"), reference.x[name].norm(dim=-1))


def test_attention_matrices_have_norms_too(model):
    frame = analysis.vjp_norms(model, RECORDS, **QUIET)
    assert set(frame["weight"]) == {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}


@pytest.mark.parametrize("normalize", [False, True])
def test_target_ranks_are_counted_one_by_one(model, references, normalize):
    frame = analysis.target_rank(
        model, RECORDS, weights=("W_in", "W_out"), normalize=normalize, **QUIET
    )
    assert frame["d_vocab"].eq(model.cfg.d_vocab).all()
    for reference, name, site, rows in each(frame, references, model):
        vectors = (reference.x if site.kind == "W_in" else reference.vjps)[name]
        for vector, (_, row) in zip(vectors, rows.iterrows(), strict=True):
            assert row["norm"] == pytest.approx(float(vector.norm()), rel=TOLERANCE)
            if not vector.norm():
                assert row[["target_rank", "original_rank", "answer_rank"]].isna().all()
                continue
            logits = lens_logits(model, vector / vector.norm() if normalize else vector)
            for token in ("target", "original", "answer"):
                want = rank_of(logits, getattr(reference, token))
                assert row[f"{token}_rank"] == want, (name, row["position"], token)


def test_a_translator_is_applied_before_the_rank_is_taken(model, references):
    frame = analysis.target_rank(
        model, RECORDS, layers=1, lens=lambda v, layer: v.flip(-1), **QUIET
    )
    for b, reference in enumerate(references):
        (row,) = at(frame, record=b, segment="last").to_dict("records")
        vector = reference.vjps["blocks.1.mlp.W_out"][-1].flip(-1)
        assert row["target_rank"] == rank_of(lens_logits(model, vector), reference.target)


def test_layers_are_compared_by_cosine(model, references):
    frame = analysis.layer_similarity(model, RECORDS, **QUIET)
    for b, reference in enumerate(references):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            pair = [reference.vjps[f"blocks.{layer}.mlp.W_out"] for layer in (one, other)]
            for segment in set(reference.segments):
                here = [i for i, name in enumerate(reference.segments) if name == segment]
                cosines = [
                    torch.dot(*(v[i] for v in pair)) / (pair[0][i].norm() * pair[1][i].norm())
                    for i in here
                ]
                want = torch.stack(cosines).nanmean()
                (row,) = at(frame, record=b, layer=one, other_layer=other, segment=segment).to_dict(
                    "records"
                )
                if want.isnan():
                    assert other == 2 and segment != "last" and row["cosine"] != row["cosine"]
                else:
                    assert row["cosine"] == pytest.approx(float(want), abs=TOLERANCE)


def test_layers_are_compared_at_the_residual_stream_only(model):
    with pytest.raises(ValueError, match=r"weights=\['W_in'\]: only VJPs at the residual stream"):
        analysis.layer_similarity(model, RECORDS, weights="W_in")


def test_the_output_vjp_is_what_autograd_finds_on_both_sides_of_the_norm(model, references):
    frame = analysis.output_vjp(model, RECORDS, **QUIET)
    for reference, row in zip(references, frame.to_dict("records"), strict=True):
        residual = reference.x["end"][-1:][None].requires_grad_()
        normed = model.ln_final(residual)
        logits = normed @ model.W_U + model.b_U
        probabilities = logits[0, 0].softmax(-1).detach()
        loss = -logits[0, 0].log_softmax(-1)[reference.target]
        above, below = (g[0, 0] for g in torch.autograd.grad(loss, [normed, residual]))
        delta = probabilities.clone()
        delta[reference.target] -= 1
        terms = delta[:, None] * model.W_U.T.detach()
        assert_close(terms.sum(0), above, 1e-10)
        target, answer = terms[reference.target], terms[reference.answer]
        assert reference.answer != reference.target
        minus = -model.W_U[:, reference.target].detach()
        cosine = torch.nn.functional.cosine_similarity
        want = {
            "target_probability": probabilities[reference.target],
            "target_coefficient": probabilities[reference.target] - 1,
            "answer_coefficient": probabilities.max(),
            "target_share": target @ above / above.square().sum(),
            "answer_share": answer @ above / above.square().sum(),
            "other_share": (above - target - answer) @ above / above.square().sum(),
            "target_norm_share": target.norm() / terms.norm(dim=-1).sum(),
            "output_cosine": cosine(above, minus, dim=0),
            "residual_cosine": cosine(below, minus, dim=0),
            "norm_cosine": cosine(below, above, dim=0),
            "output_norm": above.norm(),
            "residual_norm": below.norm(),
            "output_rank": rank_of(above @ model.W_U, reference.target),
            "residual_rank": rank_of(below @ model.W_U, reference.target),
        }
        assert row.keys() == {"record", "prepend_bos", *want}
        for name, value in want.items():
            assert row[name] == pytest.approx(float(value), rel=TOLERANCE, abs=TOLERANCE)


def test_where_the_answer_is_the_target_it_counts_once(model, references):
    target = references[0].target

    def lift(logits, hook):
        logits[..., target] += 100
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", lift)]):
        (row,) = analysis.output_vjp(model, RECORDS[:1], **QUIET).to_dict("records")
    assert row["target_probability"] == pytest.approx(1) and row["answer_share"] == 0
    assert row["target_share"] + row["other_share"] == pytest.approx(1)


def test_gradient_neurons_are_rows_and_columns_of_the_dense_gradient(model, references):
    frame = analysis.gradient_neurons(model, RECORDS, n_neurons=2, top_k=9, **QUIET)
    for reference, name, site, rows in each(frame, references, model):
        by_input = site.kind == "W_in"
        dense = reference.dense[name] if by_input else reference.dense[name].T
        vectors, coefficients = reference.x[name], reference.vjps[name]
        if not by_input:
            vectors, coefficients = coefficients, vectors
        largest = dense.norm(dim=0).topk(2).indices.tolist()
        assert list(dict.fromkeys(rows["neuron"])) == largest
        for _, row in rows.iterrows():
            neuron, i = dense[:, row["neuron"]], row["position"]
            assert row["neuron_norm"] == pytest.approx(float(neuron.norm()), rel=1e-4)
            assert row["coefficient"] == pytest.approx(
                float(coefficients[i, row["neuron"]]), rel=1e-4, abs=TOLERANCE
            )
            if not vectors[i].norm():
                assert row[["cosine", "top_overlap", "opposite_overlap"]].isna().all()
                continue
            cosine = torch.dot(neuron, vectors[i]) / (neuron.norm() * vectors[i].norm())
            assert row["cosine"] == pytest.approx(float(cosine), abs=1e-4)
            ends = [
                [set(logits.argsort(descending=down)[:9].tolist()) for down in (True, False)]
                for logits in (lens_logits(model, neuron), lens_logits(model, vectors[i]))
            ]
            (top, bottom), (vector_top, vector_bottom) = ends
            assert row["top_overlap"] == len(top & vector_top) / 9
            assert row["bottom_overlap"] == len(bottom & vector_bottom) / 9
            assert row["opposite_overlap"] == len(top & vector_bottom) / 9


def test_more_neurons_than_there_are_is_refused(model):
    with pytest.raises(ValueError, match=r"n_neurons must be in \[1, (44|22)\] for blocks.0"):
        analysis.gradient_neurons(model, RECORDS, n_neurons=45)


def test_the_energy_along_the_shift_is_that_of_dense_matrices(model, references):
    frame = analysis.shift_energy(model, RECORDS, **QUIET)
    for reference, name, _, rows in each(frame, references, model, ["W_out"]):
        dense = reference.dense[name]
        target = model.W_U[:, reference.target].detach()
        for _, row in rows.iterrows():
            i = row["position"]
            x, delta = reference.x[name][i], reference.vjps[name][i]
            if not delta.norm():
                assert row[["term_energy", "along_term", "along_target"]].isna().all()
                continue
            term, shift = torch.outer(x, delta), torch.outer(x, target)
            want = {
                "term_energy": term.norm() ** 2 / dense.norm() ** 2,
                "along_term": ((dense * term).sum() / (dense.norm() * term.norm())) ** 2,
                "along_target": ((dense * shift).sum() / (dense.norm() * shift.norm())) ** 2,
                "target_cosine": -torch.dot(delta, target) / (delta.norm() * target.norm()),
            }
            for key, value in want.items():
                assert row[key] == pytest.approx(float(value), rel=1e-4, abs=TOLERANCE), key
    assert frame.query("layer == 2")["along_term"].dropna().to_numpy() == pytest.approx(1)


def test_a_step_does_to_the_output_what_the_dense_gradient_does(model, references):
    """Eq 17 and 18 are the token's own part of it."""
    frame = analysis.step_effect(model, RECORDS, **QUIET)
    for reference, name, site, rows in each(frame, references, model):
        for _, row in rows.iterrows():
            i = row["position"]
            x, delta = reference.x[name][i], reference.vjps[name][i]
            by_neuron = torch.outer(x, delta)  # the token's own term of the gradient
            change, own = x @ reference.dense[name], x @ by_neuron
            assert row["change"] == pytest.approx(float(change.norm()), rel=1e-4, abs=TOLERANCE)
            assert row["own_change"] == pytest.approx(float(own.norm()), rel=1e-4, abs=TOLERANCE)
            if not own.norm():
                assert row[["cosine"]].isna().all()
                continue
            cosine = torch.dot(own, change) / (own.norm() * change.norm())
            assert row["cosine"] == pytest.approx(float(cosine), abs=1e-4)
            # what each neuron has in the change: its pre-activation's, or its contribution's
            contributions = (x[:, None] * by_neuron).norm(dim=-1)
            shares = own.square() if site.kind == "W_in" else contributions
            neurons = shares.sum() ** 2 / shares.square().sum()
            assert row["neurons"] == pytest.approx(float(neurons), rel=1e-4)


# ----- all of them -----

EXPERIMENTS = [
    analysis.gradient_rank,
    analysis.vjp_norms,
    analysis.target_rank,
    analysis.layer_similarity,
    analysis.output_vjp,
    analysis.shift_energy,
    analysis.step_effect,
]


@pytest.fixture(scope="module")
def gpt2(request, tokenizer_with_bos):
    model = request.getfixturevalue("boot")("gpt2", tokenizer=tokenizer_with_bos)
    model(torch.tensor([[1, 2]]))  # adds hooks to its norms
    return model


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda f: f.__name__)
def test_a_record_gives_the_same_in_any_batch(gpt2, experiment, tmp_path, monkeypatch):

    before = state(gpt2)
    whole = experiment(gpt2, RECORDS, batch_size=3, progress=False, path=tmp_path)
    assert whole["record"].is_monotonic_increasing
    for b, one in enumerate(RECORDS):
        alone = experiment(gpt2, [one], progress=False).drop(columns="record")
        rows = whole[whole["record"] == b].drop(columns="record").reset_index(drop=True)
        for name in alone:
            if alone[name].dtype.kind == "f":
                assert rows[name].astype(float).to_numpy() == pytest.approx(
                    alone[name].astype(float).to_numpy(), rel=1e-6, abs=1e-9, nan_ok=True
                )
            else:
                assert rows[name].tolist() == alone[name].tolist()
    assert state(gpt2) == before
    monkeypatch.setattr("tl_backward.analysis.over_records.run_facts", None)  # is not called
    assert experiment(gpt2, RECORDS, progress=False, path=tmp_path).equals(whole)


def test_the_prompt_has_a_bos_token_if_it_is_asked_for(gpt2):
    with_bos = analysis.vjp_norms(gpt2, RECORDS, prepend_bos=True, progress=False)
    without = analysis.vjp_norms(gpt2, RECORDS, prepend_bos=False, progress=False)
    assert with_bos["segment"].eq("bos").equals(with_bos["position"].eq(0))
    assert not without["segment"].eq("bos").any()
    assert len(with_bos) == len(without) + 3 * 3 * 6  # records, layers, weights


def test_no_records_and_malformed_ones_are_named(gpt2):
    with pytest.raises(ValueError, match="records is empty"):
        analysis.gradient_rank(gpt2, [])
    with pytest.raises(ValueError, match=r"requested_rewrite\.subject"):
        analysis.gradient_rank(gpt2, [*RECORDS, record("{} is in", "")])


def test_every_experiment_is_documented_and_has_its_figure():
    assert all(getattr(analysis, name).__doc__ for name in analysis.__all__ if name.islower())
    for name, experiment in analysis.EXPERIMENTS.items():
        assert experiment.run is getattr(analysis, name)
        assert experiment.plot is getattr(analysis, f"plot_{name}")
    figures = {name.removeprefix("plot_") for name in analysis.__all__ if name.startswith("plot_")}
    assert figures == set(analysis.EXPERIMENTS)


# ----- figures -----


def test_lines_show_the_mean_of_each_record_first(gpt2):
    frame = analysis.vjp_norms(gpt2, RECORDS, weights="W_out", progress=False)
    figure = analysis.plot_vjp_norms(frame)
    relation = next(line for line in figure.data if line.name == "relation")
    by_record = [
        at(frame, record=b, layer=1, segment="relation")["vjp_norm"].mean() for b in range(3)
    ]
    assert relation.y[1] == pytest.approx(sum(by_record) / 3)
    spread = at(analysis.segment_means(frame, "vjp_norm"), layer=1, segment="relation")
    assert spread["std"].item() == pytest.approx(torch.tensor(by_record).std().item())
    assert spread["records"].item() == 3


def test_the_rank_figure_shows_the_share_of_prompts(gpt2):
    frame = analysis.gradient_rank(gpt2, RECORDS, progress=False)
    figure = analysis.plot_gradient_rank(frame)
    assert {line.name for line in figure.data} == {"W_in", "W_out"}
    for line in figure.data:
        for layer, percent in zip(line.x, line.y, strict=True):
            rows = at(frame, weight=line.name, layer=layer)
            assert percent == pytest.approx(100 * (rows["rank"] == rows["n_tokens"]).mean())


def test_the_similarity_figure_is_symmetric(gpt2):
    frame = analysis.layer_similarity(gpt2, RECORDS, progress=False)
    z = torch.tensor(analysis.plot_layer_similarity(frame).data[0].z)
    assert z.shape == (3, 3) and torch.equal(z, z.T) and torch.equal(z.diag(), torch.ones(3).to(z))
    assert z[0, 2] == pytest.approx(
        at(frame, layer=0, other_layer=2, segment="last")["cosine"].mean()
    )


@pytest.mark.parametrize(
    ("experiment", "plot", "panels"),
    [
        (analysis.target_rank, analysis.plot_target_rank, {"W_out"}),
        (analysis.shift_energy, analysis.plot_shift_energy, {"W_out"}),
        (analysis.step_effect, analysis.plot_step_effect, {"W_in", "W_out"}),
        (
            partial(analysis.gradient_neurons, top_k=9),
            analysis.plot_gradient_neurons,
            {"W_in", "W_out"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_there_is_a_panel_for_each_weight(gpt2, experiment, plot, panels):
    figure = plot(experiment(gpt2, RECORDS, progress=False))
    assert {note.text for note in figure.layout.annotations} == {f"weight={w}" for w in panels}
    assert {line.name for line in figure.data} <= set(analysis.SEGMENTS)


def test_the_figure_of_lemma_5_1_has_both_places(gpt2):
    frame = analysis.output_vjp(gpt2, RECORDS, progress=False)
    above, below = analysis.plot_output_vjp(frame).data
    assert above.y.tolist() == frame["output_cosine"].tolist()
    assert below.y.tolist() == frame["residual_cosine"].tolist()
