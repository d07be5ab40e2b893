"""Everything the lens can read, and every way to read it, on each model class.

The reference is the model's own final norm and unembedding, sorted whole.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.versions import CLASSES, MODELS
from transformer_lens.ActivationCache import Slice

import tl_backward as tlb
from tl_backward.lens import _reading

PROMPT, TARGET = [3, 17, 3, 9, 8], 11
BATCH, TARGETS = [[3, 17, 3, 9, 8], [6, 2], [12, 1, 20, 6, 9, 4, 13]], [11, 4, 7]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


@pytest.fixture
def lens(model):
    return tlb.BackwardLogitLens(model)


def captured(model, prompt=PROMPT, target=TARGET, **arguments):
    return tlb.run_with_backward_cache(model, prompt, target, **arguments)[1]


@torch.no_grad()
def logits_of(model, vectors, apply_ln=True):
    flat = vectors.flatten(0, -2).unsqueeze(0)
    logits = model.unembed(model.ln_final(flat) if apply_ln else flat)
    return logits.reshape(*vectors.shape[:-1], -1)


def require_read(readout, logits, k=10):
    """The readout's rows are those of the logits, but for its zero rows."""
    assert readout.top_ids.shape == (*logits.shape[:-1], k)
    seen = ~readout.zero_mask
    logits = logits[seen]
    log_probs = logits.log_softmax(-1)
    values, ids = log_probs.sort(-1, descending=True)
    assert torch.equal(readout.top_ids[seen], ids[:, :k])
    assert torch.equal(readout.bottom_ids[seen], ids.flip(-1)[:, :k])
    torch.testing.assert_close(readout.top_values[seen], values[:, :k], **CLOSE)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(readout.entropy[seen], entropy, **CLOSE)


# ----- what is read -----


@pytest.mark.parametrize("weight", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"])
def test_every_weight_by_its_residual_side(model, lens, weight):
    if weight == "W_gate" and not tlb.coverage(model).site.str.endswith("W_gate").any():
        pytest.skip("this model has no gate")
    cache = captured(model, weights=weight)
    side = "vjps" if weight in ("W_O", "W_out") else "inputs"
    vectors = torch.stack([getattr(g, side) for g in cache.values()])
    readout = lens(PROMPT, TARGET, weights=weight)[weight]
    require_read(readout, logits_of(model, vectors))
    assert readout.labels == list(cache)


@pytest.mark.parametrize("incl_mid", [False, True])
def test_accumulated_vjps(model, lens, incl_mid):
    cache = captured(model)
    stack, labels = cache.accumulated_vjps(incl_mid=incl_mid, return_labels=True)
    result = lens(PROMPT, TARGET, weights=(), residual="accumulated", incl_mid=incl_mid)
    readout = result["accumulated"]
    require_read(readout, logits_of(model, stack))
    assert readout.labels == labels
    assert readout.layers[0] == 0 and readout.layers[-1] is None
    torch.testing.assert_close(readout.norms, stack.norm(dim=-1))


def test_decomposed_vjps_and_heads(model, lens):
    cache = captured(model, per_head=True)
    parts, labels = cache.decompose_vjps(return_labels=True)
    heads, head_labels = cache.stack_head_vjps(return_labels=True)
    result = lens(cache=cache, weights=(), residual="decomposed")
    require_read(result["decomposed"], logits_of(model, parts))
    assert result["decomposed"].labels == labels
    readout = lens(PROMPT, TARGET, weights=(), residual="heads")["heads"]
    require_read(readout, logits_of(model, heads))
    assert readout.labels == head_labels and readout.layers[-1] == model.cfg.n_layers - 1


@pytest.mark.parametrize("weight", ["W_V", "W_out"])
def test_singular_vectors_are_those_of_the_dense_gradient(model, lens, weight):
    cache = captured(model, weights=weight, layers=0)
    U, _, Vh = torch.linalg.svd(cache[weight, 0].dense())
    expected = (U.mT if weight == "W_V" else Vh)[:2]
    readout = lens.singular_vectors(cache, weight, 0, k=2)
    for i, vector in enumerate(expected):
        either = [logits_of(model, sign * vector[None]).argmax().item() for sign in (1, -1)]
        assert readout.top_ids[i, 0].item() in either
    (name,) = cache
    assert readout.labels == [f"{name} singular 0", f"{name} singular 1"]
    assert readout.layers == [0, 0]


@pytest.mark.parametrize(("weight", "neurons"), [("W_in", [7, 0]), ("W_out", [21, 5])])
def test_neurons_are_those_of_the_dense_gradient(model, lens, weight, neurons):
    cache = captured(model, weights=weight, layers=1)
    dense = cache[weight, 1].dense()
    vectors = dense[:, neurons].mT if weight == "W_in" else dense[neurons]
    readout = lens.neurons(cache, weight, 1, neurons)
    require_read(readout, logits_of(model, vectors))
    torch.testing.assert_close(readout.norms, vectors.norm(dim=-1))


def test_any_vectors(model, lens):
    vectors = torch.randn(2, 3, model.cfg.d_model, dtype=model.cfg.dtype)
    readout = lens.read(vectors, ["steer", "3_pre"], targets=[4, 1])
    require_read(readout, logits_of(model, vectors))
    log_probs = logits_of(model, vectors).log_softmax(-1)
    torch.testing.assert_close(readout.target_values, log_probs[..., [4, 1]], **CLOSE)
    assert readout.layers == [None, 3]
    trained = lens.read(vectors.clone().requires_grad_())
    assert not trained.norms.requires_grad and torch.equal(trained.norms, readout.norms)


def test_vectors_that_several_weights_share_are_read_once(model, monkeypatch):
    rows = []
    kernel = _reading.read_vocabulary
    monkeypatch.setattr(
        _reading,
        "read_vocabulary",
        lambda vectors, *rest, **options: (
            rows.append(len(vectors)) or kernel(vectors, *rest, **options)
        ),
    )
    result = tlb.BackwardLogitLens(model)(PROMPT, TARGET, weights=("W_Q", "W_K", "W_V"))
    assert rows == [model.cfg.n_layers * len(PROMPT)]
    assert not torch.equal(result["W_Q"].vjp_norms, result["W_V"].vjp_norms)
    assert result["W_K"].labels[0] == "blocks.0.attn.W_K"


# ----- how it is read -----


@pytest.mark.parametrize("return_type", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("apply_ln", [True, False])
def test_return_type_and_apply_ln(model, lens, return_type, apply_ln):
    vectors = torch.stack([g.inputs for g in captured(model, weights="W_in").values()])
    logits = logits_of(model, vectors, apply_ln)
    values = {"logits": logits, "log_probs": logits.log_softmax(-1), "probs": logits.softmax(-1)}
    result = lens(
        PROMPT, TARGET, weights="W_in", return_type=return_type, apply_ln=apply_ln, top_k=3
    )
    readout = result["W_in"]
    expected = values[return_type]
    torch.testing.assert_close(readout.top_values, expected.topk(3).values, **CLOSE)
    torch.testing.assert_close(readout.bottom_values, expected.sort(-1).values[..., :3], **CLOSE)
    torch.testing.assert_close(readout.target_values, expected[..., TARGET], **CLOSE)
    column = {"logits": "logit", "log_probs": "log_prob", "probs": "probability"}[return_type]
    assert column in result.to_dataframe()


def test_vocab_keeps_the_values_of_chosen_tokens(model, lens):
    vectors = torch.stack([g.inputs for g in captured(model, weights="W_in").values()])
    readout = lens(PROMPT, TARGET, weights="W_in", vocab=[9, 2, 30])["W_in"]
    expected = logits_of(model, vectors).log_softmax(-1)[..., [9, 2, 30]]
    torch.testing.assert_close(readout.vocab_values, expected, **CLOSE)
    assert readout.top_ids.shape[-1] == readout.bottom_ids.shape[-1] == 0


def test_vocab_in_the_data_frame(lens):
    result = lens(PROMPT, TARGET, vocab=[9, 2, 30])
    frame = result.to_dataframe()
    cell = frame.query("weight == 'W_out' and layer == 0 and position == 3")
    assert cell.end.tolist() == ["vocab"] * 3 and cell.k.tolist() == [0, 1, 2]
    assert cell.token_id.tolist() == [9, 2, 30] and cell.token.notna().all()
    assert cell.log_prob.tolist() == result["W_out"].vocab_values[0, 3].tolist()
    assert cell.target_rank.unique().tolist() == [result["W_out"].target_ranks[0, 3]]
    zero = frame[frame.norm == 0]
    assert len(zero) == len(PROMPT) - 1 and zero.log_prob.isna().all()


def test_bottom_k_apart_from_top_k(lens):
    readout = lens(PROMPT, TARGET, top_k=4, bottom_k=2)["W_out"]
    assert readout.top_ids.shape[-1] == 4 and readout.bottom_ids.shape[-1] == 2
    none = lens(PROMPT, TARGET, top_k=4, bottom_k=0)["W_out"]
    assert none.bottom_ids.shape[-1] == 0 and torch.equal(none.top_ids, readout.top_ids)


@pytest.mark.parametrize("normalize", [False, True])
def test_targets(model, lens, normalize):
    """One for all, several for every row, and one for each row, by counting in sorted logits."""
    cache = captured(model, weights="W_in")
    vectors = torch.stack([g.inputs for g in cache.values()])
    if normalize:
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    order = logits_of(model, vectors).argsort(-1, descending=True)

    def ranks(ids):
        return (order == ids.unsqueeze(-1)).int().argmax(-1)

    def read(targets):
        options = {"weights": "W_in", "targets": targets, "normalize": normalize}
        return lens(cache=cache, **options)

    assert torch.equal(read(7)["W_in"].target_ranks, ranks(torch.tensor(7)))
    several = read([7, 30])
    for i, token in enumerate((7, 30)):
        expected = ranks(torch.tensor(token))
        assert torch.equal(several["W_in"].target_ranks[..., i], expected)
        assert torch.equal(several.rank_trajectory(token, weight="W_in"), expected)
    with pytest.raises(ValueError, match="pass target="):
        several.rank_trajectory(weight="W_in")
    following = torch.tensor([*PROMPT[1:], TARGET])
    for one_each in (following, following[None]):
        assert torch.equal(read(one_each)["W_in"].target_ranks, ranks(following))
        assert read(one_each).target_ids.tolist() == following.tolist()
    one_each = torch.arange(len(vectors))[:, None]
    readout = lens.read(vectors, targets=one_each, normalize=normalize)
    assert torch.equal(readout.target_ranks, ranks(one_each))


def test_several_targets_in_the_data_frame(lens):
    result = lens(PROMPT, TARGET, targets=[7, 30], top_k=2)
    readout, frame = result["W_out"], result.to_dataframe()
    cell = frame.query("weight == 'W_out' and layer == 0 and position == 3")
    assert cell.end.tolist() == ["top"] * 2 + ["bottom"] * 2 + ["target"] * 2
    assert cell.target_rank[:4].isna().all()
    targets = cell[cell.end == "target"]
    assert targets.token_id.tolist() == [7, 30] and targets.k.tolist() == [0, 1]
    assert targets.token.tolist() == result.target
    assert targets.target_rank.tolist() == readout.target_ranks[0, 3].tolist()
    assert targets.log_prob.tolist() == readout.target_values[0, 3].tolist()


def test_descent_reads_vjps_from_the_other_end(lens):
    up, down = (lens(PROMPT, TARGET, direction=which) for which in ("gradient", "descent"))
    assert torch.equal(up["W_out"].bottom_ids, down["W_out"].top_ids)
    assert torch.equal(
        up["W_out"].top_values.nan_to_num(), down["W_out"].bottom_values.nan_to_num()
    )
    seen = ~up["W_out"].zero_mask
    ranks = up["W_out"].target_ranks[seen] + down["W_out"].target_ranks[seen]
    assert ranks.unique().tolist() == [up.d_vocab - 1]
    assert torch.equal(up["W_in"].top_ids, down["W_in"].top_ids)
    for bottom_k in (7, 0):
        part = lens(PROMPT, TARGET, direction="descent", top_k=3, bottom_k=bottom_k)
        for kind in part:
            assert torch.equal(part[kind].top_ids, down[kind].top_ids[..., :3])
            assert torch.equal(part[kind].bottom_ids, down[kind].bottom_ids[..., :bottom_k])


def test_a_translator_is_applied_before_the_norm(model, lens):
    layers = []

    def translator(vectors, layer):
        layers.append(layer)
        return vectors.roll(1, -1) + layer

    stack = captured(model).accumulated_vjps()[:-1]
    expected = torch.stack([vjps.roll(1, -1) + i for i, vjps in enumerate(stack)])
    cache = captured(model)
    result = lens(cache=cache, weights="W_in", residual="accumulated", lens=lambda v, layer: v)
    assert torch.equal(result["W_in"].top_ids, lens(cache=cache)["W_in"].top_ids)
    numbers = list(range(model.cfg.n_layers))
    readout = lens.read(stack, [f"{i}_pre" for i in numbers], lens=translator)
    assert layers == numbers
    require_read(readout, logits_of(model, expected))


def test_positions_and_layers_of_a_cache(lens, model):
    cache = captured(model)
    whole = lens(cache=cache)
    part = lens(cache=cache, positions=(1, 4), layers=[-1, 0], weights="W_in")
    assert torch.equal(part["W_in"].top_ids, whole["W_in"].top_ids[[0, -1], 1:4])
    assert part.positions.tolist() == [1, 2, 3]
    assert part["W_in"].layers == [0, model.cfg.n_layers - 1]
    assert part.to_dataframe().position.unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("residual", ["accumulated", "decomposed", "heads"])
def test_layers_of_the_residual_stream(lens, model, residual):
    """The same entries as without layers, of a run and of a cache."""
    labels = {
        "accumulated": ["1_pre", "1_mid", "final_post"],
        "decomposed": ["unembed", "1_attn_out", "1_mlp_out"],
        "heads": [f"L1H{h}" for h in range(model.cfg.n_heads)],
        "forward": ["1_pre", "final_post"],
    }
    options = {"residual": residual, "incl_mid": residual == "accumulated", "forward": True}
    cache = captured(model, per_head=True)
    whole = lens(cache=cache, **options)
    for part in (lens(PROMPT, TARGET, layers=1, **options), lens(cache=cache, layers=1, **options)):
        for kind in (residual, "forward"):
            assert part[kind].labels == labels[kind]
            entries = [whole[kind].labels.index(label) for label in labels[kind]]
            assert torch.equal(part[kind].top_ids, whole[kind].top_ids[entries])
        assert part["W_out"].layers == [1]


def test_layers_that_a_cache_lacks(lens, model):
    last = model.cfg.n_layers - 1
    cache = captured(model, layers=[last - 1, last])
    assert lens(cache=cache)["W_out"].layers == [last - 1, last]
    accumulated = lens(cache=cache, layers=last, residual="accumulated")["accumulated"]
    assert accumulated.labels == [f"{last}_pre", "final_post"]
    cache = captured(model, layers=last)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.W_in is not in the cache"):
        lens(cache=cache, layers=[0, last])
    for options in ({"forward": True}, {"residual": "accumulated"}, {"residual": "decomposed"}):
        with pytest.raises(ValueError, match=f"blocks.{last}.hook_resid_pre was not captured"):
            lens(cache=cache, layers=last, weights=(), **options)


# ----- several prompts -----


@pytest.mark.parametrize("options", [{}, {"residual": "accumulated"}, {"positions": -1}])
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(model, lens, options):
    batch = lens(BATCH, TARGETS, padding_side="right", **options)
    for b, (prompt, target) in enumerate(zip(BATCH, TARGETS, strict=True)):
        alone, one = lens(prompt, target, **options), batch.example(b)
        assert one.str_tokens == alone.str_tokens and one.target == alone.target
        assert torch.equal(one.positions, alone.positions)
        torch.testing.assert_close(one.loss, alone.loss, **CLOSE)
        for kind in alone:
            assert torch.equal(one[kind].zero_mask, alone[kind].zero_mask)
            torch.testing.assert_close(one[kind].norms, alone[kind].norms, **CLOSE)
            torch.testing.assert_close(
                one[kind].top_values, alone[kind].top_values, equal_nan=True, rtol=1e-4, atol=1e-4
            )
            same = (one[kind].target_ranks == alone[kind].target_ranks).double().mean()
            assert same > 0.95  # float32 inside transformers may exchange neighbours
    frame = batch.to_dataframe()
    assert frame.example.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("targets", "of_prompts"),
    [
        (5, [[5] * 5, [5] * 2, [5] * 7]),
        (None, [[t] * len(prompt) for t, prompt in zip(TARGETS, BATCH, strict=True)]),
        (torch.tensor([[4], [9], [7]]), [[4] * 5, [9] * 2, [7] * 7]),
        (torch.arange(7), [range(5), range(2), range(7)]),
        (torch.arange(21).view(3, 7), [range(5), range(7, 9), range(14, 21)]),
    ],
    ids=["for all", "for prompts by default", "for prompts", "for positions", "for rows"],
)
def test_one_target_in_each_prompt_of_a_batch(lens, targets, of_prompts):
    result = lens(BATCH, TARGETS, padding_side="right", weights="W_in", targets=targets)
    for b, expected in enumerate(of_prompts):
        one, n = result.example(b), len(BATCH[b])
        assert one.target_ids.expand(n).tolist() == list(expected)
        alone = lens(BATCH[b], TARGETS[b], weights="W_in", targets=list(expected))
        by_target = alone["W_in"].target_ranks
        assert torch.equal(one["W_in"].target_ranks, by_target[:, range(n), range(n)])
        assert len(one.plot("ranks").data) == n


def test_several_targets_that_are_as_many_as_the_prompts(lens):
    result = lens(BATCH, TARGETS, padding_side="right", targets=[4, 9, 7])
    for b, prompt in enumerate(BATCH):
        one = result.example(b)
        assert one.target_ids.tolist() == [4, 9, 7]
        expected = result.rank_trajectory(9)[:, b, : len(prompt)]
        assert torch.equal(one.rank_trajectory(9), expected)


def test_batch_slice(lens):
    whole = lens(BATCH, TARGETS, padding_side="right")
    two = lens(BATCH, TARGETS, padding_side="right", batch_slice=[2, 0])
    assert two.target == [whole.target[2], whole.target[0]]
    assert torch.equal(two["W_in"].top_ids[:, 1, :5], whole["W_in"].top_ids[:, 0, :5])
    one = lens(BATCH, TARGETS, padding_side="right", batch_slice=1)
    assert one["W_in"].top_ids.shape[1] == 2
    assert torch.equal(one["W_in"].top_ids, whole["W_in"].top_ids[:, 1, :2])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("index", [1, -1, (1, 3), [2, 0], None])
def test_slices_of_transformer_lens_and_scalars_select(lens, index):
    plain = lens(BATCH, TARGETS, padding_side="right", batch_slice=index)
    alike = [Slice(index)]
    alike += [np.int64(index), torch.tensor(index)] if isinstance(index, int) else []
    for one in alike:
        read = lens(BATCH, TARGETS, padding_side="right", batch_slice=one)
        assert repr(read) == repr(plain) and read.target == plain.target
        assert torch.equal(read["W_in"].top_ids, plain["W_in"].top_ids)
        positions = lens(PROMPT, TARGET, positions=one).positions
        assert torch.equal(positions, lens(PROMPT, TARGET, positions=index).positions)


def test_a_target_of_several_tokens(lens, model):
    result = lens(PROMPT, [11, 4, 7])
    assert len(result.str_tokens) == len(PROMPT) + 2
    assert result.target_ids.tolist() == [11] * len(PROMPT) + [4, 7]
    cache = captured(model, target=[11, 4, 7])
    torch.testing.assert_close(result["W_out"].norms[0], cache["W_out", 0].vjps.norm(dim=-1))


def test_a_loss_instead_of_a_target(lens, model):
    result = lens(PROMPT, loss_fn=tlb.logit_diff(4, 9), targets=[4, 9])
    assert result["W_out"].target_ranks.shape == (model.cfg.n_layers, 5, 2)
    assert "target" in repr(result)


# ----- bad input -----


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": [1, 2], "top_k": 3}, "pass vocab, or top_k and bottom_k, not both"),
        ({"vocab": [10**6]}, "vocab holds token ids outside the vocabulary"),
        ({"vocab": []}, "vocab must be one token or a flat list"),
        ({"vocab": torch.ones(1, 2, dtype=torch.long)}, "vocab must be one token or a flat list"),
        ({"bottom_k": 10**6}, r"bottom_k must be an integer in \[0, "),
        ({"top_k": 1.5}, r"top_k must be an integer in \[1, .* got 1.5"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"chunk_size": 1.5}, "chunk_size must be an integer"),
        ({"return_type": "odds"}, "return_type must be 'logits', 'log_probs' or 'probs'"),
        ({"direction": "ascent"}, "direction must be 'gradient' or 'descent'"),
        ({"residual": "stream"}, "residual must be 'accumulated', 'decomposed' or 'heads'"),
        ({"weights": ()}, "nothing to read"),
        ({"positions": 9}, "positions=9: this prompt has positions 0 to 4"),
        ({"layers": 7}, "layers=7"),
        ({"layers": 1.5}, "layers=1.5: this model has layers 0 to"),
        ({"targets": 10**6}, "targets holds token ids outside the vocabulary"),
        ({"targets": torch.full((5,), 10**6)}, "targets holds token ids outside the vocabulary"),
        ({"targets": torch.full((5,), -1)}, "targets holds token ids outside the vocabulary"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets of shape \[4\]"),
        ({"batch_slice": 0}, "there is only one"),
        ({"incl_mid": True}, "incl_mid=True needs residual='accumulated'"),
        ({"incl_mid": True, "forward": True}, "incl_mid=True needs residual='accumulated'"),
    ],
)
def test_bad_input_names_the_argument(lens, arguments, message):
    with pytest.raises(ValueError, match=message):
        lens(PROMPT, TARGET, **arguments)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt", PROMPT),
        ("target", TARGET),
        ("loss_fn", tlb.logit_diff(4, 9)),
        ("prepend_bos", False),
        ("padding_side", "left"),
        ("fwd_hooks", [("hook_embed", lambda x, hook: x)]),
        ("bwd_hooks", [("hook_embed", lambda x, hook: x)]),
    ],
)
def test_what_a_run_needs_is_refused_beside_a_cache(lens, model, argument, value):
    with pytest.raises(ValueError, match=rf"pass either a prompt or a cache; .* {argument}$"):
        lens(cache=captured(model), **{argument: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "ids", [torch.zeros(5), torch.zeros(5, dtype=torch.bool), 1.5, [1.5], [True]]
)
@pytest.mark.parametrize("argument", ["targets", "vocab"])
def test_tokens_that_are_no_ids(lens, argument, ids):
    with pytest.raises(TypeError, match=f"{argument} must"):
        lens(PROMPT, TARGET, **{argument: ids})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("translator", "error", "message"),
    [
        (lambda vectors, layer: vectors[..., :3], ValueError, r"returned the shape \[5, 3\] for"),
        (lambda vectors, layer: None, ValueError, "lens returned None for vectors of shape"),
        (lambda vectors, layer: vectors / 0, ValueError, "returned by lens are not finite"),
        (object(), TypeError, r"lens must be a function .*through_jacobian_lens"),
    ],
)
def test_translators_that_return_no_vectors(lens, translator, error, message):
    with pytest.raises(error, match=message):
        lens(PROMPT, TARGET, lens=translator)


@pytest.mark.usefixtures("unchecked")
def test_integers_of_numpy(lens):
    ids, one = np.array([4, 9]), np.int64(1)
    plain = lens(PROMPT, 11, layers=1, targets=[4, 9], top_k=1)
    numpy = lens(np.array(PROMPT), np.int64(11), layers=one, targets=ids, top_k=one)
    assert torch.equal(numpy["W_out"].target_ranks, plain["W_out"].target_ranks)
    assert torch.equal(numpy["W_out"].top_ids, plain["W_out"].top_ids)
    assert lens(PROMPT, 11, layers=[one], targets=ids[0])["W_out"].layers == [1]


@pytest.mark.usefixtures("unchecked")
def test_a_cache_in_the_place_of_a_prompt_and_another_kind_of_cache(model, lens):
    with pytest.raises(TypeError, match="prompt is a BackwardCache; pass it as cache="):
        lens(captured(model), TARGET)
    _, activations = model.run_with_cache(torch.tensor([PROMPT]))
    with pytest.raises(TypeError, match=r"cache must be a BackwardCache .* got ActivationCache"):
        lens(cache=activations)


@pytest.mark.usefixtures("unchecked")
def test_positions_and_prompts_that_a_cache_lacks(lens, model):
    with pytest.raises(ValueError, match="positions=9: this prompt has positions 0 to 4"):
        lens(cache=captured(model), positions=9)
    batch = captured(model, BATCH, TARGETS, padding_side="right")
    for index in (5, Slice(5), np.int64(5)):
        with pytest.raises(ValueError, match=r"batch_slice=.*5.*: this batch has prompts 0 to 2"):
            lens(cache=batch, batch_slice=index)
    with pytest.raises(ValueError, match=r"\(3, 3\) selects none: this batch has prompts 0 to 2"):
        lens(cache=batch, batch_slice=(3, 3))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_cache_of_another_model(models, cls):
    cache, lens = captured(models(f"{cls}-llama")), tlb.BackwardLogitLens(models(f"{cls}-gpt2"))
    require_refused(lens, cache, r"cache comes from another model: its blocks\.0")


def test_a_cache_of_a_model_whose_weights_have_the_same_shapes(lens, model):
    cache = captured(model)
    deeper = replace(cache, residual=replace(cache.residual, n_layers=9))
    require_refused(lens, deeper, "cache comes from another model: it has 9 layers")
    for name in ("tokens", "target_ids"):
        wider = replace(cache, **{name: torch.full_like(getattr(cache, name), 10**6)})
        require_refused(lens, wider, "another model: it holds the token id 1000000")


@pytest.mark.skipif("bridge" not in CLASSES, reason="only a bridge changes the weights it has")
def test_a_cache_of_weights_before_their_processing(models):
    cache = captured(models("bridge-gpt2"))
    lens = tlb.BackwardLogitLens(models("bridge-gpt2-compatibility"))
    require_refused(lens, cache, r"weights were raw, the model's are fold_ln")


def require_refused(lens, cache, message):
    for read in (
        lambda: lens(cache=cache),
        lambda: lens.singular_vectors(cache, "W_out", 0),
        lambda: lens.neurons(cache, "W_out", 0, [1]),
    ):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.usefixtures("unchecked")
def test_bad_vectors_neurons_and_singular_vectors(lens, model):
    cache = captured(model, weights=("W_in", "W_out"))
    d_mlp = cache["W_in", 0].shape[1]
    with pytest.raises(ValueError, match=rf"vectors must be \[entry, ..., {model.cfg.d_model}\]"):
        lens.read(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="with at least one entry"):
        lens.read(torch.zeros(0, model.cfg.d_model))
    for no_vectors in (np.ones((2, model.cfg.d_model)), torch.ones(2, 5, dtype=torch.long)):
        with pytest.raises(TypeError, match="vectors must be a floating-point tensor"):
            lens.read(no_vectors)
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="vectors: the vectors are not finite"):
            lens.read(torch.full((2, model.cfg.d_model), number))
    with pytest.raises(ValueError, match="labels holds 1 names for 2 entries"):
        lens.read(torch.ones(2, model.cfg.d_model), ["one"])
    with pytest.raises(ValueError, match=rf"neurons=\[99\]: W_in has neurons 0 to {d_mlp - 1}"):
        lens.neurons(cache, "W_in", 0, [3, 99])
    for k in (0, 6, 1.5):
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, 5\]"):
            lens.singular_vectors(cache, "W_out", 0, k=k)
    n_layers = model.cfg.n_layers
    with pytest.raises(ValueError, match=f"layer=None: W_out is in {n_layers} layers; pass one"):
        lens.singular_vectors(cache, "W_out", None)
    with pytest.raises(ValueError, match="weight='W_U' neither reads the residual stream"):
        lens.neurons(cache, "W_U", None, 3)


def test_the_embedding_writes_to_the_residual_stream(lens, model):
    cache = captured(model, weights="W_E")
    readout = lens.neurons(cache, "W_E", None, PROMPT[1])
    require_read(readout, logits_of(model, cache["W_E", None].dense()[PROMPT[1:2]]))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_and_no_weight(lens):
    with pytest.raises(TypeError, match="model must be a TransformerLens HookedTransformer"):
        tlb.BackwardLogitLens(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="weights must name kinds such as"):
        lens(PROMPT, TARGET, weights=None)
