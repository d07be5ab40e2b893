"""Edits by hooks and applied: the same logits, and every weight restored bit for bit."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from helpers.bridges import tiny_config
from helpers.edits import (
    added,
    applied_logits,
    factors,
    hooked_logits,
    logits,
    random_edit,
    same_bits,
    weights,
)
from helpers.families import make
from helpers.gradients import reference_loss, relative_error
from helpers.state import state
from helpers.versions import CLASSES, MODELS, NEEDS_BRIDGE
from torch import nn

import tl_backward as tlb
from tl_backward.editing import WeightEdit, edit_hooks
from tl_backward.editing._weight_change import WeightChange
from tl_backward.factors import GradientFactors
from tl_backward.sites import all_parameters, attached_hook_points

TOKENS = torch.tensor([[3, 17, 3, 29, 8, 9], [1, 2, 3, 4, 5, 6]])
N_RANDOM_EDITS = 1000


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def generate(model, tokens):
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.generate(tokens, **options)


# hooks against the applied edit


def test_hooks_give_the_logits_of_the_applied_edit_at_every_weight(model):
    before, plain = state(model), logits(model)
    for site in tlb.weight_sites(model):
        edit = WeightEdit(model, {site.name: factors(site)})
        expected, got = applied_logits(edit), hooked_logits(edit)
        assert relative_error(expected, plain) > 1e-3, site.name
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=site.name)
    assert state(model) == before


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_float32(boot, kind):
    model = boot(kind, torch.float32)
    for site in tlb.weight_sites(model):
        edit = WeightEdit(model, {site.name: factors(site, dtype=torch.float32, scale=0.03)})
        assert (hooked_logits(edit) - applied_logits(edit)).abs().max() <= 1e-5, site.name


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "olmo2", "granite", "phi3", "gpt_neox", "bloom", "falcon", "hrm_text"),
        *("zamba2", "modernbert-decoder"),
    ],
)
def test_other_families(tokenizer, family):
    """Post-norms, scaled embeddings, fused and parallel parts, blocks and weights used twice.

    ModernBERT's embedding has a padding token, whose row has no gradient, but can be edited.
    """

    model = make(family, tokenizer, torch.float32)
    tokens = torch.tensor([[*TOKENS[0].tolist(), 0]])
    model(tokens)
    for site in tlb.weight_sites(model):
        edit = WeightEdit(model, {site.name: factors(site, dtype=torch.float32, scale=0.03)})
        expected = applied_logits(edit, tokens)
        if site.hook_in is None:  # a layer that TransformerLens has no component for
            with pytest.raises(NotImplementedError, match="no HookPoint on both sides"):
                edit.fwd_hooks()
            continue
        got = hooked_logits(edit, tokens)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), site.name


def test_run_with_hooks_as_the_user_calls_it(model):
    """Also on a HookedTransformer, which is given the HookPoints that it lacks."""
    edit = random_edit(model, "blocks.1.mlp.W_out")
    expected = applied_logits(edit)
    got = model.run_with_hooks(TOKENS, fwd_hooks=edit.fwd_hooks())
    torch.testing.assert_close(got.detach(), expected, rtol=1e-10, atol=1e-10)
    if not hasattr(model, "original_model"):
        tlb.remove_hook_points(model)


def test_hooks_of_a_frozen_model(models):
    model = models(MODELS[0])
    edit = random_edit(model, "blocks.1.mlp.W_out")
    with edit.applied():
        assert all(p.requires_grad for p in all_parameters(model))
        expected = logits(model)
    for parameter in all_parameters(model):
        parameter.requires_grad_(False)
    try:
        torch.testing.assert_close(hooked_logits(edit), expected)
        torch.testing.assert_close(applied_logits(edit), expected, rtol=0, atol=0)
        assert not any(p.requires_grad for p in all_parameters(model))
    finally:
        for parameter in all_parameters(model):
            parameter.requires_grad_(True)


@NEEDS_BRIDGE
def test_quantised_weights_are_edited_by_hooks_only(tokenizer):
    torchao = pytest.importorskip("torchao.quantization")
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).eval()
    torchao.quantize_(
        hf, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith("_proj")
    )
    model = TransformerBridge.boot_transformers(
        "llama", hf_model=hf, tokenizer=tokenizer, device="cpu"
    )
    edit = random_edit(model, "blocks.1.mlp.W_out", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"stored quantised.*use fwd_hooks"):
        edit.apply()
    with torch.no_grad():
        plain = copy.deepcopy(hf)
    site = tlb.weight_sites(model, "W_out", 1)[0]
    dense = site.parameter.dequantize() + site.to_parameter_layout(added(edit, site.name))
    plain.model.layers[1].mlp.down_proj._original_component.weight = nn.Parameter(dense)
    with torch.no_grad():
        torch.testing.assert_close(hooked_logits(edit), plain(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS[:2] + MODELS[-1:])
def test_other_hooks_take_part_as_with_the_applied_edit(models, name):
    """Before the edit's hooks those that patch its input, behind them those of its output."""
    model = models(name)
    edit = random_edit(model, "blocks.1.mlp.W_out")
    site = tlb.weight_sites(model, "W_out", 1)[0]

    def patch(tensor, hook):
        return 1.5 * tensor

    early = [("blocks.0.attn.q.hook_out", patch), (site.hook_in, patch)]
    late = [(site.hook_out, patch), ("blocks.2.attn.o.hook_in", patch)]
    late = late if model.cfg.n_layers > 2 else late[:1]
    with edit.applied():
        expected = logits(model, early + late)
    with attached_hook_points(model):
        got = logits(model, early + edit.fwd_hooks() + late)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_backward_pass_sees_the_edit(model):
    """Factors with the edit in place by hooks are those with the edit applied."""
    edit = random_edit(model, "blocks.1.mlp.W_in") + random_edit(model, "blocks.0.attn.W_V")
    with edit.applied():
        loss, expected = tlb.run_with_backward_cache(model, TOKENS[:1], 5)
    with attached_hook_points(model):
        same, cache = tlb.run_with_backward_cache(model, TOKENS[:1], 5, fwd_hooks=edit.fwd_hooks())
    torch.testing.assert_close(same, loss)
    for name, g in cache.items():
        torch.testing.assert_close(g.inputs, expected[name].inputs, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(g.vjps, expected[name].vjps, rtol=1e-8, atol=1e-10)


# the weights that the model really uses


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_wrapped_model_has_the_edit(boot, kind):
    """Against transformers' own model, into whose weights the update is written by hand."""
    model = boot(kind)
    plain = copy.deepcopy(model.original_model)
    edit = random_edit(model, "blocks.1.mlp.W_out") + random_edit(model, "blocks.2.mlp.W_in")
    parts = {
        "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_fc"),
        "llama": ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"),
    }[kind]
    for part, name in zip(parts, edit.factors, strict=True):
        weight = next(plain.get_submodule(part).parameters())
        dense = added(edit, name)
        weight.data += dense if kind == "gpt2" else dense.mT
    with torch.no_grad():
        expected = plain(TOKENS).logits
        with edit.applied():
            torch.testing.assert_close(model(TOKENS), expected)
            torch.testing.assert_close(model.original_model(TOKENS).logits, expected)
        assert relative_error(model(TOKENS), expected) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_generation(models, name, tokenizer, monkeypatch):
    """With a cache of keys and values."""
    model = models(name)
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    edit = random_edit(model, "blocks.1.mlp.W_out", scale=2, seed=1)
    text = TOKENS[:1, :4]
    plain = generate(model, text)
    with edit.applied():
        by_weights = generate(model, text)
    with attached_hook_points(model), model.hooks(fwd_hooks=edit.fwd_hooks()):
        by_hooks = generate(model, text)
    assert by_weights.tolist() == by_hooks.tolist() != plain.tolist()
    assert generate(model, text).tolist() == plain.tolist()


@NEEDS_BRIDGE
def test_tied_embeddings_are_edited_in_both_places(tokenizer):

    model = make("llama_tied", tokenizer)
    model(TOKENS)
    plain = copy.deepcopy(model.original_model)
    edit = random_edit(model, "unembed.W_U") + random_edit(model, "embed.W_E", seed=1)
    dense = added(edit, "embed.W_E") + added(edit, "unembed.W_U").mT
    plain.get_input_embeddings().weight.data += dense
    with torch.no_grad():
        expected = plain(TOKENS).logits
    torch.testing.assert_close(applied_logits(edit), expected)
    torch.testing.assert_close(hooked_logits(edit), expected)
    torch.testing.assert_close(edit.norm(), dense.norm())


# exact undoing


@pytest.mark.parametrize("name", [*(f"{cls}-gpt2" for cls in CLASSES), MODELS[0]])
def test_random_nested_edits_are_reverted_bit_for_bit(models, name):
    """1,000 random edits, applied and reverted in random orders; what makes no sense raises."""
    model, rng = models(name), random.Random(0)
    before, sites = weights(model), tlb.weight_sites(model)
    standing: list[tuple[WeightEdit, list]] = []
    made = refused = 0
    while made < N_RANDOM_EDITS or standing:
        if made < N_RANDOM_EDITS and (len(standing) < 2 or rng.random() < 4 / len(standing)):
            chosen = rng.sample(sites, rng.choice([1, 1, 2, 3]))
            scale = rng.choice([0.0, 1e-9, 0.1, 1e6])
            edit = WeightEdit(
                model,
                {
                    site.name: factors(site, rng.choice([1, 3]), made, scale=scale)
                    for site in chosen
                },
                sites=sites,
            )
            touched = {id(site.parameter): site.parameter for site in chosen}
            standing.append((edit, [(p, p.detach().clone()) for p in touched.values()]))
            edit.apply()
            made += 1
            continue
        index = rng.randrange(len(standing))
        edit, originals = standing[index]
        later = {id(p) for _, of_later in standing[index + 1 :] for p, _ in of_later}
        if later & {id(p) for p, _ in originals}:
            unchanged = [p.detach().clone() for p, _ in originals]
            with pytest.raises(RuntimeError, match="applied after this one; revert that one first"):
                edit.revert()
            now = [p.detach() for p, _ in originals]
            assert edit.is_applied and all(map(torch.equal, now, unchanged))
            refused += 1
            continue
        edit.revert()
        del standing[index]
        for parameter, original in originals:
            assert torch.equal(parameter.detach().view(torch.int64), original.view(torch.int64))
    assert same_bits(weights(model), before)
    assert refused > 100


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_reverted_when_something_raises(model, error):
    before = state(model)
    one, other = random_edit(model, "blocks.0.mlp.W_in"), random_edit(model, "blocks.0.mlp.W_in")
    with pytest.raises(error), one.applied(), other.applied():
        raise error
    assert state(model) == before
    assert not one.is_applied and not other.is_applied


@pytest.mark.parametrize("method", ["make", "undo"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_several_weights_are_edited_all_or_none(model, monkeypatch, method, error):
    """An interruption behind the first of two weights."""
    before, calls = weights(model), []
    edit = random_edit(model, "blocks.0.mlp.W_in") + random_edit(model, "blocks.1.mlp.W_out")
    whole = getattr(WeightChange, method)

    def interrupted(self, parameter):
        whole(self, parameter)
        calls.append(self.name)
        if len(calls) == 1:
            raise error

    if method == "undo":
        edit.apply()
    monkeypatch.setattr(WeightChange, method, interrupted)
    with pytest.raises(error):
        edit.apply() if method == "make" else edit.revert()
    monkeypatch.undo()
    assert same_bits(weights(model), before) and not edit.is_applied
    with edit.applied():
        assert not same_bits(weights(model), before)
    assert same_bits(weights(model), before)


def test_a_change_by_someone_else_is_detected(model):
    """In any of the weights, however small; nothing is reverted until it is undone."""
    before = weights(model)
    edit = random_edit(model, "blocks.0.mlp.W_in") + random_edit(model, "blocks.1.mlp.W_out")
    for site in tlb.weight_sites(model, ["W_in", "W_out"]):
        if site.name not in edit.factors:
            continue
        edit.apply()
        with_edit = weights(model)
        original = site.parameter.data.clone()
        site.parameter.data[-1] += 1e-9
        changed = weights(model)
        with pytest.raises(RuntimeError, match=f"{site.name} is not as this edit left it"):
            edit.revert()
        assert same_bits(weights(model), changed) and edit.is_applied
        site.parameter.data.copy_(original)
        assert same_bits(weights(model), with_edit)
        edit.revert()
        assert same_bits(weights(model), before)


def test_applied_twice_and_reverted_when_not_applied(model):
    before = weights(model)
    edit = random_edit(model, "blocks.1.mlp.W_out")
    with pytest.raises(RuntimeError, match="not applied"):
        edit.revert()
    with edit.applied():
        with_edit = weights(model)
        with pytest.raises(RuntimeError, match="already applied"):
            edit.apply()
        with pytest.raises(RuntimeError, match="already applied"), edit.applied():
            pass
        assert same_bits(weights(model), with_edit) and edit.is_applied
    assert same_bits(weights(model), before)
    with edit.applied():
        edit.revert()  # early; the end of the block has nothing left to do
    assert same_bits(weights(model), before)


def test_only_what_the_update_touches_is_written(models):
    """Adding 0 would make 0.0 of -0.0."""
    model = models(MODELS[0])
    (site,) = tlb.weight_sites(model, "W_E")
    original = site.parameter.data[7].clone()
    site.parameter.data[7] = -0.0
    u = torch.zeros(1, site.d_in, dtype=torch.float64)
    u[0, 3] = 1
    v = torch.ones(1, site.d_out, dtype=torch.float64)
    before = site.parameter.detach().clone()
    with WeightEdit(model, {site.name: GradientFactors(u, v)}).applied():
        assert site.parameter[7].signbit().all()
        torch.testing.assert_close(site.parameter[3].detach(), before[3] + 1)
        assert torch.equal(site.parameter[4:].detach(), before[4:])
    site.parameter.data[7] = original


@NEEDS_BRIDGE
def test_half_precision_is_added_in_float32(boot):
    model = boot("llama", torch.bfloat16)
    before = weights(model)
    (site,) = tlb.weight_sites(model, "W_out", 1)
    edit = WeightEdit(model, {site.name: factors(site, dtype=torch.bfloat16)})
    dense = (edit.factors[site.name].inputs.float().mT @ edit.factors[site.name].vjps.float()).mT
    expected = (site.parameter.detach().float() + dense).bfloat16()
    with edit.applied():
        assert torch.equal(site.parameter.detach(), expected)
        by_weights = logits(model)
    assert same_bits(weights(model), before)
    assert relative_error(hooked_logits(edit).float(), by_weights.float()) < 0.03


@NEEDS_BRIDGE
def test_a_weight_that_half_precision_cannot_hold(boot):
    """In float32 there is room for the update; in float16 the weight would be infinite."""
    model = boot("llama", torch.float16)
    before = weights(model)
    edit = 1e5 * random_edit(model, "blocks.1.mlp.W_out", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"W_out with its update is too large for torch.float16"):
        edit.apply()
    assert same_bits(weights(model), before) and not edit.is_applied


def test_threads_have_the_inputs_of_their_own_pass(models):
    """Another thread's input that passes between a weight's input and output is not taken."""
    model = models(MODELS[0])
    (site,) = tlb.weight_sites(model, "W_out", 1)
    with attached_hook_points(model):
        (_, note), (_, add) = WeightEdit(model, {site.name: factors(site)}).fwd_hooks()
    x, other = (torch.full((1, 2, site.d_in), value, dtype=torch.float64) for value in (1.0, 7.0))
    y = torch.zeros(1, 2, site.d_out, dtype=torch.float64)
    note(x, hook=None)
    thread = threading.Thread(target=note, args=(other, None))
    thread.start()
    thread.join()
    dense = sum(
        torch.outer(u, v) for u, v in zip(factors(site).inputs, factors(site).vjps, strict=True)
    )
    torch.testing.assert_close(add(y, hook=None), x @ dense)
    with pytest.raises(RuntimeError, match="did not pass"):
        add(y, hook=None)


# many edits in one batch


@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_batch_gets_its_own_edit(models, name):
    """Edits of other weights and other ranks, at every kind of weight."""
    model = models(name)
    before = state(model)
    names = [s.name for s in tlb.weight_sites(model) if s.layer in (None, 1)]
    edits = [random_edit(model, one, n=1 + i % 3, seed=i) for i, one in enumerate(names)]
    edits.append(edits[0] + edits[3] + random_edit(model, names[3], n=4, seed=99))
    rows = [-1, *range(len(edits)), 3]
    tokens = TOKENS[:1].repeat(len(rows), 1)
    with attached_hook_points(model):
        got = logits(model, edit_hooks(model, edits, rows), tokens)
    plain = logits(model)[0]
    for row, index in enumerate(rows):
        expected = plain if index < 0 else applied_logits(edits[index])[0]
        # transformers computes Llama's softmax in float32, where a batch rounds otherwise
        atol = 2e-6 if name == "bridge-llama" else 1e-10
        torch.testing.assert_close(got[row], expected, rtol=0, atol=atol)
    assert state(model) == before


def test_generation_of_a_batch_with_an_edit_for_each_row(models, tokenizer, monkeypatch):
    model = models(MODELS[0])
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    edits = [random_edit(model, "blocks.1.mlp.W_out", scale=0.5, seed=i) for i in range(3)]
    text = TOKENS[:1, :4]

    rows = torch.tensor([2, 0, -1, 1])
    with attached_hook_points(model), model.hooks(fwd_hooks=edit_hooks(model, edits, rows)):
        together = generate(model, text.repeat(4, 1))
    for row, index in enumerate(rows.tolist()):
        if index < 0:
            assert together[row].tolist() == generate(model, text)[0].tolist()
        else:
            with edits[index].applied():
                assert together[row].tolist() == generate(model, text)[0].tolist()


def test_without_rows_every_row_gets_all_edits(models):
    model = models(MODELS[0])
    edits = [random_edit(model, f"blocks.{i}.mlp.W_out", seed=i) for i in (0, 1, 1)]
    with attached_hook_points(model):
        got = logits(model, edit_hooks(model, edits))
    torch.testing.assert_close(got, applied_logits(edits[0] + edits[1] + edits[2]))


@pytest.mark.parametrize("rows", [[0, 2], [-2, 0], []])
def test_rows_that_name_no_edit(models, rows):
    model = models(MODELS[0])
    edits = [random_edit(model, "blocks.1.mlp.W_out", seed=i) for i in range(2)]
    with pytest.raises(ValueError, match="rows must hold the index of one of the 2 edits"):
        edit_hooks(model, edits, rows)


def test_a_batch_of_another_size_than_rows(models):
    model = models(MODELS[0])
    before = state(model)
    edit = random_edit(model, "blocks.1.mlp.W_out")
    with (
        attached_hook_points(model),
        pytest.raises(ValueError, match=r"rows has 4 entries, but .*out.hook_in has .* of 2"),
    ):
        logits(model, edit_hooks(model, [edit], [0, 0, -1, 0]))
    assert state(model) == before


# algebra, reading, saving


def test_algebra(model):
    a = random_edit(model, "blocks.1.mlp.W_out") + random_edit(model, "blocks.0.attn.W_Q", seed=3)
    b = random_edit(model, "blocks.1.mlp.W_out", seed=1, n=3)
    dense = {name: added(a, name) for name in a.factors}
    both = a + 2 * b
    torch.testing.assert_close(
        both.factors["blocks.1.mlp.W_out"].dense(),
        dense["blocks.1.mlp.W_out"] + 2 * added(b, "blocks.1.mlp.W_out"),
    )
    torch.testing.assert_close(
        both.factors["blocks.0.attn.W_Q"].dense(), dense["blocks.0.attn.W_Q"]
    )
    torch.testing.assert_close(a.norm() ** 2, sum(one.norm() ** 2 for one in dense.values()))
    torch.testing.assert_close((a * -3.0).norm(), 3 * a.norm())
    nothing = WeightEdit(model, {})
    assert nothing.norm() == 0 and nothing.fwd_hooks() == [] and (nothing + a).norm() == a.norm()
    with nothing.applied():
        pass
    undone = a + -1 * a
    with undone.applied():
        torch.testing.assert_close(logits(model), applied_logits(nothing))


def test_read_through_the_lens(model):
    """A number goes to the other side: what is read is what the edit was made of."""
    out, query = random_edit(model, "blocks.1.mlp.W_out"), random_edit(model, "blocks.0.attn.W_Q")
    vectors, labels = (-0.3 * (out + query)).residual_vectors()
    assert torch.equal(vectors[:2], out.factors["blocks.1.mlp.W_out"].vjps)
    assert torch.equal(vectors[2:], query.factors["blocks.0.attn.W_Q"].inputs)
    assert labels[2] == "blocks.0.attn.W_Q term 0"
    readout = tlb.BackwardLogitLens(model).read(vectors, labels, top_k=3, targets=5)
    assert readout.layers == [1, 1, 0, 0]
    normed = model.ln_final(vectors.unsqueeze(0))[0]
    expected = (normed @ model.W_U + model.b_U).argsort(-1, descending=True)
    assert readout.top_ids.tolist() == expected[:, :3].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(models, name, tmp_path):
    model = models(name)
    edit = random_edit(model, "blocks.1.mlp.W_out") + random_edit(model, "unembed.W_U")
    path = edit.save(tmp_path / "edit.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["edit.safetensors"]
    loaded = WeightEdit.load(path, model)
    assert torch.equal(applied_logits(loaded), applied_logits(edit))
    unbound = WeightEdit.load(str(path))
    for one in (loaded, unbound):
        assert list(one.factors) == list(edit.factors)
        for site, g in one.factors.items():
            assert torch.equal(g.inputs, edit.factors[site].inputs)
            assert torch.equal(g.vjps, edit.factors[site].vjps)
    for use in (unbound.apply, unbound.fwd_hooks, unbound.norm, lambda: unbound.save(path)):
        with pytest.raises(ValueError, match=r"bound to no model; use edit.bind\(model\)"):
            use()
    assert torch.equal(hooked_logits(unbound.bind(model)), hooked_logits(edit))


@pytest.mark.parametrize(
    ("name", "saved"), [("gpt2", "gpt2"), ("org/gpt2", "org/gpt2"), ("/a/folder/gpt2", "gpt2")]
)
def test_no_folder_of_this_machine_is_saved(models, tmp_path, monkeypatch, name, saved):
    model = models(MODELS[0])
    monkeypatch.setattr(model.cfg, "model_name", name)
    path = random_edit(model, "blocks.1.mlp.W_out").save(tmp_path / "edit.safetensors")
    assert WeightEdit.load(path).made_for.model == saved


def test_refused_by_another_model(models, tmp_path):
    """Other weights, other shapes, or the same weights with an edit on them."""
    model = models(MODELS[0])
    edit = random_edit(model, "blocks.1.mlp.W_out")
    path = edit.save(tmp_path / "edit.safetensors")
    with edit.applied():
        with pytest.raises(RuntimeError, match="an applied edit cannot be saved; revert"):
            edit.save(path)
        with pytest.raises(ValueError, match=r"model: its blocks.1.mlp.W_out is not the"):
            WeightEdit.load(path, model)
        with pytest.raises(ValueError, match=r"model: its blocks.1.mlp.W_out is not the"):
            WeightEdit.load(path).bind(model)
    for other in MODELS[1:]:
        with pytest.raises(ValueError, match=r"not the one that this edit was saved for|is \["):
            WeightEdit.load(path, models(other))
    assert WeightEdit.load(path, model).norm() == edit.norm()


@NEEDS_BRIDGE
def test_refused_in_another_precision(boot, tmp_path):
    model = boot("llama", torch.float32)
    path = random_edit(model, "blocks.1.mlp.W_out").save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="values, dtype or shape differ"):
        WeightEdit.load(path, boot("llama", torch.bfloat16))
    assert WeightEdit.load(path, boot("llama", torch.float32)).factors


@NEEDS_BRIDGE
def test_what_is_made_of_loaded_edits_knows_its_weights(boot, tmp_path):
    """Multiples and sums bind to no other model, though its shapes are the same."""
    model, other = boot("llama"), boot("llama")
    names = ["blocks.1.mlp.W_out", "blocks.0.mlp.W_in"]
    for site in tlb.weight_sites(other):
        site.parameter.data += 1e-3
    one, two = (WeightEdit.load(random_edit(model, n).save(tmp_path / n)) for n in names)
    stranger = WeightEdit.load(random_edit(other, names[1]).save(tmp_path / "other"))
    made = {
        "multiple": 2 * one,
        "multiple of a bound one": -1 * one.bind(model),
        "sum": one + two,
        "sum of multiples": 2 * one + -0.5 * two,
        "sum with an edit of no model": one + WeightEdit(None, two.factors),
        "sum with one of another model": one + stranger,
    }
    for which, edit in made.items():
        with pytest.raises(ValueError, match="not the one that this edit was saved for"):
            edit.bind(other)
        if "another" not in which:
            assert edit.bind(model).factors.keys() == edit.factors.keys()
    with pytest.raises(ValueError, match="cannot add edits that were saved for other weights"):
        two + stranger
    with pytest.raises(ValueError, match="not the one that this edit was saved for"):
        (one + stranger).bind(model)
    path = (2 * (one + two)).bind(model).save(tmp_path / "scaled")
    again = WeightEdit.load(path, model)
    torch.testing.assert_close(again.norm(), 2 * (one + two).bind(model).norm())


@pytest.mark.parametrize("name", MODELS)
def test_no_edit_is_saved_while_a_later_one_is_applied(models, name, tmp_path):
    """It would be for the weights with that edit, and not load without it."""
    model, path = models(name), tmp_path / "edit.safetensors"
    edit, other = random_edit(model, "blocks.1.mlp.W_out"), random_edit(model, "blocks.0.attn.W_V")
    double = 2 * edit
    with edit.applied():
        for derived in (double, 2 * edit, edit + other, other + -1 * edit):
            with pytest.raises(RuntimeError, match=r"another edit of .*W_out was applied"):
                derived.save(path)
        upon_it = random_edit(model, "blocks.1.mlp.W_out", seed=5)
        other.save(path)
        assert WeightEdit.load(path, model).factors.keys() == other.factors.keys()
        upon_it.save(path)
        WeightEdit.load(path, model)
    with pytest.raises(ValueError, match="not the one that this edit was saved for"):
        WeightEdit.load(path, model)
    double.save(path)
    assert torch.equal(applied_logits(WeightEdit.load(path, model)), applied_logits(double))


def test_files_that_are_no_edits(models, tmp_path):
    model = models(MODELS[0])
    path = random_edit(model, "blocks.1.mlp.W_out").save(tmp_path / "edit.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        WeightEdit.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated, damaged"):
        WeightEdit.load(tmp_path / "cut.safetensors")
    _, cache = tlb.run_with_backward_cache(model, TOKENS[:1], 5, weights="W_out")
    with pytest.raises(ValueError, match="holds no WeightEdit"):
        WeightEdit.load(cache.save(tmp_path / "cache.safetensors"))
    with pytest.raises(OSError):
        random_edit(model, "blocks.1.mlp.W_out").save(tmp_path / "no folder" / "edit.safetensors")


# bad input


def test_bad_factors(model):
    before = weights(model)
    good = random_edit(model, "blocks.1.mlp.W_out").factors["blocks.1.mlp.W_out"]
    with pytest.raises(ValueError, match=r"factors: this model has no site 'blocks.9.mlp.W_out'"):
        WeightEdit(model, {"blocks.9.mlp.W_out": good})
    with pytest.raises(ValueError, match=r"factors: blocks.1.mlp.W_out is \[\d+, \d+\] in this"):
        WeightEdit(model, {"blocks.1.mlp.W_out": good.T})
    with pytest.raises(TypeError, match="model must be a TransformerLens"):
        WeightEdit(nn.Linear(2, 3), {"blocks.1.mlp.W_out": good})
    for bad in (float("nan"), float("inf")):
        edit = WeightEdit(model, {"blocks.1.mlp.W_out": good})
        with pytest.raises(ValueError, match="finite number"):
            bad * edit
        both = random_edit(model, "blocks.0.mlp.W_out").factors | {"blocks.1.mlp.W_out": good * bad}
        with pytest.raises(ValueError, match=r"the update of blocks.1.mlp.W_out is not finite"):
            WeightEdit(model, both).apply()
        with pytest.raises(ValueError, match=r"the update of blocks.1.mlp.W_out is not finite"):
            WeightEdit(model, both).fwd_hooks()
    assert same_bits(weights(model), before)


def test_edits_of_two_models(models):
    one, other = (random_edit(models(name), "blocks.1.mlp.W_out") for name in MODELS[:2])
    with pytest.raises(ValueError, match="edits of different models"):
        one + other
    with pytest.raises(ValueError, match="edits: one is bound to another model"):
        edit_hooks(one.model, [one, other])
    with pytest.raises(ValueError, match="this edit is empty"):
        WeightEdit(one.model, {}).residual_vectors()


def test_a_batch_of_factors_is_summed(models):
    """Those of a cache with several prompts."""
    model = models(MODELS[0])
    _, cache = tlb.run_with_backward_cache(model, [TOKENS[0].tolist(), [1, 2, 3]], 5)
    edit = WeightEdit(model, {name: cache[name] for name in ("blocks.1.mlp.W_out",)})
    loss = reference_loss(model, TOKENS[:1], 5) + reference_loss(model, TOKENS[1:, :3], 5)
    (site,) = tlb.weight_sites(model, "W_out", 1)
    (gradient,) = torch.autograd.grad(loss, site.parameter)
    before = site.parameter.detach().clone()
    with edit.applied():
        torch.testing.assert_close(site.parameter.detach() - before, gradient)
