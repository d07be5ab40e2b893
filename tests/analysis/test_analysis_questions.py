"""The open questions' experiments, against dense gradients, torch's optimisers and plain loops."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.facts import RECORDS, Reference, at, lens_logits, rank_of
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward import analysis, translators
from tl_backward.analysis import fact_of, optimizers
from tl_backward.analysis.ablation import CONDITIONS
from tl_backward.analysis.attention import ATTENTION

pytestmark = NEEDS_BRIDGE
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tokenizer_with_bos):
    model = request.getfixturevalue("boot")(request.param, tokenizer=tokenizer_with_bos)
    model(torch.tensor([[1, 2]]))
    return model


@pytest.fixture(scope="module")
def references(model):
    return [Reference(model, record) for record in RECORDS]


# ----- attention -----


def head_gradients(model, record):
    """Dense gradients of every attention head ``[d_model, d_head]``, by autograd on the weights."""
    fact = fact_of(record)
    target = model.to_tokens(fact.target, prepend_bos=False)[0, 0]
    sites = tlb.weight_sites(model, ATTENTION)
    loss = -model(fact.prompt)[0, -1].log_softmax(-1)[target]
    parameters = list({id(site.parameter): site.parameter for site in sites}.values())
    found = torch.autograd.grad(loss, parameters)
    gradients = {id(p): g for p, g in zip(parameters, found, strict=True)}
    for site in sites:
        # where in its parameter each entry of the matrix is
        numbers = torch.arange(1.0, site.d_in * site.d_out + 1).reshape(site.d_in, site.d_out)
        places = site.to_parameter_layout(numbers).flatten()
        entries = places.nonzero().squeeze(1)
        order = places[entries].argsort()
        whole = gradients[id(site.parameter)].flatten()[entries][order].view(site.d_in, site.d_out)
        if site.kind == "W_O":
            whole = whole.T
        for head, part in enumerate(whole.split(model.cfg.d_head, dim=1)):
            yield site, head, part, whole


def test_heads_are_slices_of_the_dense_gradient(model):
    frame = analysis.attention_heads(model, RECORDS, progress=False)
    n_rows = 0
    for b, record in enumerate(RECORDS):
        answer = int(model(fact_of(record).prompt)[0, -1].argmax())
        for site, head, part, whole in head_gradients(model, record):
            (row,) = at(frame, record=b, weight=site.kind, layer=site.layer, head=head).to_dict(
                "records"
            )
            n_rows += 1
            U, S, _ = torch.linalg.svd(part)
            assert row["energy"] == pytest.approx(
                float(part.square().sum() / whole.square().sum()), abs=TOLERANCE
            )
            assert row["leading_energy"] == pytest.approx(
                float(S[0] ** 2 / S.square().sum()), abs=TOLERANCE
            )
            assert row["n_tokens"] == len(model.to_tokens(fact_of(record).prompt)[0])
            ranks = [int((rtol * S[0] < S).sum()) for rtol in (1e-8, 1e-13)]
            assert min(ranks) <= row["rank"] <= max(ranks)
            ends = [rank_of(lens_logits(model, sign * U[:, 0]), answer) for sign in (1, -1)]
            if S[1] < 0.9 * S[0]:
                assert row["answer_rank"] in ends
    assert n_rows == len(frame)
    assert frame.query("weight == 'W_O' and layer == 2")["rank"].eq(1).all()


def test_the_leading_vector_has_the_sign_of_its_largest_token(model):
    """In the last layer only the last token has a VJP at W_O: it is the leading vector."""
    frame = analysis.attention_heads(model, RECORDS, weights="W_O", layers=-1, progress=False)
    assert frame["segment"].eq("last").all()
    for b, record in enumerate(RECORDS):
        target = int(model.to_tokens(fact_of(record).target, prepend_bos=False)[0, 0])
        _, cache = tlb.run_with_backward_cache(
            model, fact_of(record).prompt, target, weights="W_O", layers=-1
        )
        vjp = cache["W_O", 2].vjps[-1]
        want = rank_of(lens_logits(model, vjp / vjp.norm()), target)
        assert at(frame, record=b)["target_rank"].eq(want).all()


def test_attention_has_no_other_matrices(model):
    with pytest.raises(ValueError, match=r"must be from W_Q, W_K, W_V, W_O, got \['W_in'\]"):
        analysis.attention_heads(model, RECORDS, weights="W_in")


# ----- facts -----


def test_facts_are_compared_by_their_dense_gradients(model, references):
    records = [
        {**record, "requested_rewrite": {**record["requested_rewrite"], **relation}}
        for record, relation in zip(
            RECORDS, [{"relation_id": "P1"}, {}, {"relation_id": "P1"}], strict=True
        )
    ]
    frame = analysis.fact_similarity(model, records, batch_size=2, progress=False)
    assert len(frame) == 3 * 2 * 3
    cosine = torch.nn.functional.cosine_similarity
    for (a, one), (b, other) in combinations(enumerate(references), 2):
        for name, site in one.sites.items():
            (row,) = at(
                frame, record=a, other_record=b, weight=site.kind, layer=site.layer
            ).to_dict("records")
            assert row["same_relation"] == ((a, b) == (0, 2))
            assert row["same_target"] == (one.target == other.target)
            for column, of in (
                ("cosine", lambda r, name=name: r.dense[name].flatten()),
                ("input_cosine", lambda r, name=name: r.x[name][-1]),
                ("vjp_cosine", lambda r, name=name: r.vjps[name][-1]),
            ):
                want = float(cosine(of(one), of(other), dim=0))
                assert row[column] == pytest.approx(want, abs=TOLERANCE), (name, column)


def test_one_fact_cannot_be_compared(model):
    with pytest.raises(ValueError, match="records must hold at least two"):
        analysis.fact_similarity(model, RECORDS[:1])


# ----- optimisers -----


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_updates_are_those_of_torchs_optimisers_on_the_weights(model, optimizer):
    """The steps are made on the model's own weights here, by hooks there."""
    layers, step_norm = (0, 2), 0.01
    frame = analysis.optimizer_updates(
        model,
        RECORDS[:1],
        optimizers=[optimizer],
        layers=layers,
        n_steps=3,
        step_norm=step_norm,
        n_neurons=2,
        top_k=9,
        progress=False,
    )
    fact = fact_of(RECORDS[0])
    target = int(model.to_tokens(fact.target, prepend_bos=False)[0, 0])
    sites = tlb.weight_sites(model, "W_out", layers)
    before = [site.parameter.detach().clone() for site in sites]
    moments = [{"m": 0, "v": 0} for _ in sites]
    try:
        for step in (1, 2, 3):
            loss = -model(fact.prompt)[0, -1].log_softmax(-1)[target]
            gradients = torch.autograd.grad(loss, [site.parameter for site in sites])
            for site, start, g, state in zip(sites, before, gradients, moments, strict=True):
                update = direction(optimizer, g, state, step)
                (row,) = at(frame, step=step, layer=site.layer).to_dict("records")
                assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
                matrix = update if update.shape == (site.d_in, site.d_out) else update.T
                raw = g if g.shape == (site.d_in, site.d_out) else g.T
                check(row, model, raw, matrix)
                site.parameter.data += step_norm * start.norm() * update / update.norm()
    finally:
        for site, start in zip(sites, before, strict=True):
            site.parameter.data.copy_(start)


def direction(optimizer, g, state, step):
    """The formulae of the optimisers, written out."""
    if optimizer == "sgd":
        return -g
    if optimizer == "sign":
        return -g.sign()
    if optimizer == "momentum":
        state["m"] = 0.9 * state["m"] + g
        return -state["m"]
    state["m"] = 0.9 * state["m"] + 0.1 * g
    state["v"] = 0.999 * state["v"] + 0.001 * g**2
    return -(state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.999**step)).sqrt() + 1e-8)


def check(row, model, raw, update):
    S = torch.linalg.svdvals(update)
    assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)
    kept = 0
    while S[:kept].square().sum() < 0.9 * S.square().sum():
        kept += 1
    assert row["rank_90"] == kept
    assert row["rank"] == torch.linalg.matrix_rank(update)
    cosine = -(raw * update).sum() / raw.norm() / update.norm()
    assert row["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    shares = {"top": [], "bottom": []}
    for j in raw.norm(dim=1).topk(2).indices:
        one, other = (lens_logits(model, v) for v in (raw[j], -update[j]))
        for end, descending in (("top", True), ("bottom", False)):
            sets = [set(x.argsort(descending=descending)[:9].tolist()) for x in (one, other)]
            shares[end].append(len(sets[0] & sets[1]) / 9)
    for end, of_neurons in shares.items():
        assert row[f"{end}_overlap"] == pytest.approx(sum(of_neurons) / 2)


def test_bad_arguments_of_the_optimisers(model):
    with pytest.raises(ValueError, match=r"must be from sgd, momentum, adam, sign, got \['lion'\]"):
        analysis.optimizer_updates(model, RECORDS, optimizers=["lion"])
    with pytest.raises(ValueError, match="n_steps must be at least 1, got 0"):
        analysis.optimizer_updates(model, RECORDS, n_steps=0)
    assert set(optimizers.OPTIMIZERS) == {"sgd", "momentum", "adam", "sign"}


# ----- ablations -----


def test_an_ablated_mlp_has_no_part_in_either_pass(model):
    """By hand: the output set to zero, or cut off from the graph."""
    frame = analysis.ablation(model, RECORDS[:1], ablated=(1, 2), weights="W_out", progress=False)
    assert list(dict.fromkeys(frame["condition"])) == list(CONDITIONS)
    fact = fact_of(RECORDS[0])
    target = int(model.to_tokens(fact.target, prepend_bos=False)[0, 0])
    tokens = model.to_tokens(fact.prompt)
    changes = {
        "none": [],
        "mlp": [(f"blocks.{i}.hook_mlp_out", zero) for i in (1, 2)],
        "attention": [(f"blocks.{i}.hook_attn_out", zero) for i in (1, 2)],
        "mlp vjp": [(f"blocks.{i}.hook_mlp_out", detached) for i in (1, 2)],
        "attention vjp": [(f"blocks.{i}.hook_attn_out", detached) for i in (1, 2)],
    }
    for condition, hooks in changes.items():
        added = torch.zeros(1, tokens.shape[1], model.cfg.d_model, dtype=model.cfg.dtype)
        added.requires_grad_()
        hooks = [*hooks, ("blocks.0.hook_mlp_out", lambda y, hook, added=added: y + added)]
        with model.hooks(fwd_hooks=hooks):
            loss = -model(tokens)[0, -1].log_softmax(-1)[target]
        (vjps,) = torch.autograd.grad(loss, added)
        rows = at(frame, condition=condition, layer=0)
        for vjp, (_, row) in zip(vjps[0], rows.iterrows(), strict=True):
            assert row["norm"] == pytest.approx(float(vjp.norm()), rel=1e-4), condition
            if vjp.norm():
                assert row["target_rank"] == rank_of(lens_logits(model, vjp), target), condition
            else:
                assert row["target_rank"] != row["target_rank"], condition
    for condition, same in (("mlp vjp", True), ("mlp", False), ("attention", False)):
        norms = at(frame, condition=condition, layer=2)["norm"].to_numpy()
        unchanged = at(frame, condition="none", layer=2)["norm"].to_numpy()
        assert (norms == pytest.approx(unchanged)) == same


def zero(tensor, hook):
    return torch.zeros_like(tensor)


def detached(tensor, hook):
    return tensor.detach()


def test_other_conditions_are_refused(model):
    with pytest.raises(ValueError, match=r"conditions must be from none, mlp, .*, got \['norm'\]"):
        analysis.ablation(model, RECORDS, conditions=["norm"])


# ----- translators -----


def test_each_translator_has_the_ranks_that_it_gives(model, tmp_path):
    both = {"identity": translators.identity, "flipped": lambda v, layer: v.flip(-1)}
    frame = analysis.translator_ranks(model, RECORDS, both, progress=False, path=tmp_path)
    for name, lens in both.items():
        rows = frame[frame["translator"] == name].drop(columns="translator").reset_index(drop=True)
        alone = analysis.target_rank(model, RECORDS, lens=lens, progress=False)
        assert rows.equals(alone)
        assert (tmp_path / name).is_dir()


def test_without_translators_one_is_fitted_on_the_records_that_are_not_read(model):
    jacobians = {0: torch.eye(model.cfg.d_model), 1: torch.eye(model.cfg.d_model).flip(0)}
    frame = analysis.translator_ranks(
        model, RECORDS, jacobian_lens=SimpleNamespace(jacobians=jacobians), progress=False
    )
    expected = analysis.translator_ranks(
        model,
        RECORDS[1::2],
        {
            "identity": translators.identity,
            "unit-normalised": translators.unit_normalised,
            "linear": analysis.fit_linear_translator(model, RECORDS[::2]),
            "jacobian": translators.through_jacobian_lens(SimpleNamespace(jacobians=jacobians)),
        },
        progress=False,
    )
    pd.testing.assert_frame_equal(frame, expected)


def test_the_fitted_translator_is_a_ridge_regression(model):
    fitted = analysis.fit_linear_translator(model, RECORDS, ridge=0.3, batch_size=2)
    caches = [
        tlb.run_with_backward_cache(
            model,
            fact_of(record).prompt,
            int(model.to_tokens(fact_of(record).target, prepend_bos=False)[0, 0]),
            weights="W_out",
        )[1]
        for record in RECORDS
    ]
    unit = torch.nn.functional.normalize
    A, B = (
        unit(torch.stack([cache["W_out", layer].vjps[-1] for cache in caches]), dim=-1)
        for layer in (1, 2)
    )
    weight = 0.3 * A.square().sum() / A.shape[1]
    stacked = torch.cat([A, weight.sqrt() * torch.eye(28)])  # ridge as ordinary least squares
    M = torch.linalg.lstsq(stacked, torch.cat([B, torch.zeros(28, 28)])).solution
    vector = torch.randn(3, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        fitted(vector, 1), unit(vector, dim=-1) @ M.double(), rtol=1e-5, atol=1e-6
    )
    assert fitted(vector, None) is vector
    with pytest.raises(ValueError, match="one record to fit on"):
        analysis.fit_linear_translator(model, [])


# ----- figures -----


@pytest.fixture(scope="module")
def gpt2(request):
    return request.getfixturevalue("boot")("gpt2")


def test_the_figures_show_what_the_tables_say(gpt2):
    frame = analysis.attention_heads(gpt2, RECORDS, weights="W_O", progress=False)
    z = analysis.plot_attention_heads(frame).data[0].z
    assert z.shape == (3, gpt2.cfg.n_heads)
    assert z[1, 2] == pytest.approx(at(frame, weight="W_O", layer=1, head=2)["energy"].mean())

    frame = analysis.fact_similarity(gpt2, RECORDS, progress=False)
    (line, _) = analysis.plot_fact_similarity(frame).data
    assert line.y[0] == pytest.approx(at(frame, weight="W_in", layer=0)["cosine"].mean())

    frame = analysis.optimizer_updates(
        gpt2, RECORDS[:2], layers=(0, 1), n_steps=2, n_neurons=1, top_k=9, progress=False
    )
    figure = analysis.plot_optimizer_updates(frame)
    adam = next(line for line in figure.data if line.name == "adam")
    first = at(frame, optimizer="adam", step=1, layer=0)["stable_rank"].median()
    assert adam.y[0] == pytest.approx(first)
    assert len(figure.data) == 4 * 2

    frame = analysis.ablation(gpt2, RECORDS, conditions=["none", "mlp vjp"], progress=False)
    assert len(analysis.plot_ablation(frame).data) == 2 * 2

    frame = analysis.translator_ranks(
        gpt2, RECORDS, {"identity": translators.identity}, progress=False
    )
    (line,) = analysis.plot_translator_ranks(frame).data
    assert line.y[1] == at(frame, layer=1, segment="last")["target_rank"].median()
