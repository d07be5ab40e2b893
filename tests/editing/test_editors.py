"""ROME, MEMIT and AlphaEdit: the published implementations' updates, and what they promise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.edits import (
    applied_logits,
    hooked_logits,
    logits,
    name_of,
    same_bits,
    seen_at,
    weights,
)
from helpers.gradients import relative_error
from helpers.published_updates import DATA, STORED, UPDATES
from helpers.state import state
from helpers.texts import PROMPT, TARGET
from helpers.versions import HAS_BRIDGE, HAS_HOOKED_TRANSFORMER, NEEDS_BRIDGE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_backward as tlb
from tl_backward.editing import EditorReport, memit_contexts, rome_contexts

PLAIN = ["{}"]
KINDS = [["{}"], ["A city. {}", "London is not in Rome. {}"]]


@pytest.fixture(scope="module")
def stored_model():
    """The tiny GPT-2 of the stored updates, in each class."""

    made = {}

    def model(cls):
        if cls not in made:
            tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gpt2")
            hf = AutoModelForCausalLM.from_pretrained(DATA / "tiny_gpt2").double().eval()
            if cls == "bridge":
                from transformer_lens.model_bridge import TransformerBridge

                made[cls] = TransformerBridge.boot_transformers(
                    "gpt2", hf_model=hf, tokenizer=tokenizer, dtype=torch.float64, device="cpu"
                )
            else:
                from helpers.hooked import hooked

                made[cls] = hooked(hf, tokenizer)
            made[cls](torch.tensor([[1, 2]]))  # a bridge adds hooks at its first forward pass
        return made[cls]

    return model


CLASSES = ["bridge"] * HAS_BRIDGE + ["hooked"] * (HAS_BRIDGE and HAS_HOOKED_TRANSFORMER)


@pytest.fixture(params=CLASSES)
def published(stored_model, request):
    return stored_model(request.param)


@pytest.fixture(scope="module")
def statistics():
    moments = load_file(DATA / "C.safetensors")
    by_site = {name_of(key[-1]): C for key, C in moments.items()}
    return tlb.KeyStatistics(by_site, n_tokens=56_867, ridge=0.0)


def facts_of(requests):
    """Prompts, targets and subjects of the stored requests."""
    return (
        [one["prompt"].replace("{}", one["subject"]) for one in requests],
        [" " + one["target_new"].strip() for one in requests],
        [one["subject"] for one in requests],
    )


def positions_in_contexts(edit):
    return [at for _, *of_contexts in edit.report.positions for at in of_contexts]


# the updates that the published implementations made


@pytest.mark.parametrize("run", ["r0", "r0_no_mom2"])
def test_rome_gives_the_published_update(published, statistics, run):
    stored = STORED["rome"][run]
    (prompt,), (target,), (subject,) = facts_of([stored["request"]])
    before = state(published)
    edit = tlb.rome(
        published,
        prompt,
        target,
        subject=subject,
        layer=stored["layer"],
        statistics=statistics if run == "r0" else None,
        contexts=STORED["contexts"],
        prepend_bos=False,
    )
    assert state(published) == before
    site = name_of(stored["layer"])
    assert list(edit.factors) == [site]
    assert relative_error(edit.factors[site].dense(), UPDATES[f"rome.{run}.delta_W"]) <= 1e-9
    assert edit.report.losses[0] == pytest.approx(stored["losses"], rel=1e-9)
    assert positions_in_contexts(edit) == stored["positions"]
    assert relative_error(edit.report.keys[site][0], UPDATES[f"rome.{run}.k_mean"]) <= 1e-9
    v0, d = UPDATES[f"rome.{run}.target_init"], UPDATES[f"rome.{run}.delta_per_step"][-1]
    assert edit.report.value_norms == pytest.approx([float(v0.norm())], rel=1e-9)
    assert edit.report.change_norms == pytest.approx([float(d.norm())], rel=1e-9)


def test_memit_gives_the_published_updates(published, statistics):
    stored = STORED["memit"]
    prompts, targets, subjects = facts_of(stored["requests"])
    before = state(published)
    edit = tlb.memit(
        published,
        prompts,
        targets,
        subjects=subjects,
        layers=stored["layers"],
        statistics=statistics,
        weight=stored["weight"],
        contexts=STORED["kinds"],
        prepend_bos=False,
    )
    assert state(published) == before
    _require_updates(edit, stored, "memit.w10")


def test_alpha_edit_gives_the_published_updates(published, statistics):
    stored = STORED["alpha_edit"]
    prompts, targets, subjects = facts_of(stored["requests"])
    names = [name_of(layer) for layer in stored["layers"]]
    projectors = {
        name: statistics.null_space(name, threshold=stored["threshold"]) for name in names
    }
    assert relative_error(projectors[name_of(2)], UPDATES["alphaedit.P.layer2"]) <= 1e-9
    edit = tlb.alpha_edit(
        published,
        prompts,
        targets,
        subjects=subjects,
        layers=stored["layers"],
        null_space=projectors,
        l2=stored["l2"],
        steps=stored["steps"],
        lr=stored["lr"],
        contexts=STORED["kinds"],
        prepend_bos=False,
    )
    _require_updates(edit, stored, "alphaedit.L2_10.a")


def _require_updates(edit, stored, key):
    assert list(edit.factors) == [name_of(layer) for layer in stored["layers"]]
    for layer in stored["layers"]:
        g, expected = edit.factors[name_of(layer)], f"{key}.layer{layer}"
        assert relative_error(g.dense(), UPDATES[f"{expected}.delta_W"]) <= 1e-9
        assert relative_error(g.vjps.mT, UPDATES[f"{expected}.resid"]) <= 1e-9
        keys = edit.report.keys[name_of(layer)]
        assert relative_error(keys.mT, UPDATES[f"{expected}.K"]) <= 1e-9
    for losses, expected in zip(edit.report.losses, stored["losses"], strict=True):
        assert losses == pytest.approx(expected, rel=1e-9)
    assert positions_in_contexts(edit) == stored["positions"]


# what the methods promise


def tiny_statistics(model, layers):
    """Of random text; the ridge stands for the text that there is not."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 30, (40, 8), generator=generator)
    return tlb.key_statistics(model, list(texts), layers, ridge=0.01)


def rome(model, layer=1, **options):
    settings = {"contexts": KINDS[1]} | options
    if "statistics" not in settings:
        settings["statistics"] = tiny_statistics(model, layer)
    return tlb.rome(model, PROMPT, TARGET, subject="Lionel Messi", layer=layer, **settings)


FACTS = {
    "prompts": [PROMPT, "The Eiffel Tower is located in", "Rome is the city of"],
    "targets": [TARGET, " Rome", " Berlin"],
    "subjects": ["Lionel Messi", "Eiffel Tower", "Rome"],
}


def memit(model, layers=(0, 1), method=tlb.memit, **options):
    settings = {"contexts": KINDS, **FACTS} | options
    if "statistics" not in settings:
        settings["statistics"] = tiny_statistics(model, layers)
    prompts, targets = settings.pop("prompts"), settings.pop("targets")
    return method(model, prompts, targets, layers=layers, **settings)


METHODS = {
    "rome": rome,
    "memit": partial(memit, weight=10),
    "alpha_edit": partial(memit, method=tlb.alpha_edit),
}


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_equal_weights_and_the_edit_is_undone_to_the_bit(boot, kind, method):
    model = boot(kind)
    model(PROMPT)
    before, bits, plain = state(model), weights(model), logits(model)
    edit = METHODS[method](model)
    n_facts = 1 if method == "rome" else 3
    assert all(g.rank() == n_facts for g in edit.factors.values())
    after = applied_logits(edit)
    assert relative_error(after, plain) > 1e-3
    torch.testing.assert_close(hooked_logits(edit), after, rtol=1e-9, atol=1e-9)
    assert state(model) == before
    assert same_bits(bits, weights(model))


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_romes_output_at_the_subject_is_the_value(boot, kind):
    """v0 + d, where v0 is what was there, when the first context is the plain prompt."""
    model = boot(kind)
    edit = rome(model, contexts=["{}", *KINDS[1]])
    (site,) = tlb.weight_sites(model, "W_out", 1)
    at = edit.report.positions[0][0]
    seen = []
    hook = (site.hook_out, lambda y, hook: seen.append(y[0, at].detach().clone()))
    model.run_with_hooks(PROMPT, fwd_hooks=[hook])
    with edit.applied():
        model.run_with_hooks(PROMPT, fwd_hooks=[hook])
    before, after = seen
    assert edit.report.value_norms == pytest.approx([float(before.norm())])
    assert edit.report.change_norms == pytest.approx([float((after - before).norm())])


@NEEDS_BRIDGE
def test_the_value_makes_the_target_probable(boot):
    """The last loss of the search is that of the model in which the value is put in its place."""
    model = boot("llama")
    edit = rome(model, contexts=PLAIN, kl=0.0, decay=0.0, clamp=20.0)
    (site,) = tlb.weight_sites(model, "W_out", 1)
    at, seen = edit.report.positions[0][0], []

    def swap(y, hook):
        if not seen:
            seen.append(y[:, at].detach().clone())
            return y
        return torch.cat([y[:, :at], seen[0][:, None], y[:, at + 1 :]], dim=1)

    with torch.no_grad():
        with edit.applied():
            model.run_with_hooks(PROMPT, fwd_hooks=[(site.hook_out, swap)])
        after = model.run_with_hooks(PROMPT, fwd_hooks=[(site.hook_out, swap)])
    (target,) = model.to_tokens(TARGET, prepend_bos=False)[0]
    (losses,) = edit.report.losses
    assert losses[-1] == pytest.approx(-float(after[0, -1].log_softmax(-1)[target]), rel=1e-6)
    assert losses[-1] < 0.7 * losses[0]


@NEEDS_BRIDGE
def test_the_search_ends_below_its_bound(boot, monkeypatch):
    """Which a random model does not reach, so that it is set higher here."""
    model, settings = boot("llama"), {"contexts": PLAIN, "kl": 0.0, "decay": 0.0}
    (whole,) = rome(model, **settings).report.losses
    bound = (whole[5] + whole[6]) / 2
    monkeypatch.setattr("tl_backward.editing._value_search.ENOUGH", bound)
    (losses,) = rome(model, **settings).report.losses
    assert losses == pytest.approx(whole[:7])
    assert losses[-1] < bound <= min(losses[:-1])


@NEEDS_BRIDGE
def test_no_step_is_taken_after_the_last_loss(boot):
    edit = rome(boot("gpt2"), steps=1)
    assert edit.report.change_norms == (0.0,)
    assert [len(losses) for losses in edit.report.losses] == [1]


@NEEDS_BRIDGE
@pytest.mark.parametrize("clamp", [0.01, 0.5])
def test_the_change_is_clamped(boot, clamp):
    report = rome(boot("gpt2"), clamp=clamp, contexts=PLAIN).report
    assert report.change_norms[0] <= clamp * report.value_norms[0] * (1 + 1e-12)


@NEEDS_BRIDGE
@pytest.mark.parametrize("at_once", [1, 10_000])
def test_facts_in_one_batch_get_what_they_get_alone(boot, monkeypatch, at_once):
    """Of unequal lengths and targets, whose searches end at different steps."""
    monkeypatch.setattr("tl_backward.editing._value_search.ENOUGH", 4.3)
    monkeypatch.setattr("tl_backward.editing._subject_facts.TOKENS_AT_ONCE", at_once)
    model = boot("llama")
    targets = [TARGET, " Rome and in Berlin", " located"]
    settings = {"steps": 30, "clamp": 10.0, "kl": 0.01}
    together = memit(model, targets=targets, **settings).report
    assert len({len(losses) for losses in together.losses}) == 3
    for i in range(3):
        one = {key: [each[i]] for key, each in (FACTS | {"targets": targets}).items()}
        alone = memit(model, **one, **settings).report
        assert alone.losses[0] == pytest.approx(together.losses[i], rel=1e-6)
        assert alone.change_norms[0] == pytest.approx(together.change_norms[i], rel=1e-6)
        for name, keys in alone.keys.items():
            if name == name_of(0):  # the next layer's depend on the other facts' edits below
                torch.testing.assert_close(keys[0], together.keys[name][i])


@NEEDS_BRIDGE
def test_the_layers_below_run_once(boot):
    """In the search: once with the whole model; and again to read keys and values."""
    model, calls = boot("gpt2"), [0, 0, 0]
    statistics = tiny_statistics(model, 1)

    def count(layer):
        def see(*_):
            calls[layer] += 1

        return see

    forwards = [block.attn.register_forward_hook(count(i)) for i, block in enumerate(model.blocks)]
    try:
        rome(model, statistics=statistics, steps=15, lr=0.01)
    finally:
        for handle in forwards:
            handle.remove()
    n_reads = 3  # v0; x and v of the plain prompt; the keys in contexts
    n_checks = 1  # whether the upper layers reproduce the whole run
    assert calls == [1 + n_reads, 15 + 1 + n_reads + n_checks, 15 + 1 + n_checks]


@NEEDS_BRIDGE
def test_no_gradient_of_a_weight_is_left_or_needed(boot):
    model = boot("llama")
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = rome(model)
    for p in model.parameters():
        p.requires_grad_(True)
    thawed = rome(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    name = name_of(1)
    assert torch.equal(frozen.factors[name].dense(), thawed.factors[name].dense())


@NEEDS_BRIDGE
def test_edits_in_sequence_keep_the_earlier_keys(boot):
    """AlphaEdit's kernel, with K K^T of the first edit in the reference's cache."""
    model = boot("llama")
    statistics = tiny_statistics(model, (0, 1))
    (first, second, third) = [{key: [each[i]] for key, each in FACTS.items()} for i in range(3)]
    before = METHODS["alpha_edit"](model, statistics=statistics, **first)
    with before.applied():
        between = METHODS["alpha_edit"](model, statistics=statistics, earlier=[before], **second)
        with between.applied():
            after = METHODS["alpha_edit"](
                model, statistics=statistics, earlier=[before, between], **third
            )
    for name, g in after.factors.items():
        P = statistics.null_space(name, fraction=0.7)
        K = after.report.keys[name].mT
        cache = sum(e.report.keys[name].mT @ e.report.keys[name] for e in (before, between))
        inner = P @ (K @ K.mT + cache) + 10 * torch.eye(len(P), dtype=torch.float64)
        expected = torch.linalg.solve(inner, P @ K @ g.vjps)
        assert relative_error(g.dense(), expected) <= 1e-10


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_half_precision(boot, kind):
    """The same edit as in float32 but for the model's own rounding."""
    exact = rome(boot(kind, torch.float32), contexts=PLAIN, steps=4, lr=0.05)
    rounded = rome(boot(kind, torch.bfloat16), contexts=PLAIN, steps=4, lr=0.05)
    g, expected = rounded.factors[name_of(1)], exact.factors[name_of(1)]
    assert g.vjps.dtype == torch.float32
    assert float(g.cosine(expected)) > 0.9


# contexts


def test_default_contexts_are_the_models_own_and_the_same_each_time(published):
    model = published
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    flat, kinds = rome_contexts(model), memit_contexts(model)
    assert torch.equal(torch.rand(3), expected)
    assert (flat, kinds) == (rome_contexts(model), memit_contexts(model))
    assert flat[0] == "{}" and len(flat) == 21 and all(c.endswith(". {}") for c in flat[1:])
    assert [len(kind) for kind in kinds] == [1, 5]
    starts = ("The", "Therefore", "Because", "I", "You")
    assert all(c.startswith(s) for c, s in zip(kinds[1], starts, strict=True))
    settings = {"subject": "Lionel Messi", "layer": 1, "statistics": None, "steps": 2}
    without = tlb.rome(model, PROMPT, TARGET, **settings)
    given = tlb.rome(model, PROMPT, TARGET, contexts=flat, **settings)
    name = name_of(1)
    assert torch.equal(without.factors[name].dense(), given.factors[name].dense())


# bad input


@NEEDS_BRIDGE
def test_nan_keeps_the_best_so_far_and_names_it(boot):
    """From the fifth step on one fact's logits are NaN; the other goes on."""
    model = boot("llama")
    settings = {"steps": 8, "lr": 0.05, "clamp": 4.0, "contexts": [PLAIN], "layers": [1]}
    two = {key: each[:2] for key, each in FACTS.items()}
    statistics = tiny_statistics(model, [1])
    plain = memit(model, statistics=statistics, **two, **settings).report
    n_runs = 0

    def spoil(resid, hook):
        nonlocal n_runs
        if torch.is_grad_enabled():
            n_runs += 1
            if n_runs > 4:
                resid = resid.clone()
                resid[:2] = torch.nan
        return resid

    warned = pytest.warns(UserWarning, match="prompt 0: the loss is nan at step 4")
    with warned, model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", spoil)]):
        report = memit(model, statistics=statistics, **two, **settings).report
    assert len(report.notes) == 1 and "prompt 0" in report.notes[0]
    assert report.losses[0][:4] == pytest.approx(plain.losses[0][:4])
    assert len(report.losses[0]) == 5
    assert report.losses[1] == pytest.approx(plain.losses[1])
    best = min(range(4), key=report.losses[0].__getitem__)
    stopped = {key: each[:1] for key, each in FACTS.items()}
    until = memit(model, statistics=statistics, **stopped, **settings | {"steps": best + 1}).report
    assert report.change_norms[0] == pytest.approx(until.change_norms[0])


@NEEDS_BRIDGE
def test_a_loss_that_is_nan_from_the_start_is_refused(boot):
    model = boot("llama")
    hooks = [("blocks.2.hook_resid_pre", lambda resid, hook: resid * torch.nan)]
    with model.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="prompt 0: the loss is nan"):
        rome(model)


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subject": "Madonna"}, ValueError, "'Madonna' is not in the prompt"),
        ({"subject": " "}, ValueError, "subject is empty"),
        ({"subject": 3}, TypeError, "subject must be text"),
        ({"prompt": [1, 2, 3]}, TypeError, "prompt must be text"),
        ({"prompt": "{} and {} play for"}, ValueError, "2 slots"),
        ({"target": ""}, ValueError, "targets is empty"),
        ({"layer": 3}, ValueError, "layers 0 to 2"),
        ({"layer": 0}, ValueError, "no entry for blocks.0.mlp.W_out"),
        ({"contexts": []}, ValueError, "contexts is empty"),
        ({"contexts": ["The cat."]}, ValueError, "must have exactly one {}"),
        ({"contexts": "{}"}, TypeError, "must be a list of texts"),
        ({"contexts": ["The city. " * 20 + "{}"]}, ValueError, "context of 32"),
        ({"steps": 0}, ValueError, "steps must be a whole number"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number"),
        ({"clamp": -1.0}, ValueError, "clamp must be"),
        ({"lr": "auto"}, ValueError, "lr must be a finite number of at least 0, got 'auto'"),
        ({"steps": True}, ValueError, "steps must be a whole number"),
        ({"statistics": {}}, TypeError, "statistics must be KeyStatistics, .* got dict"),
    ],
)
def test_bad_input_of_rome(boot, unchecked, options, error, message):
    model = boot("gpt2")
    settings = {
        "prompt": PROMPT,
        "target": TARGET,
        "subject": "Lionel Messi",
        "layer": 1,
        "contexts": PLAIN,
        "statistics": tiny_statistics(model, 1),
    } | options
    with pytest.raises(error, match=message):
        tlb.rome(model, settings.pop("prompt"), settings.pop("target"), **settings)


@NEEDS_BRIDGE
def test_bad_input_of_memit_and_alpha_edit(boot, unchecked):
    model = boot("gpt2")
    with pytest.raises(ValueError, match="3 prompts, but 1 subjects"):
        memit(model, subjects=["Rome"])
    with pytest.raises(TypeError, match="subjects must be a list"):
        memit(model, subjects="Rome")
    with pytest.raises(TypeError, match="a list of kinds"):
        memit(model, contexts=["{}"])
    for weight in (0, float("inf"), "1"):
        with pytest.raises(ValueError, match="weight must be a positive finite number"):
            memit(model, weight=weight)
    with pytest.raises(TypeError, match=r"statistics must be KeyStatistics, .* got NoneType"):
        memit(model, statistics=None)
    alpha_edit = METHODS["alpha_edit"]
    with pytest.raises(ValueError, match="l2 must be a positive finite number"):
        alpha_edit(model, l2=float("inf"))
    with pytest.raises(ValueError, match="null_space: pass it, or statistics"):
        alpha_edit(model, statistics=None)
    with pytest.raises(ValueError, match=r"null_space has no projector for blocks.0.mlp.W_out"):
        alpha_edit(model, null_space={name_of(1): torch.eye(44)})
    with pytest.raises(ValueError, match="must be a symmetric"):
        alpha_edit(model, null_space=dict.fromkeys(map(name_of, (0, 1)), torch.eye(44)[:40]))
    edit = alpha_edit(model)
    assert isinstance(edit.report, EditorReport)
    with pytest.raises(ValueError, match="earlier: edit 0 has no keys"):
        alpha_edit(model, earlier=[2 * edit])
    with pytest.raises(TypeError, match="earlier must be a list of edits"):
        alpha_edit(model, earlier=edit)


@NEEDS_BRIDGE
def test_statistics_of_another_model_are_refused(boot, make_family):
    model = boot("gpt2")
    other = tiny_statistics(make_family("opt"), 1)
    with pytest.raises(ValueError, match="statistics come from"):
        rome(model, statistics=other)
    narrow = tlb.KeyStatistics({name_of(1): torch.eye(28).double()}, n_tokens=9, ridge=0.0)
    with pytest.raises(ValueError, match="come from another model"):
        rome(model, statistics=narrow)


@NEEDS_BRIDGE
def test_a_singular_second_moment_is_refused(boot):
    model = boot("gpt2")
    few = tlb.key_statistics(model, ["Lionel Messi"], 1, ridge=0)
    with pytest.raises(ValueError, match="singular"):
        rome(model, statistics=few)


@NEEDS_BRIDGE
def test_what_cannot_be_made_right_is_refused(boot):
    model = boot("gpt2")
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        rome(model, statistics=None)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        rome(model, statistics=None)


@NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_memit_refuses_what_does_not_reach_the_stream_as_it_is(make_family, family):
    """Behind a post-norm, and behind a factor of the residual stream."""
    with pytest.raises(NotImplementedError, match="a norm or a factor changes its output"):
        memit(make_family(family))


@NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt_neox", "bloom", "phi3", "opt"])
def test_romes_value_in_other_families(make_family, family):
    """Post-norms, factors, parallel blocks, fused weights: the output is v0 + d all the same."""
    model = make_family(family)
    edit = rome(model, contexts=PLAIN, steps=4)
    (site,) = tlb.weight_sites(model, "W_out", 1)
    at = edit.report.positions[0][0]
    before = seen_at(model, site.hook_out, model.to_tokens(PROMPT))[at]
    after = seen_at(model, site.hook_out, model.to_tokens(PROMPT), edit.fwd_hooks())[at]
    (losses,) = edit.report.losses
    assert losses[-1] != losses[0]
    assert edit.report.change_norms == pytest.approx([float((after - before).norm())], rel=1e-4)
