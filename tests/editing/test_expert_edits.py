"""Edits of single experts: applied, reverted, shifted, fine-tuned."""

from __future__ import annotations

import pytest
import torch
from helpers.families import make
from helpers.gradients import gradients_of_sites, reference_loss
from helpers.mixtures import TARGET, TOKENS, mixtral_routes
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE


@pytest.fixture(params=["mixtral", "gpt_oss", "llama4_text"])
def model(request, tokenizer):
    return make(request.param, tokenizer)


@pytest.fixture
def mixtral(tokenizer):
    return make("mixtral", tokenizer)


def bits(model):
    return [parameter.detach().clone() for parameter in model.original_model.parameters()]


def assert_same(model, before):
    assert all(map(torch.equal, bits(model), before))


def random_edit(model, name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    site = next(site for site in tlb.weight_sites(model) if site.name == name)
    u, v = (
        0.3 * torch.randn(2, d, generator=generator, dtype=torch.float64)
        for d in (site.d_in, site.d_out)
    )
    return site, tlb.WeightEdit(model, {name: tlb.GradientFactors(u, v)})


@pytest.mark.parametrize("kind", ["W_gate", "W_in", "W_out"])
def test_an_edit_changes_one_experts_slice(model, kind):
    before = bits(model)
    site, edit = random_edit(model, f"blocks.0.mlp.experts.1.{kind}")
    stack, index = site.stored_in
    expected = stack.detach().clone()
    g = edit.factors[site.name]
    expected[index] += site.to_parameter_layout(g.inputs.mT @ g.vjps)
    edit.apply()
    torch.testing.assert_close(stack.detach(), expected, rtol=1e-14, atol=1e-14)
    untouched = torch.ones_like(expected, dtype=torch.bool)
    untouched[index] = False
    original = next(
        p
        for p in before
        if p.shape == stack.shape and torch.equal(p[untouched], stack.detach()[untouched])
    )
    assert not torch.equal(original, stack)
    edit.revert()
    assert_same(model, before)


def test_edits_of_experts_in_one_stack(mixtral, tmp_path):
    """Of two experts they come and go in any order, of one only in theirs."""
    before = bits(mixtral)
    _, one = random_edit(mixtral, "blocks.0.mlp.experts.1.W_out")
    _, other = random_edit(mixtral, "blocks.0.mlp.experts.2.W_out", seed=1)
    _, again = random_edit(mixtral, "blocks.0.mlp.experts.1.W_out", seed=2)
    one.apply()
    other.apply()
    one.revert()
    other.revert()
    assert_same(mixtral, before)
    again.apply()
    with pytest.raises(
        RuntimeError, match=r"another edit of .*experts\.1\.W_out was applied after"
    ):
        one.save(tmp_path / "edit.safetensors")
    other.save(tmp_path / "other.safetensors")
    again.revert()
    one.apply()
    again.apply()
    with pytest.raises(
        RuntimeError, match=r"another edit of .*experts\.1\.W_out was applied after"
    ):
        one.revert()
    again.revert()
    one.revert()
    assert_same(mixtral, before)
    loaded = tlb.WeightEdit.load(tmp_path / "other.safetensors", mixtral)
    with loaded.applied():
        loaded_logits = mixtral(TOKENS).detach()
    with other.applied():
        assert torch.equal(mixtral(TOKENS), loaded_logits)
    assert_same(mixtral, before)


def test_hooks_are_refused_by_name(mixtral):
    site, edit = random_edit(mixtral, "blocks.0.mlp.experts.1.W_out")
    assert not edit.is_hookable
    for hooks in (edit.fwd_hooks, lambda: tlb.edit_hooks(mixtral, [edit])):
        with pytest.raises(NotImplementedError, match=f"{site.name} is a matrix of one expert"):
            hooks()


def test_a_gradient_step_is_autograds(model):
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    edit = tlb.gradient_step(cache, lr=0.3, weights=("W_in", "W_out"), layers=0, model=model)
    sites = [site for site in tlb.weight_sites(model, ("W_in", "W_out"), 0)]
    gradients = gradients_of_sites(reference_loss(model, TOKENS, TARGET), sites)
    expected = [site.parameter - 0.3 * g for site, g in zip(sites, gradients, strict=True)]
    expected = [one.detach().clone() for one in expected]
    with edit.applied():
        for site, one in zip(sites, expected, strict=True):
            torch.testing.assert_close(site.parameter.detach(), one, rtol=1e-12, atol=1e-13)


def test_fine_tuning_is_plain_gradient_descent(mixtral):
    """The losses of three steps of torch.optim.SGD on the stacked parameter."""
    before = bits(mixtral)
    edit = tlb.fine_tune(mixtral, TOKENS[0], TARGET, layers=1, lr=0.2, max_steps=3)
    assert_same(mixtral, before)
    stack = mixtral.blocks[1].mlp.original_component.experts.down_proj
    optimizer, losses = torch.optim.SGD([stack], lr=0.2), []
    for _ in range(4):
        loss = reference_loss(mixtral, TOKENS, TARGET)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(torch.tensor(edit.report.losses[0]), torch.tensor(losses))


def test_the_shift_is_that_of_one_wide_matrix(mixtral):
    """The layer's output changes by lr |X|^2 D^T[t]: X is all inputs times their weights."""
    before, lr, seen = bits(mixtral), 0.7, {}
    edit = tlb.forward_pass_shift(
        mixtral, TOKENS[0], TARGET, layer=0, lr=lr, skip_if_predicted=False
    )

    def note(tensor, hook):
        seen[hook.name] = tensor.detach()[0, -1].clone()

    points = [f"blocks.0.mlp.hook_{end}" for end in ("in", "out")]
    with torch.no_grad():
        mixtral.run_with_hooks(TOKENS, fwd_hooks=[(point, note) for point in points])
        x, without = seen[points[0]], seen[points[1]]
        with edit.applied():
            mixtral.run_with_hooks(TOKENS, fwd_hooks=[(point, note) for point in points])
    experts, weights = mixtral_routes(mixtral.blocks[0], x)
    module = mixtral.blocks[0].mlp.original_component.experts
    square = 0.0
    for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
        gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
        square += weight**2 * float((torch.nn.functional.silu(gate) * up).square().sum())
    expected = lr * square * mixtral.W_U[:, TARGET]
    torch.testing.assert_close(seen[points[1]] - without, expected.detach(), rtol=1e-6, atol=1e-9)
    assert set(edit.factors) == {f"blocks.0.mlp.experts.{e}.W_out" for e in experts.tolist()}
    assert_same(mixtral, before)


@pytest.mark.parametrize("arguments", [{}, {"joint": True}, {"layer": "auto"}])
def test_the_search_finds_a_step(model, arguments):
    before = bits(model)
    prompts = [[3, 9, 1, 17], [4, 7, 2]] if "joint" in arguments else [[3, 9, 1, 17]]
    edit = tlb.forward_pass_shift(
        model, prompts, [[7]] * len(prompts), **{"layer": 1, "lr": "auto"} | arguments
    )
    assert_same(model, before)
    with edit.applied(), torch.no_grad():
        for prompt in prompts:
            assert int(model(torch.tensor([prompt]))[0, -1].argmax()) == 7
    assert_same(model, before)


def test_statistics_of_experts_are_refused(mixtral):
    with pytest.raises(NotImplementedError, match=r"no key statistics of blocks\.0\.mlp\.experts"):
        tlb.key_statistics(mixtral, ["The cat."], 0)
    with pytest.raises(NotImplementedError, match="several W_out"):
        tlb.rome(
            mixtral,
            "Lionel Messi plays for",
            " Paris",
            subject="Lionel Messi",
            layer=0,
            statistics=tlb.KeyStatistics({"blocks.0.mlp.W_out": torch.eye(44)}, 1, 0.0),
        )
