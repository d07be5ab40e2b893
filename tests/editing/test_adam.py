"""Adam on one W_out, against PyTorch's own training of that weight."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import applied_logits, hooked_logits, same_bits, weights
from helpers.gradients import relative_error
from helpers.state import state
from helpers.versions import MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import adam_fine_tune

PROMPTS, TARGETS = [[3, 17, 3, 29, 8], [1, 2, 3]], [[5], [21, 9]]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def trained_weight(model, parameter, lr, steps, bound):
    """The weight after so many steps on both prompts, one at a time; it is put back."""
    original = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=lr)
    for _ in range(steps):
        loss = torch.zeros(())
        for prompt, target in zip(PROMPTS, TARGETS, strict=True):
            logits = model(torch.tensor([prompt + target[:-1]]))[0, len(prompt) - 1 :]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        (parameter.grad,) = torch.autograd.grad(loss, parameter)
        adam.step()
        if bound is not None:
            parameter.data = original + (parameter.data - original).clamp(-bound, bound)
    parameter.grad = None
    change = parameter.detach() - original
    parameter.data.copy_(original)
    return change


@pytest.mark.parametrize("bound", [None, 2e-3])
def test_against_training_the_weight_itself(model, bound):
    (site,) = tlb.weight_sites(model, "W_out", 1)
    before, bits = state(model), weights(model)
    edit = adam_fine_tune(model, PROMPTS, TARGETS, layer=1, lr=1e-3, steps=4, bound=bound)
    assert state(model) == before and same_bits(bits, weights(model))
    change = site.to_parameter_layout(edit.factors[site.name].dense())
    torch.testing.assert_close(hooked_logits(edit), applied_logits(edit), rtol=1e-9, atol=1e-9)
    if not site.parameter.is_leaf:
        pytest.skip("this weight is a view of a parameter, which an optimizer does not take")
    expected = trained_weight(model, site.parameter, 1e-3, 4, bound)
    assert relative_error(change, expected) <= 1e-6
    if bound is not None:
        assert float(change.abs().max()) == pytest.approx(bound)


def test_it_ends_when_the_loss_is_small_and_reports_what_it_reached(model, monkeypatch):
    """Small is set to what the norms of a random model let it reach."""

    def mean_losses(report):
        return [sum(each) / 2 for each in zip(*report.losses, strict=True)]

    options = {"layer": -1, "lr": 0.01, "steps": 8}
    whole = mean_losses(adam_fine_tune(model, PROMPTS, TARGETS, **options).report)
    assert len(whole) == 9 and whole == sorted(whole, reverse=True)
    monkeypatch.setattr("tl_backward.editing.adam.ENOUGH", (whole[4] + whole[5]) / 2)
    edit = adam_fine_tune(model, PROMPTS, TARGETS, **options)
    assert mean_losses(edit.report) == pytest.approx(whole[:6])
    assert edit.report.n_steps == 5
    with edit.applied(), torch.no_grad():
        last = model(torch.tensor([PROMPTS[0]]))[0, -1]
    nll = -float(last.log_softmax(-1)[TARGETS[0][0]])
    assert edit.report.losses[0][-1] == pytest.approx(nll, rel=1e-6)
    assert edit.report.predicted[0] == (int(last.argmax()) == TARGETS[0][0])


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive"),
        ({"lr": "auto"}, "lr must be a positive finite number, got 'auto'"),
        ({"steps": True}, "steps must be"),
        ({"steps": 0}, "steps must be"),
        ({"bound": 0.0}, "bound must be"),
        ({"layer": 7}, "layers 0 to 2"),
        ({"lr": 1e308}, "the loss is .* after 1 steps"),
    ],
)
def test_bad_input(boot, unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        adam_fine_tune(boot("gpt2"), PROMPTS, TARGETS, **{"layer": 1} | options)
