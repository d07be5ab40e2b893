"""Translators against pseudo-inverses, least squares and TransformerLens's own Jacobian lens."""

from __future__ import annotations

import pytest
import torch
from helpers.versions import MODELS

import tl_backward as tlb
from tl_backward import translators

PROMPT, TARGET = [3, 17, 3, 9, 8], 11


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def end_of_stream(model):
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, activations = model.run_with_cache(torch.tensor([PROMPT]))
    return activations[name][0].detach()


def test_through_the_final_norm_inverts_autograd(model):
    """At the last position it gives dL/d(output of ln_final), but for what the norm cannot pass."""
    residual = end_of_stream(model)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights="W_out", layers=-1)
    vjp = cache["W_out", -1 % model.cfg.n_layers].vjps
    translator = translators.through_final_norm(model, residual)
    z = translator(vjp, model.cfg.n_layers - 1)
    end = residual.clone().requires_grad_()
    normed = model.ln_final(end.unsqueeze(0))
    normed.retain_grad()
    (-model.unembed(normed)[0, -1].log_softmax(-1)[TARGET]).backward()
    model.zero_grad()
    jacobian = torch.autograd.functional.jacobian(
        lambda row: model.ln_final(row[None, None])[0, 0], residual[-1]
    )
    expected = normed.grad[0, -1] @ jacobian @ torch.linalg.pinv(jacobian, rtol=1e-4)
    torch.testing.assert_close(z[-1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[-1] @ jacobian, end.grad[-1], rtol=1e-4, atol=1e-5)


def test_other_rows_than_those_of_the_residual(model):
    translator = translators.through_final_norm(model, end_of_stream(model))
    lens = tlb.BackwardLogitLens(model)
    with pytest.raises(ValueError, match=rf"residual has the shape \[5, {model.cfg.d_model}\]"):
        lens(PROMPT, TARGET, positions=-1, lens=translator)
    readout = lens(PROMPT, TARGET, lens=translator, apply_ln=False)["W_out"]
    assert readout.top_values[0].isfinite().all()


def test_unit_normalised_is_the_normalised_lens(model):
    lens = tlb.BackwardLogitLens(model)
    translated = lens(PROMPT, TARGET, lens=translators.unit_normalised)
    normalised = lens(PROMPT, TARGET, normalize=True)
    plain = lens(PROMPT, TARGET, lens=translators.identity)
    for kind in ("W_in", "W_out"):
        assert torch.equal(translated[kind].top_ids, normalised[kind].top_ids)
        assert torch.equal(plain[kind].top_ids, lens(PROMPT, TARGET)[kind].top_ids)
    assert not torch.equal(plain["W_out"].target_values, normalised["W_out"].target_values)


class TestThroughJacobianLens:
    @pytest.fixture
    def jacobian_lens(self):
        module = pytest.importorskip(
            "transformer_lens.tools.analysis.jacobian_lens",
            reason="this TransformerLens has no JacobianLens",
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            matrices = {layer: torch.eye(28) + 0.1 * torch.randn(28, 28) for layer in (0, 2)}
        return module.JacobianLens(matrices, n_prompts=1, d_model=28)

    @pytest.mark.parametrize("layer", [0, 2])
    def test_undoes_the_pull_back_through_transport(self, jacobian_lens, layer):
        z = torch.randn(4, 3, 28)
        h = torch.zeros(4, 3, 28, requires_grad=True)
        (jacobian_lens.transport(h, layer) * z).sum().backward()
        translator = translators.through_jacobian_lens(jacobian_lens, ridge=1e-9)
        torch.testing.assert_close(translator(h.grad, layer), z, rtol=1e-3, atol=1e-3)

    def test_ridge_least_squares(self, jacobian_lens):
        vjps = torch.randn(7, 28, dtype=torch.float64)
        J = jacobian_lens.jacobians[2].double()
        weight = (0.3 * (J @ J.mT).diagonal().mean()).sqrt()
        stacked = torch.cat([J.mT, weight * torch.eye(28)])
        padded = torch.cat([vjps.mT, torch.zeros(28, 7)])
        expected = torch.linalg.lstsq(stacked, padded).solution.mT
        translator = translators.through_jacobian_lens(jacobian_lens, ridge=0.3)
        torch.testing.assert_close(translator(vjps, 2), expected)

    def test_which_layer_is_meant(self, jacobian_lens):
        vjps = torch.randn(2, 28)
        of_weights = translators.through_jacobian_lens(jacobian_lens)
        of_stream = translators.through_jacobian_lens(jacobian_lens, accumulated=True)
        assert torch.equal(of_stream(vjps, 3), of_weights(vjps, 2))
        assert of_weights(vjps, 1) is of_weights(vjps, None) is vjps

    def test_a_fitted_one_in_the_lens(self, jacobian_lens, request):
        model = request.getfixturevalue("boot")("gpt2", torch.float32)
        text = "Lionel Messi plays for the city of Paris and the Eiffel Tower is located in Rome"
        fitted = type(jacobian_lens).fit(
            model, [text] * 3, corpus="three times the same", skip_first_positions=2
        )
        lens = tlb.BackwardLogitLens(model)
        translator = translators.through_jacobian_lens(fitted)
        read = lens(text, " Paris", weights="W_out", lens=translator)["W_out"]
        plain = lens(text, " Paris", weights="W_out")["W_out"]
        assert torch.equal(read.top_ids[-1], plain.top_ids[-1])
        assert not torch.equal(read.top_ids[0], plain.top_ids[0])
