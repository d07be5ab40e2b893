"""MEND: the published gradient transform, and an editor that is trained without a copy."""

from __future__ import annotations

import pytest
import torch
from helpers.edits import applied_logits, hooked_logits, name_of, same_bits, weights
from helpers.gradients import relative_error
from helpers.published_updates import UPDATES
from helpers.state import state
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.editing import MendEditor
from tl_backward.editing._mend_training import _drawn, _example, _losses
from tl_backward.editing._mend_transform import GradientTransform, MendNetworks
from tl_backward.evaluation.records import Record

D_IN, D_OUT = 12, 7
NAMES = {"mode_scale.weight": "scale", "mode_shift.weight": "shift"}


def stored(key):
    return UPDATES[f"mend.unit.{key}"]


def kept(x, delta):
    """Without the rows of zeros, which the editor leaves out before the transform."""
    x, delta = x.reshape(-1, D_IN), delta.reshape(-1, D_OUT)
    both = (x != 0).any(1) & (delta != 0).any(1)
    return x[both], delta[both]


def published_transform(configuration, rank):
    """The transform with the stored parameters, and the statistics of the stored batches."""
    transform = GradientTransform(D_IN, D_OUT, 2, rank, torch.Generator()).double()
    parameters = dict(transform.named_parameters())
    prefix = f"mend.unit.{configuration}.param.mlp."
    found = {key.removeprefix(prefix): p for key, p in UPDATES.items() if key.startswith(prefix)}
    for key, value in found.items():
        layer, _, name = key.removeprefix("layers.").partition(".")
        parameters.pop(f"layers.{layer}.{NAMES.get(name, name)}").data.copy_(value)
    assert not parameters
    for i in range(3):
        transform.observe(*kept(stored(f"stat{i}.x"), stored(f"stat{i}.delta")))
    return transform


@pytest.mark.parametrize(("configuration", "rank"), [("default", 1920), ("rank4", 4)])
@pytest.mark.parametrize("weight", [0, 1])
def test_the_published_transform(configuration, rank, weight):
    transform = published_transform(configuration, rank)
    assert int(transform.n_rows) == int(stored(f"{configuration}.buf.k"))
    x, delta = kept(stored("x"), stored("delta"))
    new_x, new_delta = transform(x, delta, weight)
    expected = f"{configuration}.mode{weight}"
    assert relative_error(new_x, stored(f"{expected}.x_tilde")) <= 1e-9
    assert relative_error(new_delta, stored(f"{expected}.delta_tilde")) <= 1e-9
    assert relative_error(new_x.mT @ new_delta, stored(f"{expected}.grad_conv1d")) <= 1e-9


def test_the_published_running_statistics():
    transform = published_transform("rank4", 4)
    mean = torch.cat([stored("rank4.buf.u_mean"), stored("rank4.buf.v_mean")])
    squares = torch.cat([stored("rank4.buf.u_s"), stored("rank4.buf.v_s")])
    torch.testing.assert_close(transform.mean, mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(transform.sum_of_squares, squares, rtol=1e-9, atol=0)


def test_the_published_gradients_at_the_start():
    """u and the biases learn from the first step on: the clamp's gradient at 0 is 1."""
    transform = published_transform("grad_at_identity", 4)
    new_x, new_delta = transform(*kept(stored("x"), stored("delta")), 1)
    loss = (new_x.mT @ new_delta * stored("grad_at_identity.T")).sum()
    assert relative_error(loss, stored("grad_at_identity.loss")[0]) <= 1e-9
    loss.backward()
    for i, layer in enumerate(transform.layers):
        expected = f"grad_at_identity.grad.mlp.layers.{i}"
        for name in ("u", "v", "bias"):
            gradient = getattr(layer, name).grad
            torch.testing.assert_close(gradient, stored(f"{expected}.{name}"), rtol=1e-9, atol=1e-9)
        for name, own in NAMES.items():
            gradient = getattr(layer, own).grad
            torch.testing.assert_close(gradient, stored(f"{expected}.{name}"), rtol=1e-9, atol=1e-9)
        assert layer.u.grad.norm() > 0


def test_too_few_rows_to_normalise_by():
    transform = GradientTransform(D_IN, D_OUT, 1, 3, torch.Generator())
    transform.observe(torch.ones(1, D_IN), torch.ones(1, D_OUT))
    with pytest.raises(ValueError, match="only 1 rows"):
        transform(torch.ones(1, D_IN), torch.ones(1, D_OUT), 0)


# the editor


def record(i, prompt, new, true):
    others = ("The city of London is in", "Rome is located in")
    paraphrases = (f"It is in {prompt}", f"Not in London. {prompt}")
    return Record(i, prompt, "Rome", "P1", new, true, paraphrases, others, ("Rome",))


RECORDS = [
    record(0, PROMPT, "Paris", "Rome"),
    record(1, "The Eiffel Tower is located in", "Rome and in Berlin", "London"),
    record(2, "Rome is located in", "London", "Berlin not in London"),
]
SMALL = {"rank": 5, "lr": 1e-3, "step_size_lr": 1e-3, "batch_size": 3, "steps": 2}


@pytest.fixture(params=["llama", "gpt2"])
def model(boot, request):
    model = boot(request.param)
    model(PROMPT)
    return model


def trained(model, **options):
    return tlb.train_mend(model, RECORDS, layers=[1, 2], **SMALL | options)


def test_the_model_is_left_as_it_came(model):
    before, bits = state(model), weights(model)
    editor = trained(model)
    edit = editor(PROMPT, TARGET)
    assert state(model) == before
    assert same_bits(bits, weights(model))
    kinds = ["W_in", "W_gate", "W_out"] if model.cfg.gated_mlp else ["W_in", "W_out"]
    assert set(edit.factors) == {f"blocks.{i}.mlp.{kind}" for i in (1, 2) for kind in kinds}
    torch.testing.assert_close(hooked_logits(edit), applied_logits(edit), rtol=1e-9, atol=1e-9)
    assert same_bits(bits, weights(model))


def test_the_edits_of_the_training_are_those_of_the_editor(model, monkeypatch):
    """Their losses, from the model with each edit applied, one text at a time."""
    editor = trained(model)
    monkeypatch.setattr(MendNetworks, "observe", lambda *_: None)  # so that the means stay
    generator = torch.Generator().manual_seed(5)
    batch = [_drawn(_example(model, one, None), generator) for one in RECORDS]
    with torch.enable_grad():
        edit_loss, locality_loss = _losses(editor, batch)
    nlls, divergences = [], []
    for example in batch:
        edit = editor(example.edit.prompt, example.edit.target)
        for texts, values in ((example.outer, nlls), (example.local, divergences)):
            prompt, target = texts[0]
            tokens = torch.tensor([[*prompt, *target[:-1]]])
            with torch.no_grad():
                before = model(tokens)[0, len(prompt) - 1 :].log_softmax(-1)
                with edit.applied():
                    after = model(tokens)[0, len(prompt) - 1 :].log_softmax(-1)
            if values is nlls:
                values.append(-after[range(len(target)), target].mean())
            else:
                values.append((before.exp() * (before - after)).sum(-1).mean())
    torch.testing.assert_close(edit_loss.detach(), torch.stack(nlls).mean(), rtol=1e-8, atol=0)
    divergence = torch.stack(divergences).mean()
    torch.testing.assert_close(locality_loss.detach(), divergence, rtol=1e-6, atol=1e-12)


@NEEDS_BRIDGE
def test_gradients_of_the_networks_against_finite_differences(boot):
    model = boot("gpt2")  # in float64 throughout
    editor = trained(model)
    batch = [_drawn(_example(model, one, None), torch.Generator()) for one in RECORDS]
    editor.networks.requires_grad_(True)
    observed = {name: b.clone() for name, b in editor.networks.named_buffers()}

    def loss():
        editor.networks.load_state_dict(observed, strict=False)
        edit_loss, locality_loss = _losses(editor, batch)
        return edit_loss + 10 * locality_loss

    parameters = dict(editor.networks.named_parameters())
    shape = next(iter(editor.networks.transforms))
    chosen = ["step_sizes", *(f"transforms.{shape}.layers.{i}.{n}" for i in (0, 1) for n in "uv")]
    gradients = torch.autograd.grad(loss(), [parameters[name] for name in chosen])
    generator = torch.Generator().manual_seed(7)
    for name, gradient in zip(chosen, gradients, strict=True):
        p = parameters[name].data
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        step = 1e-6 * direction / direction.norm()
        p += step
        above = loss().detach()
        p -= 2 * step
        difference = (above - loss().detach()) / 2
        p += step
        torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-3, atol=1e-12)


def test_training_lowers_the_loss(model):
    report = trained(model, steps=40, lr=1e-2, step_size_lr=1e-2, locality_weight=0.0).report
    assert len(report.edit_losses) == len(report.locality_losses) == 40
    assert sum(report.edit_losses[-5:]) < 0.8 * sum(report.edit_losses[:5])


@NEEDS_BRIDGE
def test_training_is_repeatable_and_leaves_the_random_numbers(boot):
    model = boot("gpt2")
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first, second = trained(model), trained(model)
    assert torch.equal(torch.rand(2), expected)
    assert first.report == second.report
    assert trained(model, seed=1).report != first.report


def test_several_prompts_give_the_sum_of_their_edits(model):
    editor = trained(model)
    prompts = [PROMPT, "Rome is located in London"]
    together = editor(prompts, [TARGET, " Berlin"])
    each = editor(PROMPT, TARGET) + editor(prompts[1], " Berlin")
    for name, g in together.factors.items():
        torch.testing.assert_close(g.dense(), each.factors[name].dense())


def test_an_editor_is_saved_and_loaded_with_its_weights_in_mind(model, tmp_path):
    editor = trained(model, prepend_bos=False)
    path = editor.save(tmp_path / "mend.safetensors")
    loaded = MendEditor.load(path, model)
    assert loaded.report == editor.report and loaded.report.n_records == len(RECORDS)
    edit, again = editor(PROMPT, TARGET), loaded(PROMPT, TARGET)
    for name, g in edit.factors.items():
        assert torch.equal(g.dense(), again.factors[name].dense())
    with edit.applied(), pytest.raises(ValueError, match="this model has other weights"):
        MendEditor.load(path, model)
    statistics = tlb.KeyStatistics({name_of(1): torch.eye(44).double()}, n_tokens=9, ridge=0.0)
    other = statistics.save(tmp_path / "other.safetensors", model)
    with pytest.raises(ValueError, match="holds no MendEditor"):
        MendEditor.load(other, model)


@NEEDS_BRIDGE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"lr": -1.0}, "lr must be a positive"),
        ({"clip": float("inf")}, "clip must be a positive"),
        ({"edit_weight": -1.0}, "edit_weight must be"),
        ({"layers": 9}, "layers 0 to 2"),
        ({"records": []}, "records is empty"),
        ({"lr": "auto"}, "lr must be a positive finite number"),
        ({"step_size_lr": 1e300}, "the loss is .*at step 1"),
    ],
)
def test_bad_input(boot, unchecked, options, message):
    settings = {"records": RECORDS, "layers": [1, 2]} | SMALL | options
    with pytest.raises(ValueError, match=message):
        tlb.train_mend(boot("gpt2"), settings.pop("records"), **settings)


def test_records_that_are_none(boot, unchecked):
    with pytest.raises(
        TypeError, match=r"records must be a list of records, .* got \{'prompt': 1\}"
    ):
        tlb.train_mend(boot("gpt2"), [{"prompt": 1}], **SMALL)
