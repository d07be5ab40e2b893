"""Gradient steps in factored form, and fine-tuning with them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.edits import applied_logits, embedding, gap, logits, same_bits, seen_at, weights
from helpers.gradients import reference_loss
from helpers.state import state
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import fine_tune, gradient_step
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


def capture(model, prompt=PROMPT, target=TARGET, **options):
    return tlb.run_with_backward_cache(model, prompt, target, **options)[1]


def test_it_is_a_step_against_autograds_gradient(unharmed):
    """Of every weight at once, tied ones included; the loss falls."""
    model, lr = unharmed, 1e-3
    sites = tlb.weight_sites(model)
    edit = gradient_step(capture(model), lr=lr, model=model)
    assert list(edit.factors) == [site.name for site in sites]
    loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(loss, [site.parameter for site in sites])
    before = [site.parameter.detach().clone() for site in sites]
    with edit.applied():
        for site, gradient, original in zip(sites, gradients, before, strict=True):
            torch.testing.assert_close(site.parameter.detach(), original - lr * gradient)
        assert reference_loss(model, TOKENS, TARGET) < loss


def test_weights_and_layers_are_chosen_as_in_the_capture(model):
    cache = capture(model)
    edit = gradient_step(cache, lr=0.1, weights=("W_in", "W_out"), layers=[0, -1])
    last = model.cfg.n_layers - 1
    names = [f"blocks.{layer}.mlp.{kind}" for layer in (0, last) for kind in ("W_in", "W_out")]
    assert list(edit.factors) == names
    for name in names:
        torch.testing.assert_close(edit.factors[name].dense(), -0.1 * cache[name].dense())
    assert edit.model is None and edit.bind(model).norm() > 0
    assert list(gradient_step(cache, lr=0.1, weights="W_U").factors) == ["unembed.W_U"]


@pytest.mark.parametrize("weights", ["W_in", "W_out"])
def test_the_factors_are_read_with_their_raw_sign(model, weights):
    """The learning rate is on the side that the lens does not read; no VJP is negated."""
    cache = capture(model)
    vectors, _ = gradient_step(cache, lr=0.1, weights=weights, layers=1).residual_vectors()
    g = cache[weights, 1]
    assert torch.equal(vectors, g.inputs if weights == "W_in" else g.vjps)


def test_equation_17(unharmed):
    """A step on one token's gradient of W_in changes each pre-activation by -lr |x|^2 delta[j]."""
    model, lr = unharmed, 0.05
    g = capture(model, weights="W_in", layers=1, positions=-1)["W_in", 1]
    (site,) = tlb.weight_sites(model, "W_in", 1)
    edit = gradient_step(capture(model, positions=-1), lr=lr, weights="W_in", layers=1, model=model)
    before = seen_at(model, site.hook_out, TOKENS)[-1]
    with edit.applied():
        after = seen_at(model, site.hook_out, TOKENS)[-1]
    (x,), (delta,) = g.inputs, g.vjps
    torch.testing.assert_close(after - before, -lr * x.dot(x) * delta, rtol=1e-8, atol=1e-12)


def test_equation_18(unharmed):
    """... of W_out, what neuron j adds to the output by -lr x[j]^2 delta."""
    model, lr = unharmed, 0.05
    g = capture(model, weights="W_out", layers=1, positions=-1)["W_out", 1]
    (site,) = tlb.weight_sites(model, "W_out", 1)
    edit = gradient_step(
        capture(model, positions=-1), lr=lr, weights="W_out", layers=1, model=model
    )
    (x,), (delta,) = g.inputs, g.vjps
    x = seen_at(model, site.hook_in, TOKENS)[-1]
    for j in (0, 7, 21):

        def only_j(tensor, hook, j=j):
            alone = torch.zeros_like(tensor)
            alone[..., j] = tensor[..., j]
            return alone

        before = seen_at(model, site.hook_out, TOKENS, [(site.hook_in, only_j)])[-1]
        with edit.applied():
            after = seen_at(model, site.hook_out, TOKENS, [(site.hook_in, only_j)])[-1]
        torch.testing.assert_close(after - before, -lr * x[j] ** 2 * delta, rtol=1e-7, atol=1e-12)


def test_several_prompts_add_up(model):
    cache = capture(model, [PROMPT, [1, 2, 3]], [TARGET, 7])
    edit = gradient_step(cache, lr=0.1, weights="W_out", model=model)
    both = gradient_step(capture(model), lr=0.1, weights="W_out", model=model)
    both = both + gradient_step(capture(model, [1, 2, 3], 7), lr=0.1, weights="W_out", model=model)
    for name, g in both.factors.items():
        torch.testing.assert_close(edit.factors[name].dense(), g.dense(), rtol=1e-5, atol=1e-8)


# fine-tuning


@NEEDS_BRIDGE
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [[TARGET], [TARGET, 6]])
def test_fine_tuning_against_torchs_sgd(boot, kind, tokens):
    """A copy of transformers' own model, trained on the same weights until it says the target."""
    model, lr = boot(kind), 0.01 * len(tokens) ** 2
    hf = copy.deepcopy(model.original_model)
    names = {
        "gpt2": ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"],
        "llama": ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
    }[kind]
    trained = [next(hf.get_submodule(name).parameters()) for name in names]
    optimizer = torch.optim.SGD(trained, lr=lr)
    text = torch.tensor([[*PROMPT, *tokens[:-1]]])
    losses = []
    while True:
        log_probs = hf(text).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
        loss = -log_probs[range(len(tokens)), tokens].mean()
        losses.append(loss.item())
        if log_probs.argmax(-1).tolist() == tokens:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = weights(model)
    options = {"weights": ("W_in", "W_out"), "layers": 1, "lr": lr, "max_steps": 200}
    edit = fine_tune(model, PROMPT, tokens, **options)
    assert same_bits(weights(model), before)
    assert edit.report.n_steps == len(losses) - 1 > 1 and edit.report.predicted == (True,)
    torch.testing.assert_close(torch.tensor(edit.report.losses[0]), torch.tensor(losses))
    with edit.applied():
        for site, weight in zip(
            tlb.weight_sites(model, ("W_in", "W_out"), 1), trained, strict=True
        ):
            torch.testing.assert_close(site.parameter.detach(), weight.detach())


@pytest.mark.parametrize("weights", ["W_in", "W_out"])
def test_imprint_and_shift_alone(unharmed, weights):
    """The whole of one kind of weight of one layer, until the target is predicted."""
    edit = fine_tune(unharmed, PROMPT, TARGET, weights=weights, layers=1, lr=0.2, max_steps=60)
    assert edit.report.predicted == (True,)
    assert {name.rpartition(".")[2] for name in edit.factors} == {weights}
    assert applied_logits(edit, TOKENS)[0, -1].argmax() == TARGET
    losses = edit.report.losses[0]
    assert len(losses) == edit.report.n_steps + 1 and losses[-1] < losses[0]


def test_several_prompts_until_all_are_predicted(unharmed):
    prompts, targets = [PROMPT, [1, 2, 3]], [TARGET, 7]
    edit = fine_tune(unharmed, prompts, targets, weights=None, layers=[0, 1], lr=0.02)
    assert edit.report.predicted == (True, True) and len(edit.report.losses) == 2
    for ids, target in zip(prompts, targets, strict=True):
        of_last = applied_logits(edit, torch.tensor([ids]))[0, -1]
        assert gap(of_last, target) > 0


def test_it_stops_after_so_many_steps(model):
    edit = fine_tune(model, PROMPT, TARGET, layers=1, lr=1e-6, max_steps=2)
    assert edit.report.n_steps == 2 and edit.report.predicted == (False,)
    assert len(edit.factors["blocks.1.mlp.W_out"].inputs) == 2 * len(PROMPT)


def test_nothing_to_do(model):
    predicted = int(logits(model, tokens=TOKENS)[0, -1].argmax())
    edit = fine_tune(model, PROMPT, predicted, layers=1, lr=0.1)
    assert edit.factors == {} and edit.report.n_steps == 0 and edit.report.predicted == (True,)


def test_a_step_on_the_last_layers_W_out_is_close_to_a_shift(model):
    """Lemma 5.1: its VJP is dominated by the target's embedding, with the opposite sign."""
    cache = capture(model, weights="W_out", layers=-1)
    (delta,) = cache["W_out", -1 % model.cfg.n_layers].vjps[-1:]
    assert torch.cosine_similarity(-delta, embedding(model, TARGET), dim=0) > 0.3


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"weights": "W_gates"}, r"weights='W_gates': the cache has W_in, W_out"),
        ({"weights": "W_Q"}, r"weights='W_Q': the cache has W_in, W_out"),
        ({"weights": []}, r"weights=\[\]: the cache has W_in, W_out"),
        ({"layers": 7}, r"layers=\[7\]: the cache has 0, 1"),
        ({"layers": []}, r"layers=\[\]: the cache has 0, 1"),
    ],
)
def test_bad_input(models, options, message):
    cache = capture(models(MODELS[0]), weights=("W_in", "W_out"), layers=[0, 1])
    with pytest.raises(ValueError, match=message):
        gradient_step(cache, **({"lr": 0.1} | options))


def test_bad_input_of_fine_tuning(models):
    model = models(MODELS[0])
    before = state(model)
    for options, message in (
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"weights": "W_gates"}, "weights='W_gates': this model has"),
        ({"layers": 99}, "layers=99: this model has"),
    ):
        with pytest.raises(ValueError, match=message):
            fine_tune(model, PROMPT, TARGET, **({"lr": 0.1} | options))
    assert state(model) == before


def test_a_cache_of_another_model(models):
    cache = capture(models(MODELS[0]))
    with pytest.raises(ValueError, match="factors: "):
        gradient_step(cache, lr=0.1, model=models(MODELS[1]))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_interrupted(unharmed, error):
    """In the second step."""
    calls = []

    def fail(tensor, hook):
        calls.append(hook)
        if len(calls) == 2:
            raise error

    with (
        attached_hook_points(unharmed),
        unharmed.hooks(fwd_hooks=[("blocks.1.mlp.out.hook_in", fail)]),
        pytest.raises(error),
    ):
        fine_tune(unharmed, PROMPT, TARGET, layers=1, lr=1e-6)
    assert len(calls) == 2
