"""VJPs along the residual stream, against autograd on a perturbation of the stream."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers.versions import HAS_BRIDGE, TL_VERSION
from transformer_lens.ActivationCache import Slice

import tl_backward as tlb

TOKENS, TARGET = [3, 17, 3, 9, 8, 7], 5
BATCH, TARGETS = [[3, 17, 3, 9], [6, 2], [12, 1, 20]], [5, 11, 2]


@pytest.fixture
def cache(model):
    return tlb.run_with_backward_cache(model, TOKENS, TARGET, per_head=True)[1]


@pytest.fixture(params=["llama", "gpt2"])
def model(request, models):
    return models(f"{'bridge' if HAS_BRIDGE else 'hooked'}-{request.param}")


@pytest.fixture(params=["llama", "gpt2"])
def any_model(request, models):
    return models(f"{'bridge' if TL_VERSION == 4 else 'hooked'}-{request.param}")


def nll(logits):
    return -logits[0, -1].log_softmax(-1)[TARGET]


def vjp_of_an_addition(model, name, loss=nll, tokens=TOKENS):
    """``dL/d(eps)`` where ``eps`` is added at a HookPoint."""
    added = torch.zeros(1, len(tokens), model.cfg.d_model, dtype=model.cfg.dtype)
    added.requires_grad_()
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: tensor + added)]):
        value = loss(model(torch.tensor([tokens])))
    return torch.autograd.grad(value, added)[0][0]


def assert_close(got, want, tolerance=1e-10):
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm()


def test_accumulated_vjps_are_those_of_the_stream(model, cache):
    vjps, labels = cache.accumulated_vjps(return_labels=True)
    n_layers = model.cfg.n_layers
    assert labels == [*(f"{layer}_pre" for layer in range(n_layers)), "final_post"]
    for layer in range(n_layers):
        assert_close(vjps[layer], vjp_of_an_addition(model, f"blocks.{layer}.hook_resid_pre"))
    assert_close(vjps[-1], vjp_of_an_addition(model, f"blocks.{n_layers - 1}.hook_resid_post"))


def test_the_middle_is_what_attention_writes_to(model, cache):
    """On a bridge an addition at hook_resid_mid reaches the MLP only; at hook_attn_out, the sum."""
    vjps, labels = cache.accumulated_vjps(incl_mid=True, return_labels=True)
    for layer in range(model.cfg.n_layers):
        middle = vjps[labels.index(f"{layer}_mid")]
        assert_close(middle, vjp_of_an_addition(model, f"blocks.{layer}.hook_attn_out"))


@pytest.mark.parametrize("layer", [None, -1, 0, 1, 2])
def test_labels_and_shapes_are_those_of_accumulated_resid(any_model, layer):
    _, activations = any_model.run_with_cache(torch.tensor([TOKENS]))
    _, cache = tlb.run_with_backward_cache(any_model, TOKENS, TARGET)
    has_mlp = layer not in (None, -1) and layer < any_model.cfg.n_layers
    for incl_mid, mlp_input, pos_slice in product(
        [False, True], [False, True] if has_mlp else [False], [None, -1, (1, 4), [0, 2]]
    ):
        arguments = {
            "layer": layer,
            "incl_mid": incl_mid,
            "mlp_input": mlp_input,
            "pos_slice": pos_slice,
            "return_labels": True,
        }
        resid, labels = activations.accumulated_resid(**arguments)
        vjps, own_labels = cache.accumulated_vjps(**arguments)
        assert own_labels == labels
        assert vjps.shape == (resid.shape[0], *resid.shape[2:])


def test_parts_add_up_at_every_layer(model, cache):
    pre = cache.accumulated_vjps()
    middles, labels = cache.accumulated_vjps(incl_mid=True, return_labels=True)
    for layer in range(model.cfg.n_layers + 1):
        assert_close(cache.decompose_vjps(layer).sum(0), pre[layer], 1e-12)
        if layer < model.cfg.n_layers:
            parts, names = cache.decompose_vjps(layer, mlp_input=True, return_labels=True)
            assert f"{layer}_attn_out" not in names
            assert_close(parts.sum(0), middles[labels.index(f"{layer}_mid")], 1e-12)


def test_a_part_is_what_comes_through_its_block(model, cache):
    """Cut the gradient behind one attention, or one MLP: the VJP before it loses that part."""
    parts, labels = cache.decompose_vjps(return_labels=True)
    n_layers = model.cfg.n_layers
    assert labels == [
        "unembed",
        *(f"{layer}_{part}_out" for layer in range(n_layers) for part in ("attn", "mlp")),
    ]
    before = cache.accumulated_vjps()
    for layer in range(n_layers):
        for part in ("attn", "mlp"):
            hooks = [(f"blocks.{layer}.hook_{part}_out", lambda vjp, hook: torch.zeros_like(vjp))]
            _, cut = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
            without = cut.accumulated_vjps()[layer]
            got = parts[labels.index(f"{layer}_{part}_out")]
            if part == "attn":
                assert_close(before[layer] - without, got)
            else:  # its part also goes on through the attention below
                lost = cut.decompose_vjps(return_labels=False)
                assert lost[labels.index(f"{layer}_mlp_out")].abs().max() < 1e-12 < got.norm()


@pytest.mark.usefixtures("unchecked")
def test_modes_and_embeds_select(cache):
    every, labels = cache.decompose_vjps(return_labels=True)
    for mode in ("attn", "mlp"):
        some, names = cache.decompose_vjps(mode=mode, incl_embeds=False, return_labels=True)
        assert names == [label for label in labels if mode in label]
        assert torch.equal(some, torch.stack([every[labels.index(name)] for name in names]))
    for pos_slice in ((2, 4), Slice((2, 4))):
        assert torch.equal(cache.decompose_vjps(pos_slice=pos_slice), every[:, 2:4])


def tolerance_of_heads(model):
    """Transformers' Llama computes the backward pass of its softmax in float32."""
    return 1e-5 if HAS_BRIDGE and "Llama" in str(model.cfg.architecture) else 1e-10


def test_heads_add_up_to_their_attention(model, cache):
    heads, labels = cache.stack_head_vjps(return_labels=True)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    assert labels == [f"L{layer}H{h}" for layer in range(n_layers) for h in range(n_heads)]
    attention = cache.decompose_vjps(mode="attn", incl_embeds=False)
    assert_close(
        heads.unflatten(0, (n_layers, n_heads)).sum(1), attention, tolerance_of_heads(model)
    )
    for layer in range(n_layers):
        rest, names = cache.stack_head_vjps(layer, incl_remainder=True, return_labels=True)
        assert names == [*labels[layer * n_heads :], "remainder"]
        assert_close(rest.sum(0), cache.accumulated_vjps()[layer], 1e-12)


def test_a_head_is_what_comes_through_it(model, cache):
    """Let the gradient pass one head of hook_z alone."""
    layer, head = 1, 2
    heads, labels = cache.stack_head_vjps(return_labels=True)

    def only(vjp, hook):
        kept = torch.zeros_like(vjp)
        kept[:, :, head] = vjp[:, :, head]
        return kept

    hooks = [(f"blocks.{layer}.attn.hook_z", only)]
    _, cut = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
    attention, names = cut.decompose_vjps(return_labels=True)
    got = heads[labels.index(f"L{layer}H{head}")]
    assert_close(got, attention[names.index(f"{layer}_attn_out")], tolerance_of_heads(model))


def test_of_a_batch_every_example_has_its_own(any_model):
    arguments = {"per_head": True, "padding_side": "right"}
    _, cache = tlb.run_with_backward_cache(any_model, BATCH, TARGETS, **arguments)
    n_rows = sum(map(len, BATCH))
    assert cache.accumulated_vjps().shape[1:] == (n_rows, any_model.cfg.d_model)
    for b, (prompt, target) in enumerate(zip(BATCH, TARGETS, strict=True)):
        _, alone = tlb.run_with_backward_cache(any_model, prompt, target, per_head=True)
        one = cache.example(b)
        for method in ("accumulated_vjps", "decompose_vjps", "stack_head_vjps"):
            assert_close(getattr(one, method)(), getattr(alone, method)(), 1e-5)
    with pytest.raises(ValueError, match=r"pos_slice: .* cache\.example\(b\) first"):
        cache.accumulated_vjps(pos_slice=-1)
    equal = [prompt[:2] for prompt in BATCH]
    _, cache = tlb.run_with_backward_cache(any_model, equal, TARGETS, per_head=True)
    assert cache.stack_head_vjps(pos_slice=-1).shape[1:] == (3, any_model.cfg.d_model)
    assert_close(cache.example(1).decompose_vjps(), cache.decompose_vjps()[:, 1])


def test_parallel_blocks_have_no_middle_and_two_parts(make_family):
    for family in ("gpt_neox", "gptj"):  # with two norms before the two parts, and with one
        model = make_family(family)
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, per_head=True)
        before, after = cache.accumulated_vjps()[:2]
        assert_close(before, vjp_of_an_addition(model, "blocks.0.hook_resid_pre"))
        parts, labels = cache.decompose_vjps(return_labels=True)
        for part, other in (("attn", "mlp"), ("mlp", "attn")):
            hooks = [(f"blocks.0.{other}.hook_out", lambda vjp, hook: torch.zeros_like(vjp))]
            _, cut = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
            alone = cut.accumulated_vjps()[0] - after
            assert_close(parts[labels.index(f"0_{part}_out")], alone, 1e-6)
        heads = cache.stack_head_vjps(1)
        assert_close(heads.sum(0), parts[labels.index("1_attn_out")], 1e-6)
        with pytest.raises(ValueError, match="parallel blocks have no middle"):
            cache.accumulated_vjps(incl_mid=True)


@pytest.mark.parametrize("family", ["gemma4_text", "zamba2"])
def test_the_stream_begins_behind_what_else_reads_the_embeddings(make_family, family):
    model = make_family(family)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, per_head=True)
    stream, first = cache.accumulated_vjps(), "blocks.0.hook_resid_pre"
    assert_close(stream[0], vjp_of_an_addition(model, first))
    embeddings = cache.residual.vjps["hook_embed"]
    assert_close(embeddings, vjp_of_an_addition(model, "hook_embed"))
    assert (embeddings - stream[0]).norm() > 0.01 * stream[0].norm()
    if family == "gemma4_text":
        assert_close(cache.decompose_vjps().sum(0), stream[0])
        attention = cache.decompose_vjps(mode="attn", incl_embeds=False)
        heads = cache.stack_head_vjps().unflatten(0, (len(attention), -1)).sum(1)
        assert_close(heads, attention, 1e-5)


def test_the_stream_ends_before_the_unembedding_where_blocks_return_lists(make_family):
    """TransformerLens does not pass the HookPoints at the end of openai-gpt's blocks."""
    model = make_family("openai-gpt")
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, per_head=True)
    stream = cache.accumulated_vjps()
    assert_close(stream[0], vjp_of_an_addition(model, "blocks.0.hook_resid_pre"))
    assert_close(stream[-1], vjp_of_an_addition(model, "unembed.hook_in"))
    assert_close(cache.decompose_vjps().sum(0), stream[0])
    _, activations = model.run_with_cache(torch.tensor([TOKENS]))
    end = cache.residual.forward_stream()["final_post"]
    assert torch.equal(end, activations["unembed.hook_in"][0])


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.v.hook_out", "hook_resid_pre"])
def test_heads_are_refused_where_a_hook_would_see_each_of_them(any_model, point):
    calls = []

    def count(vjp, hook):
        calls.append(hook.name)

    hooks = [(f"blocks.1.{point}", count)]
    with pytest.raises(NotImplementedError, match=r"backward hook at blocks\.1\..* again"):
        tlb.run_with_backward_cache(any_model, TOKENS, TARGET, per_head=True, bwd_hooks=hooks)
    assert len(calls) == 1
    for elsewhere in ("hook_mlp_out", "hook_attn_out"):
        hooks = [(f"blocks.1.{elsewhere}", lambda vjp, hook: 0.5 * vjp)]
        _, cache = tlb.run_with_backward_cache(
            any_model, TOKENS, TARGET, per_head=True, bwd_hooks=hooks
        )
        attention = cache.decompose_vjps(mode="attn", incl_embeds=False)
        heads = cache.stack_head_vjps().unflatten(0, (len(attention), -1)).sum(1)
        assert_close(heads, attention, 1e-5)


def test_a_hook_in_a_parallel_block_is_called_once(make_family):
    """So the part that comes through its attention alone is not known."""
    model, seen = make_family("gptj"), []

    def double(vjp, hook):
        seen.append(vjp.clone())
        return 2 * vjp

    hooks = [("blocks.0.attn.v.hook_out", double)]
    _, plain = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
    assert len(seen) == 1
    torch.testing.assert_close(cache["W_V", 0].vjps, 2 * seen[0].flatten(2)[0])
    assert_close(cache.decompose_vjps(1), plain.decompose_vjps(1))
    with pytest.raises(NotImplementedError, match="a backward hook inside its attention"):
        cache.decompose_vjps()


def assert_scores_are_transformer_lenss(model):
    """Those of ``attribution_patch``, with a metric of the user's, at the same nodes."""
    if TL_VERSION < 4:
        pytest.skip("attribution_patch is in TransformerLens 4.3")
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    clean, corrupt = torch.tensor([TOKENS]), torch.tensor([[4, 1, 3, 9, 2, 7]])
    reference = attribution_patch(
        model, clean, corrupt, lambda logits: logits[0, -1, 5] - logits[0, -1, 7]
    )
    objective = tlb.logit_diff(5, 7)
    caches = [tlb.run_with_backward_cache(model, t, loss_fn=objective)[1] for t in (clean, corrupt)]
    table = caches[0].attribute(caches[1])
    assert len(table) == len(reference.node_scores) and set(table.example) == {0}
    table = table.astype(object).where(table.notna(), None)
    places = zip(*(table[c] for c in ("kind", "layer", "head", "position")), strict=True)
    scores = dict(zip(places, table.score, strict=True))
    largest = max(map(abs, reference.node_scores.values()))
    for node, score in reference.node_scores.items():
        got = scores[node.kind, node.layer, node.head, node.position]
        assert abs(got - score) <= 1e-10 * largest, node


def test_attribution_is_transformer_lenss(model):
    assert_scores_are_transformer_lenss(model)


@pytest.mark.parametrize("family", ["granite", "granitemoe"])
def test_attribution_has_the_nodes_that_are_scaled(make_family, family):
    """TransformerLens passes their HookPoints only if they have hooks."""
    model = make_family(family)
    assert_scores_are_transformer_lenss(model)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_attribution_of_a_batch_is_that_of_its_examples(any_model):
    others = [[4, 1, 3, 9], [5, 5], [2, 1, 7]]
    pairs = [tlb.run_with_backward_cache(any_model, p, TARGETS)[1] for p in (BATCH, others)]
    table = pairs[0].attribute(pairs[1])
    for b in range(3):
        one = pairs[0].example(b).attribute(pairs[1].example(b))
        part = table[table.example == b].drop(columns="example").reset_index(drop=True)
        assert part.drop(columns="score").equals(one.drop(columns=["example", "score"]))
        assert (part.score - one.score).abs().max() <= 1e-12


def test_attribution_is_first_order(any_model):
    """A small change of the embedding changes the loss by the embedding nodes' scores."""
    step = 1e-4

    def shift(tensor, hook):
        return tensor + step * torch.linspace(-1, 1, tensor.shape[-1], dtype=tensor.dtype)

    hooks = [("hook_embed", shift)]
    loss, corrupt = tlb.run_with_backward_cache(any_model, TOKENS, TARGET)
    patched, clean = tlb.run_with_backward_cache(any_model, TOKENS, TARGET, fwd_hooks=hooks)
    scores = clean.attribute(corrupt).query("kind == 'embed'").score
    torch.testing.assert_close(torch.tensor(scores.sum()), patched - loss, rtol=1e-2, atol=0)


def test_only_what_is_behind_the_chosen_layers_is_there(any_model):
    _, cache = tlb.run_with_backward_cache(any_model, TOKENS, TARGET, layers=0, weights="W_out")
    _, whole = tlb.run_with_backward_cache(any_model, TOKENS, TARGET)
    assert torch.equal(cache.decompose_vjps(1), whole.decompose_vjps(1))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.hook_resid_pre was not captured; run with all"
    ):
        cache.accumulated_vjps()


def test_a_capture_of_no_weights_has_the_whole_stream(any_model):
    _, cache = tlb.run_with_backward_cache(any_model, TOKENS, TARGET, weights=())
    _, whole = tlb.run_with_backward_cache(any_model, TOKENS, TARGET)
    assert not cache and torch.equal(cache.accumulated_vjps(), whole.accumulated_vjps())


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("accumulated_vjps", {"layer": 7}, r"layer must be in \[0, [23]\].* got 7"),
        ("decompose_vjps", {"layer": -2}, "layer must be .* got -2"),
        ("decompose_vjps", {"mode": "heads"}, "mode must be"),
        ("stack_head_vjps", {}, "run with per_head=True"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(any_model, method, arguments, message):
    _, cache = tlb.run_with_backward_cache(any_model, TOKENS, TARGET)
    with pytest.raises(ValueError, match=message):
        getattr(cache, method)(**arguments)


@pytest.mark.parametrize("part", [{"layers": -1}, {"weights": "W_U"}])
def test_attribution_needs_all_layers(any_model, part):
    whole, some = (
        tlb.run_with_backward_cache(any_model, TOKENS, TARGET, **arguments)[1]
        for arguments in ({}, part)
    )
    for one, other in ((whole, some), (some, whole)):
        with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_pre was not captured"):
            one.attribute(other)


def test_attribution_needs_texts_of_one_length(any_model):
    caches = [tlb.run_with_backward_cache(any_model, p, TARGET)[1] for p in BATCH[:2]]
    with pytest.raises(ValueError, match="texts of the same lengths"):
        caches[0].attribute(caches[1])
