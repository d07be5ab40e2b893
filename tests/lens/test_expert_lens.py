"""The lens on mixtures of experts: one cell for each layer and token, and single experts."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make
from helpers.mixtures import TARGET, TARGETS, TEXTS, TOKENS, mixtral_routes
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE


@pytest.fixture(scope="module")
def mixtral(tokenizer):
    return make("mixtral", tokenizer)


@pytest.fixture(scope="module")
def lens(mixtral):
    return tlb.BackwardLogitLens(mixtral)


@pytest.fixture(scope="module")
def result(lens):
    return lens(TOKENS[0], TARGET, weights=("W_in", "W_gate", "W_out"), top_k=3)


@pytest.fixture(scope="module")
def seen(mixtral):
    """Input and output of each layer's experts, and autograd's gradient at the output."""
    inputs, outputs = {}, {}

    def note(where, tensor, hook):
        where[hook.name] = tensor.requires_grad_()
        if where is outputs:
            tensor.retain_grad()

    points = [f"blocks.{layer}.mlp" for layer in (0, 1)]
    hooks = [
        hook
        for point in points
        for hook in (
            (f"{point}.hook_in", lambda t, hook: note(inputs, t, hook)),
            (f"{point}.hook_out", lambda t, hook: note(outputs, t, hook)),
        )
    ]
    with mixtral.hooks(fwd_hooks=hooks):
        (-mixtral(TOKENS)[0, -1].log_softmax(-1)[TARGET]).backward()
    mixtral.original_model.zero_grad()
    return [
        (inputs[f"{point}.hook_in"][0].detach(), outputs[f"{point}.hook_out"].grad[0])
        for point in points
    ]


def test_one_cell_for_each_layer_and_token(result, seen):
    for kind in ("W_in", "W_gate", "W_out"):
        assert result[kind].labels == [f"blocks.{layer}.mlp.experts.{kind}" for layer in (0, 1)]
        assert result[kind].layers == [0, 1]
    for layer, (x, delta) in enumerate(seen):
        torch.testing.assert_close(result["W_in"].norms[layer], x.norm(dim=-1))
        torch.testing.assert_close(result["W_out"].norms[layer], delta.norm(dim=-1))


def test_the_cell_reads_the_vectors_that_experts_share(mixtral, lens, result, seen):
    for layer, (x, delta) in enumerate(seen):
        for kind, vectors in {"W_in": x, "W_out": delta}.items():
            read = lens.read(vectors.unsqueeze(0), targets=TARGET, top_k=3)
            assert torch.equal(read.top_ids[0], result[kind].top_ids[layer])
            assert torch.equal(read.target_ranks[0], result[kind].target_ranks[layer])


def test_experts_and_their_weights_are_data(mixtral, result, seen):
    for layer, (x, delta) in enumerate(seen):
        routed = result.experts[f"blocks.{layer}.mlp.experts"]
        experts, weights = mixtral_routes(mixtral.blocks[layer], x)
        assert torch.equal(routed.experts, experts)
        near = {"check_dtype": False, "rtol": 1e-6, "atol": 1e-12}  # weights are made in float32
        torch.testing.assert_close(routed.weights, weights.detach(), **near)
        norms = delta.norm(dim=-1) * weights.detach().norm(dim=-1)
        torch.testing.assert_close(result["W_out"].vjp_norms[layer], norms, **near)


def test_norms_are_those_of_all_experts_together(mixtral, result):
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    for kind in ("W_in", "W_gate"):
        for layer in (0, 1):
            total = sum(cache[kind, layer, e].vjps.square().sum() for e in range(4))
            torch.testing.assert_close(result[kind].vjp_norms[layer].square().sum(), total)


def test_one_expert_alone(mixtral, lens, seen):
    alone = lens(TOKENS[0], TARGET, weights=("W_in", "W_out"), expert=2)
    _, cache = tlb.run_with_backward_cache(mixtral, TOKENS, TARGET)
    for layer, (x, delta) in enumerate(seen):
        experts, weights = mixtral_routes(mixtral.blocks[layer], x)
        of_expert = (weights * (experts == 2)).sum(-1).detach()
        torch.testing.assert_close(
            alone["W_out"].norms[layer], delta.norm(dim=-1) * of_expert, rtol=1e-6, atol=1e-12
        )
        torch.testing.assert_close(alone["W_in"].norms[layer], x.norm(dim=-1) * (of_expert > 0))
        rows = cache["W_in", layer, 2].vjps.norm(dim=-1)
        torch.testing.assert_close(alone["W_in"].vjp_norms[layer][of_expert > 0], rows)
    assert alone["W_out"].labels == [f"blocks.{layer}.mlp.experts.2.W_out" for layer in (0, 1)]
    empty, whole = sorted(range(4), key=lambda e: len(cache["W_out", 0, e].vjps))[::3]
    read = lens.singular_vectors(cache, "W_out", 0, expert=whole, top_k=1)
    top = lens.read(cache["W_out", 0, whole].svd().Vh[:1], top_k=1)
    assert torch.equal(read.top_ids, top.top_ids)
    if not len(cache["W_out", 0, empty].vjps):
        with pytest.raises(ValueError, match="no token is routed"):
            lens.singular_vectors(cache, "W_out", 0, expert=empty)
    with pytest.raises(ValueError, match="expert=None: layer 1 has 0 weights"):
        lens.singular_vectors(cache, "W_out", 1)


def test_batches_and_caches(mixtral, lens, tmp_path):
    kinds = ("W_in", "W_out")
    whole = lens(TEXTS, TARGETS, weights=kinds, top_k=2, padding_side="right")
    _, cache = tlb.run_with_backward_cache(mixtral, TEXTS, TARGETS, padding_side="right")
    loaded = tlb.BackwardCache.load(cache.save(tmp_path / "cache.safetensors"))
    from_file = lens(cache=loaded, weights=kinds, top_k=2)
    for b, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        one = lens(text, target, weights=kinds, top_k=2)
        of_batch = whole.example(b)
        for kind in kinds:
            torch.testing.assert_close(of_batch[kind].vjp_norms, one[kind].vjp_norms)
            torch.testing.assert_close(from_file.example(b)[kind].top_ids, one[kind].top_ids)
        for name, routed in one.experts.items():
            assert torch.equal(of_batch.experts[name].experts, routed.experts)
    behind = whole.experts["blocks.0.mlp.experts"].experts[2, 1:]
    assert (behind == -1).all()


def test_dense_and_sparse_layers_are_read_whole(tokenizer):
    lens = tlb.BackwardLogitLens(make("deepseek_v3", tokenizer))
    result = lens(TOKENS[0], TARGET, top_k=2)
    assert result["W_out"].labels == ["blocks.0.mlp.W_out", "blocks.1.mlp.experts.W_out"]
    assert result.left_out == {} and list(result.experts) == ["blocks.1.mlp.experts"]
    single = lens(TOKENS[0], TARGET, weights="W_out", expert=1)
    assert single["W_out"].layers == [1]


def test_experts_beside_a_dense_mlp_have_a_row_of_their_own(tokenizer, tmp_path):
    lens = tlb.BackwardLogitLens(make("gemma4_text_moe", tokenizer))
    result = lens(TOKENS[0], TARGET, weights="W_out", top_k=2)
    page = result.to_html(tmp_path / "page.html").read_text()
    for header in ("0 mlp", "0 mlp.experts", "1 mlp", "1 mlp.experts"):
        assert f'<th scope="row">{header}</th>' in page


def test_routers_are_read_by_their_input(lens, result):
    routers = lens(TOKENS[0], TARGET, weights="W_router", top_k=3)
    assert torch.equal(routers["W_router"].top_ids, result["W_in"].top_ids)
    assert routers.experts == {}


def test_post_norms_are_behind_all_experts(tokenizer):
    """The VJP at the output of the norm is the gradient of the residual stream's next sum."""
    model = make("afmoe", tokenizer)
    lens = tlb.BackwardLogitLens(model)
    caught = {}

    def keep(tensor, hook):
        tensor.retain_grad()
        caught[0] = tensor

    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", keep)]):
        (-model(TOKENS)[0, -1].log_softmax(-1)[TARGET]).backward()
    model.original_model.zero_grad()
    result = lens(TOKENS[0], TARGET, weights="W_out", layers=1)
    torch.testing.assert_close(result["W_out"].norms[0], caught[0].grad[0].norm(dim=-1))


def test_cards_name_the_experts(result, tmp_path):
    routed = result.experts["blocks.1.mlp.experts"]
    pairs = sorted(
        zip(routed.weights[-1].tolist(), routed.experts[-1].tolist(), strict=True), reverse=True
    )
    expected = "experts " + ", ".join(f"{expert} ({weight:.2g})" for weight, expert in pairs)
    assert expected in result.to_html(tmp_path / "page.html").read_text()
    hover = str(result.plot("table", "W_out").data[0].customdata)
    assert expected in hover


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert": 4}, "expert=4: W_out has experts 0 to 3 in these layers"),
        ({"expert": True}, "expert=True"),
        ({"expert": 0, "weights": "W_O"}, "expert=0: W_O has no experts"),
    ],
)
def test_an_expert_that_does_not_exist(lens, arguments, message):
    with pytest.raises(ValueError, match=message):
        lens(TOKENS[0], TARGET, **{"weights": "W_out"} | arguments)


def test_experiments_refuse_experts_by_name(mixtral):
    from tl_backward.analysis.over_records import run_facts

    fact = {
        "requested_rewrite": {
            "prompt": "{} plays for",
            "subject": "Lionel Messi",
            "target_new": {"str": "Paris"},
            "target_true": {"str": "Rome"},
        }
    }
    with pytest.raises(
        NotImplementedError, match=r"blocks\.0\.mlp\.experts\.0\.W_out has rows only"
    ):
        run_facts(mixtral, [fact], weights="W_out")
