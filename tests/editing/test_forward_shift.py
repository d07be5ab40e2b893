"""The forward pass shift: exact identities, its searches against brute force, and what it runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.edits import (
    W_out,
    applied_logits,
    embedding,
    gap,
    logits,
    random_edit,
    same_bits,
    seen_at,
    weights,
)
from helpers.families import make
from helpers.gradients import relative_error
from helpers.state import state
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import (
    StepNotFoundError,
    WeightEdit,
    forward_pass_shift,
    key_statistics,
)
from tl_backward.editing._step_search import smallest_step
from tl_backward.sites import attached_hook_points

PROMPT, TARGET = [3, 17, 3, 29, 8], 5
TOKENS = torch.tensor([PROMPT])


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


@pytest.fixture
def unharmed(model):
    """The model, which has to be left as it came."""
    before = state(model)
    yield model
    assert state(model) == before


# what the update is


@pytest.mark.parametrize("layer", [0, -1])
def test_the_projection_on_the_target_rises_by_the_papers_amount(unharmed, layer):
    """Section 6: by lr |x|^2 |D^T[t]|^2, at W_out's output for that input."""
    model, lr = unharmed, 0.07
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=layer, lr=lr)
    site = W_out(model, layer)
    x, D = seen_at(model, site.hook_in, TOKENS)[-1], embedding(model, TARGET)
    before = seen_at(model, site.hook_out, TOKENS)[-1]
    with edit.applied():
        after = seen_at(model, site.hook_out, TOKENS)[-1]
    expected = lr * x.dot(x) * D.dot(D)
    torch.testing.assert_close((after - before).dot(D), expected, rtol=1e-10, atol=0)
    assert list(edit.factors) == [site.name]
    torch.testing.assert_close(edit.factors[site.name].dense(), lr * torch.outer(x, D))


@NEEDS_BRIDGE
def test_the_paper_update_of_a_raw_gpt2(boot):
    """lr * outer(x_last, wte[target]) to float32 rounding, from transformers' own modules."""
    model, lr = boot("gpt2", torch.float32), 0.24
    text, target = "Lionel Messi plays for the city of", " Paris"
    hf, seen = copy.deepcopy(model.original_model), []
    hf.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    hf(torch.tensor([ids]))
    (token,) = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    expected = lr * torch.outer(seen[0][0, -1], hf.transformer.wte.weight[token]).detach()

    edit = forward_pass_shift(model, text, target, layer=1, lr=lr, prepend_bos=False)
    got = edit.factors["blocks.1.mlp.W_out"].dense()
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(got.dtype).eps, atol=0)
    weight = hf.transformer.h[1].mlp.c_proj._original_component.weight
    weight.data += expected
    with edit.applied(), torch.no_grad():
        (site,) = tlb.weight_sites(model, "W_out", 1)
        torch.testing.assert_close(site.parameter.detach(), weight.detach())
        torch.testing.assert_close(model(torch.tensor([ids])), hf(torch.tensor([ids])).logits)


def test_any_position(model):
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.5, position=2)
    x = seen_at(model, W_out(model, 1).hook_in, TOKENS)
    expected = 0.5 * torch.outer(x[2], embedding(model, TARGET))
    torch.testing.assert_close(edit.factors["blocks.1.mlp.W_out"].dense(), expected)
    assert torch.equal(
        forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.5, position=-3)
        .factors["blocks.1.mlp.W_out"]
        .dense(),
        edit.factors["blocks.1.mlp.W_out"].dense(),
    )


def test_several_prompts_and_layers_give_one_term_each(unharmed):
    """Prompts of different lengths, a target and a position for each, from the same pass."""
    model = unharmed
    prompts, targets, positions = [PROMPT, [1, 2, 3], [9, 4]], [TARGET, 7, 11], [-1, 1, 0]
    edit = forward_pass_shift(
        model, prompts, targets, layer=[0, -1], lr=0.2, position=positions, skip_if_predicted=False
    )
    last = model.cfg.n_layers - 1
    assert edit.report.layers == (0, last) and edit.report.skipped == (False,) * 3
    assert list(edit.factors) == [f"blocks.{layer}.mlp.W_out" for layer in (0, last)]
    for site in (W_out(model, 0), W_out(model, last)):
        expected = sum(
            0.2 * torch.outer(seen_at(model, site.hook_in, ids)[at], embedding(model, target))
            for ids, target, at in zip(prompts, targets, positions, strict=True)
        )
        g = edit.factors[site.name]
        assert len(g.inputs) == 3
        torch.testing.assert_close(g.dense(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_targets_of_several_tokens(model, tokens):
    """The first, or all of them where they are predicted once the target is appended."""
    edit = forward_pass_shift(model, [1, 2, 3], [7, 9, 4], layer=1, lr=0.2, tokens=tokens)
    x = seen_at(model, W_out(model, 1).hook_in, [1, 2, 3, 7, 9])
    terms = [(2, 7), (3, 9), (4, 4)] if tokens == "all" else [(2, 7)]
    expected = sum(0.2 * torch.outer(x[at], embedding(model, token)) for at, token in terms)
    g = edit.factors["blocks.1.mlp.W_out"]
    assert len(g.inputs) == len(terms)
    torch.testing.assert_close(g.dense(), expected)


def test_added_to_an_edit_of_other_weights(model):
    shift = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.1)
    other = random_edit(model, "embed.W_E") + random_edit(model, "blocks.0.attn.W_O")
    with shift.applied(), other.applied():
        expected = logits(model)
    for both in (shift + other, other + shift):
        torch.testing.assert_close(applied_logits(both), expected)


def test_iterated_updates(model):
    """Every update is taken with those before it in place; x of the upper layer has moved."""
    options = {"layer": [0, 1], "lr": 0.02, "skip_if_predicted": False}
    edit = forward_pass_shift(model, PROMPT, TARGET, iterations=3, **options)
    expected = WeightEdit(model, {})
    for _ in range(3):
        with expected.applied():
            step = forward_pass_shift(model, PROMPT, TARGET, **options)
        expected = expected + step
    assert edit.report.n_passes == 3
    for name, g in expected.factors.items():
        torch.testing.assert_close(edit.factors[name].dense(), g.dense())
    upper = edit.factors["blocks.1.mlp.W_out"].inputs
    assert relative_error(upper[0], upper[2]) > 1e-3


def test_iterations_end_when_the_target_is_predicted(model):
    options = {"layer": -1, "lr": "auto", "margin": 0.0}
    lr = forward_pass_shift(model, PROMPT, TARGET, **options).report.lr
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=-1, lr=lr / 2.5, iterations=9)
    assert edit.report.n_passes == 4  # after three updates the fourth pass finds it predicted
    assert applied_logits(edit, TOKENS)[0, -1].argmax() == TARGET


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "phi3", "falcon", "llama_tied"])
@NEEDS_BRIDGE
def test_other_families(tokenizer, family):
    """Post-norms (the shift acts before them), fused gates, parallel blocks, tied embeddings."""

    model = make(family, tokenizer)
    model(TOKENS)
    site = W_out(model, 1)
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.03)
    x, D = seen_at(model, site.hook_in, TOKENS)[-1], embedding(model, TARGET)
    before = seen_at(model, site.hook_out, TOKENS)[-1]
    with edit.applied():
        after = seen_at(model, site.hook_out, TOKENS)[-1]
    torch.testing.assert_close(after - before, 0.03 * x.dot(x) * D)


@NEEDS_BRIDGE
def test_half_precision(boot):
    model = boot("llama", torch.bfloat16)
    before = weights(model)
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr="auto", margin=1.0)
    assert applied_logits(edit, TOKENS)[0, -1].argmax() == TARGET
    assert same_bits(weights(model), before)


# what is run


class Counter:
    """Counts the rows that go through each block."""

    def __init__(self, model):
        self.rows = [0] * model.cfg.n_layers
        self._handles = [
            model.hook_dict[f"blocks.{layer}.hook_resid_pre"].register_forward_hook(
                self._count(layer)
            )
            for layer in range(model.cfg.n_layers)
        ]

    def _count(self, layer):
        def count(module, args, output):
            self.rows[layer] += len(output)

        return count

    def __enter__(self):
        return self.rows

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
def test_one_pass_that_stops_behind_the_layer(model, layer, monkeypatch):
    """l + 1 of L blocks, no unembedding, and nothing of autograd's backward pass."""

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    unembedded = []
    handle = model.unembed.register_forward_pre_hook(lambda *args: unembedded.append(args))
    with Counter(model) as rows:
        edit = forward_pass_shift(
            model, PROMPT, TARGET, layer=layer, lr=0.1, skip_if_predicted=False
        )
    handle.remove()
    assert not unembedded
    assert rows == [1] * (layer + 1) + [0] * (model.cfg.n_layers - layer - 1)
    assert edit.report.n_passes == 1 and edit.report.n_upper_passes == 0
    assert not edit.factors[W_out(model, layer).name].inputs.requires_grad


def test_the_search_for_a_step_runs_the_upper_layers_only(models):
    model = models(MODELS[0])
    with Counter(model) as rows:
        edit = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr="auto")
    assert rows[0] == 1 and min(rows[1:]) == max(rows[1:]) > 20
    assert edit.report.n_passes == 1 and edit.report.n_upper_passes >= 3


def test_where_the_upper_layers_need_more_all_are_run(models, monkeypatch):
    """Such as a layer that looks back at an earlier one: here, a hook that asks if that one ran."""
    model = models(MODELS[0])
    expected = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr="auto")
    ran: list[bool] = []
    handles = [
        model.blocks[0].register_forward_pre_hook(lambda *_: ran.clear()),
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_: ran.append(True)),
        model.blocks[1].register_forward_hook(
            lambda block, x, y: y + torch.linspace(-1, 1, y.shape[-1]).to(y) if ran else y
        ),
    ]
    try:
        edit = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr="auto")
        hooked = gap(applied_logits(edit, TOKENS)[0, -1], TARGET)
    finally:
        for handle in handles:
            handle.remove()
    assert edit.report.n_passes > 3 and edit.report.n_upper_passes == 1
    assert hooked == pytest.approx(edit.report.gap, abs=1e-5) and hooked >= 0.1
    assert edit.report.lr != expected.report.lr


# skipping


def test_what_is_predicted_is_skipped_and_reported(unharmed):
    model = unharmed
    predicted = int(logits(model, tokens=TOKENS)[0, -1].argmax())
    skipped = forward_pass_shift(model, PROMPT, predicted, layer=1, lr=0.1)
    assert skipped.factors == {} and skipped.report.skipped == (True,)
    assert skipped.norm() == 0 and skipped.fwd_hooks() == []
    torch.testing.assert_close(applied_logits(skipped, TOKENS), logits(model, tokens=TOKENS))
    automatic = forward_pass_shift(model, PROMPT, predicted, layer="auto", lr="auto")
    assert automatic.factors == {} and automatic.report.skipped == (True,)
    edit = forward_pass_shift(model, PROMPT, predicted, layer=1, lr=0.1, skip_if_predicted=False)
    assert len(edit.factors) == 1 and edit.report.skipped == (False,)
    both = forward_pass_shift(model, [PROMPT, PROMPT], [predicted, TARGET], layer=1, lr=0.1)
    assert both.report.skipped == (True, False)
    assert len(both.factors["blocks.1.mlp.W_out"].inputs) == 1


# the search for a step


@pytest.mark.parametrize("layer", [0, -1])
def test_automatic_step_against_a_scan_of_applied_weights(unharmed, layer):
    """Every step from a 30th of the one that was found, 2 % apart, written into the weight."""
    model = unharmed
    edit = forward_pass_shift(model, PROMPT, TARGET, layer=layer, lr="auto", margin=0.2)
    site = W_out(model, layer)
    x, D = seen_at(model, site.hook_in, TOKENS)[-1], embedding(model, TARGET)
    dense = site.to_parameter_layout(torch.outer(x, D))
    original, found = site.parameter.data.clone(), edit.report.lr
    smallest = None
    for k in range(-172, 3):
        site.parameter.data.copy_(original + found * 1.02**k * dense)
        of_last = logits(model, tokens=TOKENS)[0, -1]
        if gap(of_last, TARGET) >= 0.2:
            smallest = found * 1.02**k
            break
    site.parameter.data.copy_(original)
    assert smallest is not None and smallest / 1.0001 <= found * 1.0001
    assert found <= 1.03 * smallest
    achieved = gap(applied_logits(edit, TOKENS)[0, -1], TARGET)
    assert achieved >= 0.2 - 1e-6 and achieved == pytest.approx(edit.report.gap, abs=1e-5)
    torch.testing.assert_close(edit.factors[site.name].dense(), found * torch.outer(x, D))


@pytest.mark.parametrize("name", MODELS)
def test_automatic_step_for_several_facts_layers_and_tokens(models, name):
    """One step for all of them, in place together; each token of each target is on top."""
    pairs = {"hooked-llama": ([5, 13], 8), "hooked-gpt2": ([5, 13], 7)}  # not all can be reached
    (first, second), third = pairs.get(name, ([5, 4], 8))
    edit = forward_pass_shift(
        models(name),
        [PROMPT, [1, 2, 3]],
        [[first, second], third],
        layer=[0, 1],
        lr="auto",
        tokens="all",
    )

    def worst_gap(edit):
        of_first = applied_logits(edit, torch.tensor([[*PROMPT, first]]))[0]
        of_other = applied_logits(edit, torch.tensor([[1, 2, 3]]))[0]
        return min(gap(of_first[-2], first), gap(of_first[-1], second), gap(of_other[-1], third))

    assert edit.report.skipped == (False, False)
    assert worst_gap(edit) == pytest.approx(edit.report.gap, abs=1e-5)
    assert worst_gap(edit) >= 0.1 - 1e-6 and worst_gap(0.95 * edit) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_each_token_of_a_target_has_a_step_of_its_own(models, name):
    """By applied weights: all come out on top, by less than one step for all would need.

    Two tokens: in these models the inputs at neighbouring places have cosines of 0.95 and more, and
    whatever one edit adds at one of them it adds at the other.
    """
    model, target, margin = models(name), [16, 3], 0.02
    edit = forward_pass_shift(
        model, PROMPT, target, layer=1, lr="auto", tokens="all", margin=margin
    )
    site, text = W_out(model, 1), [*PROMPT, *target[:-1]]
    x = seen_at(model, site.hook_in, text)[-len(target) :]
    terms = [torch.outer(row, embedding(model, t)) for row, t in zip(x, target, strict=True)]
    original = site.parameter.data.clone()

    def update(sizes):
        return sum(size * term for size, term in zip(sizes, terms, strict=True))

    def gaps(sizes):
        site.parameter.data.copy_(original + site.to_parameter_layout(update(sizes)))
        of_each = logits(model, tokens=torch.tensor([text]))[0, -len(target) :]
        site.parameter.data.copy_(original)
        return [gap(one, t) for one, t in zip(of_each, target, strict=True)]

    lrs = edit.report.lrs
    torch.testing.assert_close(edit.factors[site.name].dense(), update(lrs))
    assert len(set(lrs)) > 1 and edit.report.lr == max(lrs)
    assert min(gaps(lrs)) == pytest.approx(edit.report.gap, abs=1e-5) and edit.report.gap >= margin
    assert lrs[-1] == 0 or gaps([*lrs[:-1], 0.97 * lrs[-1]])[-1] < margin  # the last one searched
    for k in range(-200, 100):
        common = [lrs[0] * 1.02**k] * len(target)
        if update(common).norm() < edit.norm():
            assert min(gaps(common)) < margin


def test_a_target_that_is_there_already_needs_no_step(model):
    text = torch.tensor([[*PROMPT]])
    first = int(logits(model, tokens=text)[0, -1].argmax())
    second = int(logits(model, tokens=torch.tensor([[*PROMPT, first]]))[0, -1].argmax())
    edit = forward_pass_shift(
        model,
        PROMPT,
        [first, second],
        layer=1,
        lr="auto",
        tokens="all",
        margin=0.0,
        skip_if_predicted=False,
    )
    assert edit.report.lr == 0 and edit.norm() == 0


def test_what_is_skipped_stays_predicted(model):
    """A predicted fact beside one that is shifted does not limit the margin, but stays on top."""
    predicted = int(logits(model, tokens=torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    options = {"layer": -1, "lr": "auto", "margin": 0.05}
    edit = forward_pass_shift(model, [PROMPT, [1, 2, 3]], [TARGET, predicted], **options)
    assert edit.report.skipped == (False, True)
    assert gap(applied_logits(edit, TOKENS)[0, -1], TARGET) >= 0.05 - 1e-6
    assert applied_logits(edit, torch.tensor([[1, 2, 3]]))[0, -1].argmax() == predicted


@NEEDS_BRIDGE
def test_a_search_that_cannot_succeed_reports_the_best(boot):
    """The target's embedding is half of another token's, which is ahead whenever it is not."""
    model = boot("llama")
    W_U = tlb.weight_sites(model, "W_U")[0].parameter.data
    W_U[TARGET] = 0.5 * W_U[9]
    model(TOKENS)
    before = state(model)
    for options in ({"layer": 1}, {"layer": "auto"}, {"layer": [0, 2]}):
        with pytest.raises(ValueError, match=r"lr, layer: no edit .* the best, lr=") as raised:
            forward_pass_shift(model, PROMPT, TARGET, lr="auto", **options)
        assert state(model) == before
        assert isinstance(raised.value, StepNotFoundError)
        best = raised.value.best
        achieved = gap(applied_logits(best, TOKENS)[0, -1], TARGET)
        assert achieved == pytest.approx(best.report.gap, abs=1e-5) and achieved < 0.1
        assert achieved > gap(applied_logits(0.01 * best, TOKENS)[0, -1], TARGET) - 1e-9


@pytest.mark.parametrize(
    ("succeeds", "expected"),
    [
        (lambda s: s >= 3.3, 3.3),
        (lambda s: s >= 5e-5, 5e-5),
        (lambda s: s >= 500, 500),
        (lambda s: 0.9 <= s <= 2.1, 0.9),
        (lambda s: s >= 0.02 and not 0.5 < s < 4, 0.02),
    ],
)
def test_smallest_step(succeeds, expected):
    step = smallest_step(lambda sizes: [1.0 if succeeds(s) else -1.0 for s in sizes], 1.0, 0.5)
    assert step.gap == 1.0 and expected <= step.size <= 1.02 * expected


def test_smallest_step_between_powers_of_two():
    """A peak at 11 that reaches the margin from 10.4 to 11.6 only."""
    step = smallest_step(lambda sizes: [1.1 - abs(s - 11) for s in sizes], 1.0, 0.5)
    assert 10.4 <= step.size <= 1.02 * 10.4 and step.gap >= 0.5


def test_smallest_step_that_is_not_there():
    """The best is reported, and no step is tried that is much too large."""
    tried = []

    def gaps(sizes):
        tried.extend(sizes)
        return [-abs(s - 11) for s in sizes]

    step = smallest_step(gaps, 1.0, 0.5)
    assert abs(step.size - 11) < 0.2 and step.gap == -abs(step.size - 11)
    assert max(tried) == 512


# the search for a layer


def kl_elsewhere(model, edit, texts):
    """Mean KL(before || after) at some positions of some texts, with applied weights."""
    changes = []
    for ids, positions in texts:
        tokens = torch.tensor([ids])
        before = logits(model, tokens=tokens)[0, positions].log_softmax(-1)
        after = applied_logits(edit, tokens)[0, positions].log_softmax(-1)
        changes.append((before.exp() * (before - after)).sum(-1))
    return float(torch.cat(changes).mean())


@pytest.mark.parametrize("texts", [None, [[9, 8, 7, 6], [2, 1]]])
@pytest.mark.parametrize("lr", ["auto", 3.0])
def test_the_layer_that_changes_least_elsewhere(unharmed, texts, lr):
    """Of those that succeed, against applied weights in every layer."""
    model, prompts, targets = unharmed, [PROMPT, [1, 2, 3]], [TARGET, 7]
    options = {"lr": lr, "tokens": "first", "margin": 0.05}
    looked_at = (
        [(PROMPT, [0, 1, 2, 3]), ([1, 2, 3], [0, 1])]
        if texts is None
        else [(ids, list(range(len(ids)))) for ids in texts]
    )
    changes = {}
    for layer in range(model.cfg.n_layers):
        try:
            edit = forward_pass_shift(model, prompts, targets, layer=layer, **options)
        except StepNotFoundError:
            continue
        with edit.applied():
            last = [logits(model, tokens=torch.tensor([ids]))[0, -1] for ids in prompts]
        if min(gap(one, t) for one, t in zip(last, targets, strict=True)) >= 0.05 - 1e-6:
            changes[layer] = kl_elsewhere(model, edit, looked_at)
    if not changes:
        with pytest.raises(StepNotFoundError):
            forward_pass_shift(model, prompts, targets, layer="auto", texts=texts, **options)
        return
    edit = forward_pass_shift(model, prompts, targets, layer="auto", texts=texts, **options)
    assert edit.report.layers == (min(changes, key=changes.__getitem__),)
    assert edit.report.changes.keys() == changes.keys()
    for layer, (_, change) in edit.report.changes.items():
        assert change == pytest.approx(changes[layer], rel=1e-3)
    assert list(edit.factors) == [f"blocks.{edit.report.layers[0]}.mlp.W_out"]


def test_a_prompt_of_one_token_needs_other_texts(model):
    with pytest.raises(
        ValueError, match=r'texts: every position .* layer="auto" needs other texts'
    ):
        forward_pass_shift(model, [3], TARGET, layer="auto", lr="auto")
    assert forward_pass_shift(
        model, [3], TARGET, layer="auto", lr="auto", texts=[[1, 2, 3, 4]]
    ).factors


# the whitened key


def test_the_whitened_key_changes_this_input_as_much_and_others_less(unharmed):
    model, lr = unharmed, 0.05
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 30, (40, 7), generator=generator).tolist()
    statistics = key_statistics(model, texts, layer=1)
    plain = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=lr)
    whitened = forward_pass_shift(
        model, PROMPT, TARGET, layer=1, lr=lr, key="whitened", statistics=statistics
    )
    site, D = W_out(model, 1), embedding(model, TARGET)
    before = seen_at(model, site.hook_out, TOKENS)[-1]
    x = seen_at(model, site.hook_in, TOKENS)[-1]
    for edit in (plain, whitened):
        with edit.applied():
            after = seen_at(model, site.hook_out, TOKENS)[-1]
        torch.testing.assert_close(after - before, lr * x.dot(x) * D, rtol=1e-9, atol=1e-9)
    others = torch.cat([seen_at(model, site.hook_in, ids) for ids in texts])
    moved = [
        float(((others @ edit.factors[site.name].inputs.mT) ** 2).mean())
        for edit in (plain, whitened)
    ]
    assert moved[1] < 0.7 * moved[0]


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 99}, "layers=99: this model has layers 0 to"),
        ({"layer": []}, r"layers=\[\]: this model has layers"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"lr": True}, "lr must be a finite number"),
        ({"position": 5}, "position=5: prompt 0 has positions 0 to 4"),
        ({"position": [-1, 0]}, "position holds 2 positions, but there are 1 prompts"),
        ({"position": 1, "tokens": "all"}, "position: tokens='all' uses"),
        ({"tokens": "last"}, "tokens must be 'first' or 'all', got 'last'"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1"),
        ({"iterations": 2, "lr": "auto"}, r'iterations: a search \("auto"\) makes one'),
        ({"key": "plain"}, "key must be 'input' or 'whitened'"),
        ({"key": "whitened"}, "statistics: key='whitened' needs them"),
        ({"margin": -1.0, "lr": "auto"}, "margin must be a finite number of at least 0"),
        ({"margin": math.nan, "lr": "auto"}, "margin must be a finite number"),
        ({"texts": ["a"]}, 'texts are only for layer="auto"'),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": list(range(1, 30)) * 5}, "more than the model's context"),
        ({"target": []}, "target is empty"),
        ({"target": 10**6}, "target holds token ids outside the vocabulary"),
        ({"prompt": [PROMPT, PROMPT], "target": [[1], [2], [3]]}, "target holds 3 targets"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(models, options, message):
    model = models(MODELS[0])
    before = state(model)
    arguments = {"prompt": PROMPT, "target": TARGET, "layer": 1, "lr": 0.1} | options
    with pytest.raises(ValueError, match=message):
        forward_pass_shift(model, **arguments)
    assert state(model) == before


def test_bad_models():
    with pytest.raises(TypeError, match="model must be a TransformerLens"):
        forward_pass_shift(torch.nn.Linear(2, 2), PROMPT, TARGET, layer=0, lr=0.1)


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("opt_post_norm", "writes vectors of width 28, but W_U reads width 18"),
    ],
)
def test_out_of_scope(tokenizer, family, message):

    model = make(family, tokenizer)
    with pytest.raises(NotImplementedError, match=message):
        forward_pass_shift(model, PROMPT, TARGET, layer=0, lr=0.1)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("lr", [0.1, "auto"])
def test_a_hook_that_raises(unharmed, error, lr):
    """Also in the middle of the runs of the upper layers."""
    model, calls = unharmed, []

    def fail(tensor, hook):
        calls.append(hook.name)
        if len(calls) > (lr == "auto"):
            raise error

    with attached_hook_points(model), model.hooks(fwd_hooks=[("blocks.1.mlp.out.hook_in", fail)]):
        inside = state(model)
        with pytest.raises(error):
            forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=lr)
        assert state(model) == inside


def test_hooks_on_the_model_take_part(model):
    """The shift of a patched model."""
    site = W_out(model, 1)

    def patch(x, hook):
        return 2 * x

    with attached_hook_points(model), model.hooks(fwd_hooks=[(site.hook_in, patch)]):
        got = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.1)
    plain = forward_pass_shift(model, PROMPT, TARGET, layer=1, lr=0.1)
    torch.testing.assert_close(got.factors[site.name].dense(), 2 * plain.factors[site.name].dense())


def test_hooks_on_the_logits_see_all_positions(model):
    """A search unembeds only what it looks at, but not where a hook looks on."""

    def lift(logits, hook):
        assert logits.shape[1] == len(PROMPT)
        logits[:, -1, 9] += 5
        return logits

    options = {"layer": -1, "lr": "auto"}
    plain = forward_pass_shift(model, PROMPT, TARGET, **options)
    with attached_hook_points(model), model.hooks(fwd_hooks=[("unembed.hook_out", lift)]):
        edit = forward_pass_shift(model, PROMPT, TARGET, **options)
        of_last = applied_logits(edit, TOKENS)[0, -1]
    assert gap(of_last, TARGET) == pytest.approx(edit.report.gap, abs=1e-5)
    assert edit.report.gap >= 0.1 and edit.report.lr > plain.report.lr
