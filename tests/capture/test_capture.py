from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from helpers.gradients import gradient_of_parameter, reference_loss, relative_error
from helpers.products import Products
from helpers.state import state
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BRIDGE

import tl_backward as tlb

pytestmark = NEEDS_BRIDGE

MLP = ("W_in", "W_gate", "W_out")


def autograd_gradient(model, site):
    loss = reference_loss(model, model.to_tokens(PROMPT), model.to_single_token(TARGET))
    return torch.autograd.grad(loss, site.parameter)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_site_equals_autograd(boot, kind, dtype, tolerance):
    model = boot(kind, dtype)
    loss, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    torch.testing.assert_close(
        loss, reference_loss(model, model.to_tokens(PROMPT), model.to_single_token(TARGET))
    )
    sites = tlb.weight_sites(model)
    assert len(sites) == len(cache) == (2 + 3 * 7 if kind == "llama" else 3 + 3 * 6)
    for site in sites:
        gradient = autograd_gradient(model, site)
        got = gradient_of_parameter(sites, cache, site)
        assert got.shape == site.parameter.shape
        assert relative_error(got, gradient) <= tolerance, site.name


def test_rank_is_the_number_of_tokens_and_one_in_the_last_layer(model):
    """Lemma 4.1 and appendix A."""
    kinds = [kind for kind in (*MLP, "W_O") if kind in {s.kind for s in tlb.weight_sites(model)}]
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, weights=kinds)
    n = len(cache.tokens)
    assert len(cache.tokens.unique()) == n
    ranks = {name: g.rank() for name, g in cache.items()}
    assert ranks == {name: 1 if name.startswith("blocks.2") else n for name in cache}


def test_frozen_parameters_give_the_same_factors(model):
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _, frozen = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    for name, g in cache.items():
        assert torch.equal(frozen[name].vjps, g.vjps)
        assert torch.equal(frozen[name].inputs, g.inputs)
    assert not any(p.requires_grad for p in model.parameters())


def test_no_weight_gradient_is_computed(model, kind):
    weights = {tuple(site.parameter.shape) for site in tlb.weight_sites(model)}
    assert not any(shape[0] == shape[1] for shape in weights if kind == "llama")
    weights |= {shape[::-1] for shape in weights}
    with Products() as full:
        reference_loss(model, model.to_tokens(PROMPT), 5).backward()
    assert weights & set(full.shapes)
    model.zero_grad()
    with Products() as factored:
        tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert not weights & set(factored.shapes)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_backward_pass_stops_at_the_first_site_asked_for(model):
    """Its one product is the last position's logits' with the unembedding, as is the forward's."""
    with Products() as one:
        tlb.run_with_backward_cache(model, PROMPT, TARGET, weights="W_out", layers=-1)
    with Products() as forward:
        reference_loss(model, model.to_tokens(PROMPT), 5)
    d_vocab, d_model = model.cfg.d_vocab, model.cfg.d_model
    assert one.shapes - forward.shapes == {(1, d_vocab): 1, (1, d_model): 1}
    assert forward.shapes - one.shapes == {(len(model.to_tokens(PROMPT)[0]), d_vocab): 1}


def test_one_forward_and_one_backward(model, monkeypatch):
    calls = Counter()
    model.add_hook("hook_embed", lambda tensor, hook: calls.update(["forward"]))
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (calls.update(["backward"]), grad(*a, **k))[1]
    )
    tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert calls == {"forward": 1, "backward": 1}


def vjps_at(model, *hook_points):
    """What backward hooks of TransformerLens see while the capture runs."""
    seen = {}

    def see(gradient, hook):
        seen[hook.name] = gradient[0].clone()

    with model.hooks(bwd_hooks=[(name, see) for name in hook_points]):
        tlb.run_with_backward_cache(model, PROMPT, TARGET)
    return seen


def test_moved_to_a_device_while_the_backward_pass_runs(model, monkeypatch):
    """To the bit as without; whoever looks on from layer 1 sees those of layer 2 moved already."""
    prompts, targets = [PROMPT, "Paris"], [" Paris", " Rome and Berlin"]
    moved, seen, to = [], [], torch.Tensor.to

    def noted(self, *args, **kwargs):
        if args == (torch.device("cpu"),):
            moved.append(self)
        return to(self, *args, **kwargs)

    def look(tensor, hook):
        seen.append(len(moved))

    def run(**options):
        return tlb.run_with_backward_cache(
            model,
            prompts,
            targets,
            per_head=True,
            fwd_hooks=[("unembed.hook_in", look)],
            bwd_hooks=[("blocks.1.hook_mlp_out", look)],
            **options,
        )[1]

    plain = run()
    seen.clear()
    monkeypatch.setattr(torch.Tensor, "to", noted)
    cache = run(device="cpu")
    assert 0 < seen[0] < seen[1] < len(moved)
    for name, g in plain.items():
        assert torch.equal(cache[name].inputs, g.inputs) and torch.equal(cache[name].vjps, g.vjps)
    for kind in ("vjps", "activations", "attention", "heads"):
        for name, tensor in getattr(plain.residual, kind).items():
            assert torch.equal(getattr(cache.residual, kind)[name], tensor), name


def test_vjp_at_the_logits(model):
    """Eq 4, and Lemma 5.1 at the output of ln_final."""
    seen = vjps_at(model, "unembed.hook_out", "ln_final.hook_out")
    logits = model(PROMPT)[0]
    expected = torch.zeros_like(logits)
    expected[-1] = logits[-1].softmax(-1)
    expected[-1, model.to_single_token(TARGET)] -= 1
    torch.testing.assert_close(seen["unembed.hook_out"], expected, rtol=1e-10, atol=1e-12)
    spanned = torch.einsum("pk,dk->pd", expected, model.W_U)
    torch.testing.assert_close(seen["ln_final.hook_out"], spanned, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("weight", "hook"), [("W_in", "in"), ("W_out", "out")])
def test_a_step_changes_the_output_as_the_paper_says(model, weight, hook):
    """Eq 17 and 18: one token's part of the gradient moves its output by eta |x|^2 delta."""
    eta, position, name = -0.37, 2, f"blocks.1.mlp.{hook}.hook_out"
    (site,) = tlb.weight_sites(model, weight, 1)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET, positions=position)
    g = cache[weight, 1]
    _, before = model.run_with_cache(PROMPT, names_filter=name)
    with torch.no_grad():
        site.parameter.add_(site.to_parameter_layout(g.dense()), alpha=eta)
    _, after = model.run_with_cache(PROMPT, names_filter=name)
    x, delta = g.inputs[0], g.vjps[0]
    expected = eta * x.dot(x) * delta
    change = (after[name] - before[name])[0, position]
    torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-12)


def test_positions_are_parts_of_the_whole(model):
    _, whole = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    n = len(whole.tokens)
    _, first = tlb.run_with_backward_cache(model, PROMPT, TARGET, positions=slice(0, 3))
    _, rest = tlb.run_with_backward_cache(model, PROMPT, TARGET, positions=list(range(3, n)))
    _, last = tlb.run_with_backward_cache(model, PROMPT, TARGET, positions=-1)
    assert first.positions.tolist() == [0, 1, 2] and last.positions.tolist() == [n - 1]
    for name, g in whole.items():
        torch.testing.assert_close((first[name] + rest[name]).dense(), g.dense())
        torch.testing.assert_close(
            first.bias_gradient(name) + rest.bias_gradient(name), whole.bias_gradient(name)
        )
        assert torch.equal(last[name].vjps, g.vjps[-1:])


def test_a_key_that_names_no_weight_says_what_to_take(model):
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    for key in ("W_out", ("W_out", 3), ("W_out", None), "blocks.3.mlp.W_out"):
        with pytest.raises(
            KeyError, match=r"in layers 0 to 2: use e.g. cache\['W_out', 2\]"
        ) as error:
            cache[key]
        assert len(str(error.value)) < 120
        assert key not in cache
    with pytest.raises(KeyError, match=r"outside the blocks: use e.g. cache\['W_E', None\]"):
        cache["W_E"]
    for key in ("nonsense", ("W_gat", 1), "blocks.1"):
        with pytest.raises(KeyError, match=r"W_U outside the blocks; .*W_O.* in layers 0 to 2"):
            cache[key]


def test_cache_is_a_mapping_by_name_and_by_kind_and_layer(model):
    loss, cache = tlb.run_with_backward_cache(
        model, PROMPT, TARGET, weights=["W_out"], layers=[0, -1]
    )
    assert list(cache) == ["blocks.0.mlp.W_out", "blocks.2.mlp.W_out"]
    assert cache["W_out", 2] is cache["blocks.2.mlp.W_out"]
    with pytest.raises(KeyError, match="is in several layers"):
        cache["W_out", None]
    assert "blocks.1.mlp.W_out" not in cache
    with pytest.raises(
        KeyError, match=r"W_out was captured in layers 0, 2: use e.g. cache\['W_out', 2\]"
    ):
        cache["W_out", 1]
    assert cache.loss == loss and not loss.requires_grad
    assert cache.str_tokens == model.to_str_tokens(PROMPT)
    assert cache.target_ids == model.to_single_token(TARGET)
    assert not any(g.vjps.requires_grad or g.inputs.requires_grad for g in cache.values())


def test_prompt_and_target_as_ids(model):
    _, text = tlb.run_with_backward_cache(model, PROMPT, TARGET, prepend_bos=False)
    tokens = model.to_tokens(PROMPT, prepend_bos=False)
    for prompt in (tokens, tokens[0]):
        for target in (int(text.target_ids), text.target_ids, text.target_ids.reshape(1)):
            _, ids = tlb.run_with_backward_cache(model, prompt, target)
            assert torch.equal(ids["W_in", 0].vjps, text["W_in", 0].vjps)


def test_a_model_without_tokenizer_takes_token_ids(model):
    tokens, target = model.to_tokens(PROMPT), model.to_single_token(TARGET)
    _, cache = tlb.run_with_backward_cache(model, tokens, target, weights="W_out")
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        _, bare = tlb.run_with_backward_cache(model, tokens, target, weights="W_out")
        result = tlb.BackwardLogitLens(model)(tokens, target, weights="W_out", top_k=2)
        for argument in ({"prompt": PROMPT}, {"target": TARGET}):
            with pytest.raises(ValueError, match=f"pass {next(iter(argument))} as token ids"):
                tlb.run_with_backward_cache(model, **{"prompt": tokens, "target": 5} | argument)
    finally:
        model.tokenizer = tokenizer
    assert torch.equal(bare["W_out", 1].vjps, cache["W_out", 1].vjps)
    assert bare.str_tokens == [str(i) for i in tokens[0].tolist()]
    read = result["W_out"]
    assert read.top_tokens()[0][1] == [str(i) for i in read.top_ids[0, 1].tolist()]


def test_hooks_on_the_model_take_part(model):
    """Activation patching changes the captured run as it changes autograd's."""

    def patch(tensor, hook):
        return tensor * torch.linspace(0, 2, tensor.shape[-1], dtype=tensor.dtype)

    def patch_in_place(tensor, hook):
        return tensor.mul_(3)

    hooks = [("blocks.1.mlp.out.hook_in", patch), ("blocks.0.mlp.in.hook_out", patch_in_place)]
    (site,) = tlb.weight_sites(model, "W_in", 0)
    with model.hooks(fwd_hooks=hooks):
        _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
        gradient = autograd_gradient(model, site)
    plain = autograd_gradient(model, site)
    assert relative_error(site.to_parameter_layout(cache["W_in", 0].dense()), gradient) < 1e-10
    assert relative_error(plain, gradient) > 0.1


def test_a_site_whose_output_is_patched_away_has_no_gradient(model):
    fixed = torch.ones(1, 1, 28, dtype=torch.float64)
    with model.hooks(fwd_hooks=[("blocks.1.mlp.out.hook_out", lambda t, hook: fixed.expand_as(t))]):
        _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert cache["W_out", 1].vjps.eq(0).all() and cache["W_in", 1].vjps.eq(0).all()
    assert cache["W_out", 0].vjps.ne(0).any()


def test_works_under_no_grad(model):
    with torch.no_grad():
        _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert cache["W_in", 0].norm() > 0


def fail(tensor, hook, error):
    raise error


def infinite(tensor, hook):
    return tensor * torch.inf


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ({}, None),
        (
            {"fwd_hooks": [("blocks.1.hook_out", partial(fail, error=ZeroDivisionError))]},
            ZeroDivisionError,
        ),
        (
            {"fwd_hooks": [("blocks.1.hook_out", partial(fail, error=KeyboardInterrupt))]},
            KeyboardInterrupt,
        ),
        (
            {"bwd_hooks": [("blocks.1.hook_out", partial(fail, error=ZeroDivisionError))]},
            ZeroDivisionError,
        ),
        ({"fwd_hooks": [("unembed.hook_out", infinite)]}, ValueError),
    ],
    ids=["success", "forward hook", "Ctrl-C", "backward hook", "loss not finite"],
)
def test_the_model_leaves_as_it_came(model, hooks, error):
    model(PROMPT)  # the bridge itself adds hooks to its norms at its first forward pass
    next(model.parameters()).requires_grad_(False)
    calls = []
    model.add_hook("hook_embed", lambda tensor, hook: calls.append(1))
    before = state(model)
    with model.hooks(**hooks):
        if error is None:
            tlb.run_with_backward_cache(model, PROMPT, TARGET)
        else:
            with pytest.raises(error):
                tlb.run_with_backward_cache(model, PROMPT, TARGET)
    assert state(model) == before
    assert calls == [1]


def test_an_input_changed_in_place_is_noticed(model):
    (site,) = tlb.weight_sites(model, "W_out", 1)

    def change_input(module, args, output):
        args[0].add_(1)

    site.x_tap().module.register_forward_hook(change_input)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.W_out was changed in place"):
        tlb.run_with_backward_cache(model, PROMPT, TARGET)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": ""}, ValueError, "target is empty"),
        ({"target": 10**6}, ValueError, "this model has token ids 0 to"),
        ({"target": 1.5}, TypeError, "target must be"),
        ({"target": True}, TypeError, "target must be"),
        ({"prompt": ""}, ValueError, "prompt is empty"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "prompt is empty"),
        ({"prompt": torch.zeros(1, 4)}, TypeError, "prompt must be"),
        ({"prompt": torch.tensor([[3, -1]])}, ValueError, "outside the vocabulary"),
        ({"prompt": PROMPT * 9}, ValueError, "more than the model's context of 32"),
        ({"prompt": PROMPT * 3, "target": TARGET * 12}, ValueError, "and 11 of its target"),
        ({"layers": 3}, ValueError, "layers 0 to 2"),
        ({"layers": [0, -4]}, ValueError, "layers 0 to 2"),
        ({"layers": [1.0]}, ValueError, "layers 0 to 2"),
        ({"layers": []}, ValueError, "layers 0 to 2"),
        ({"weights": "W_XY"}, ValueError, "this model has W_E"),
        ({"positions": 99}, ValueError, "positions 0 to"),
        ({"positions": slice(4, 4)}, ValueError, "selects none"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named_and_changes_nothing(model, arguments, error, message):
    before = state(model)
    with pytest.raises(error, match=message):
        tlb.run_with_backward_cache(model, **{"prompt": PROMPT, "target": TARGET} | arguments)
    assert state(model) == before


def test_inference_mode_is_refused(model, boot, kind):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        tlb.run_with_backward_cache(model, PROMPT, TARGET)
    with torch.inference_mode():
        made_inside = boot(kind)
    with pytest.raises(RuntimeError, match="load the model outside it"):
        tlb.run_with_backward_cache(made_inside, PROMPT, TARGET)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 3), "gpt2", None])
@pytest.mark.usefixtures("unchecked")
def test_other_objects_are_refused(thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
        tlb.weight_sites(thing)
