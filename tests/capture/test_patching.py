"""Activation and VJP patching during the capture, at every HookPoint of every site.

The numbers to compare with are autograd's, when the same change of the gradient is the backward
pass of an identity that an ordinary forward hook puts at the same place.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from helpers.families import make
from helpers.gradients import gradient_of_parameter, reference_loss
from helpers.state import state
from helpers.versions import CLASSES, MODELS, NEEDS_BRIDGE

import tl_backward as tlb
from tl_backward.sites import attached_hook_points

TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5
ATTENTION = ["W_Q", "W_K", "W_V", "W_O"]
LOOKUPS = ["W_E", "W_pos"]
KINDS = {
    "llama": ["W_E", *ATTENTION, "W_gate", "W_in", "W_out", "W_U"],
    "gpt2": ["W_E", "W_pos", *ATTENTION, "W_in", "W_out", "W_U"],
    "compatibility": ["W_Q", "W_O", "W_out"],
}
PLACES = [
    (model, kind, end)
    for model in MODELS
    for kind in KINDS[model.split("-")[-1]]
    for end in ("hook_in", "hook_out")
]
HAVE_VJP = [place for place in PLACES if place[1] not in LOOKUPS or place[2] == "hook_out"]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def zero(tensor):
    return torch.zeros_like(tensor)


def scale(tensor):
    return tensor * torch.linspace(-1, 2, tensor.shape[-1], dtype=tensor.dtype)


def replacement(tensor):
    if not tensor.is_floating_point():
        return tensor.flip(1)
    return torch.linspace(-1, 2, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)


class Patched(torch.autograd.Function):
    """The identity, with the change of the gradient as its backward pass."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def returns(change):
    return lambda tensor, hook: change(tensor)


def in_place(change):
    def edit(tensor, hook):
        tensor.copy_(change(tensor))

    return edit


@cache
def sites_of(model):
    return tlb.weight_sites(model)


def one_of(model, kind):
    """The site of this kind in layer 1, which has others upstream of it."""
    sites = [site for site in sites_of(model) if site.kind == kind]
    return sites[len(sites) // 2]


def autograd(model, fwd_hooks=()):
    """The gradient of every site's parameter, by the site's name."""
    sites = sites_of(model)
    with attached_hook_points(model), model.hooks(fwd_hooks=list(fwd_hooks)):
        loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(
        loss, [site.parameter for site in sites], allow_unused=True, materialize_grads=True
    )
    return {site.name: gradient for site, gradient in zip(sites, gradients, strict=True)}


@cache
def without_hooks(model):
    return autograd(model)


def check(model, cache, expected):
    sites = sites_of(model)
    assert expected.keys() == cache.keys()
    for site in sites:
        got, want = gradient_of_parameter(sites, cache, site), expected[site.name]
        assert (got - want).norm() <= 1e-10 * want.norm(), site.name


@pytest.mark.parametrize(
    ("change", "style"),
    [(zero, returns), (scale, returns), (replacement, returns), (scale, in_place)],
    ids=["zero", "scale", "replace", "scale in place"],
)
@pytest.mark.parametrize(("name", "kind", "end"), HAVE_VJP)
def test_everything_upstream_sees_the_patched_vjp(models, name, kind, end, change, style):
    model = models(name)
    site = one_of(model, kind)
    place, shapes = getattr(site, end), set()

    def insert(x, hook):
        shapes.add(x.shape)
        return Patched.apply(x, change)

    def patch(vjp, hook):
        shapes.add(vjp.shape)
        return style(change)(vjp, hook)

    with attached_hook_points(model), model.hooks(bwd_hooks=[(place, patch)]):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    expected = autograd(model, [(place, insert)])
    check(model, cache, expected)
    plain = without_hooks(model)
    assert any((g - plain[n]).norm() > 1e-2 * g.norm() for n, g in expected.items())
    (shape,) = shapes
    if change is not scale and end == "hook_out":
        vjp = change(torch.ones(shape, dtype=torch.float64))
        assert torch.equal(cache[site.name].vjps, vjp.reshape(cache[site.name].vjps.shape))


@pytest.mark.parametrize(("name", "kind", "end"), PLACES)
def test_activation_patching(models, name, kind, end):
    model = models(name)
    change = scale if (name, kind, end) in HAVE_VJP else replacement
    hooks = [(getattr(one_of(model, kind), end), returns(change))]
    loss, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, fwd_hooks=hooks)
    check(model, cache, autograd(model, hooks))
    with attached_hook_points(model), model.hooks(fwd_hooks=hooks):
        torch.testing.assert_close(loss, reference_loss(model, TOKENS, TARGET))
    assert (loss - reference_loss(model, TOKENS, TARGET)).abs() > 1e-6


@NEEDS_BRIDGE
def test_backward_hooks_on_all_hook_points(tokenizer):
    """Some of Jamba's pass a tuple, of which not every item has a gradient."""

    model, seen = make("jamba", tokenizer), set()

    def see(vjp, hook):
        seen.add(hook.name)

    _, plain = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    _, cache = tlb.run_with_backward_cache(
        model, TOKENS, TARGET, bwd_hooks=[(lambda name: True, see)]
    )
    assert len(seen) > 4 * len(model.blocks)
    for name, g in plain.items():  # they move norms off float32, where transformers keeps them
        torch.testing.assert_close(cache[name].vjps, g.vjps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["W_E", "W_V", "W_out", "W_U"])
def test_where_the_captured_graph_begins(model, kind):
    """The hook of the most upstream weight asked for runs behind it, and cannot matter before."""
    site = one_of(model, kind)
    asked_for = {"weights": kind, "layers": site.layer}
    _, plain = tlb.run_with_backward_cache(model, TOKENS, TARGET, **asked_for)
    for end, runs_in_both in (("hook_in", False), ("hook_out", True)):
        calls = []

        def patch(vjp, hook, calls=calls):
            calls.append(hook.name)
            return scale(vjp)

        hooks = [(getattr(site, end), patch)]
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks, **asked_for)
        _, whole = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
        assert len(calls) == (2 if runs_in_both else kind != "W_E")
        vjps = cache[site.name].vjps
        assert torch.equal(vjps, whole[site.name].vjps)
        same = torch.allclose(vjps, plain[site.name].vjps, rtol=1e-12, atol=1e-14)
        assert same != runs_in_both


@pytest.mark.parametrize(("kind", "end"), [("W_Q", "hook_out"), ("W_O", "hook_in")])
def test_attention_shows_its_vjps_by_head(model, kind, end):
    """On a bridge the whole width is accepted, too."""
    caches, seen = [], []

    def patch(vjp, hook, flat):
        seen.append(tuple(vjp.shape))
        return scale(vjp).flatten(2) if flat else scale(vjp)

    site = one_of(model, kind)
    for flat in (False, True)[: 1 + hasattr(model, "original_model")]:
        hooks = [(getattr(site, end), lambda vjp, hook, flat=flat: patch(vjp, hook, flat))]
        caches.append(tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)[1])
    assert set(seen) == {(1, TOKENS.shape[1], model.cfg.n_heads, model.cfg.d_head)}
    assert all(torch.equal(caches[0][n].vjps, g.vjps) for c in caches for n, g in c.items())


def test_hooks_passed_in_are_hooks_on_the_model(model):
    """By name or by a choice of names, for this run only; those that stay take part."""
    name, other = "blocks.1.mlp.out.hook_out", "blocks.1.attn.v.hook_in"
    before = state(model)
    with attached_hook_points(model):
        model.add_hook(name, returns(scale), dir="bwd")
        model.add_hook(other, returns(scale))
        _, added = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        _, again = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        point = model.hook_dict[name]
        assert len(point.bwd_hooks) == len(point._backward_hooks) == 1
        assert not point._backward_pre_hooks
        model.hook_dict[name].remove_hooks("bwd")
        model.hook_dict[other].remove_hooks("fwd")
    _, passed_in = tlb.run_with_backward_cache(
        model,
        TOKENS,
        TARGET,
        fwd_hooks=((other, returns(scale)),),
        bwd_hooks=((lambda point: point == name, returns(scale)),),
    )
    assert state(model) == before
    _, plain = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    for site, g in passed_in.items():
        assert torch.equal(g.vjps, added[site].vjps) and torch.equal(g.vjps, again[site].vjps)
        assert torch.equal(g.inputs, added[site].inputs)
    assert not torch.equal(passed_in["W_in", 0].vjps, plain["W_in", 0].vjps)
    assert not torch.equal(passed_in["W_V", 1].inputs, plain["W_V", 1].inputs)


@pytest.mark.parametrize("edited", LOOKUPS)
@pytest.mark.parametrize("name", [f"{cls}-gpt2" for cls in CLASSES])
def test_an_edit_in_place_stays_on_its_branch(models, name, edited):
    """Autograd hands both embeddings, as the branches of a sum, the very same tensor."""
    (kept,) = set(LOOKUPS) - {edited}
    model, seen = models(name), []

    def keep(vjp, hook):
        seen.append(vjp)

    hooks = [
        (one_of(model, kept).hook_out, keep),
        (one_of(model, edited).hook_out, in_place(zero)),
    ]
    _, plain = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, bwd_hooks=hooks)
    assert torch.equal(cache[kept, None].vjps, plain[kept, None].vjps)
    assert torch.equal(seen[0][0], plain[kept, None].vjps)
    assert cache[edited, None].vjps.eq(0).all() and plain[edited, None].vjps.ne(0).any()


@pytest.mark.parametrize(
    ("point", "wrong", "got", "passed_in"),
    [
        ("mlp.out.hook_out", lambda vjp: vjp[:, 1:], r"the shape \[1, 5, ", True),
        ("mlp.out.hook_in", lambda vjp: vjp[..., :-1], r"the shape \[1, 6, ", False),
        ("mlp.out.hook_out", lambda vjp: torch.cat([vjp, vjp]), r"the shape \[2, 6, ", True),
        ("mlp.out.hook_out", lambda vjp: vjp[0], r"the shape \[6, ", False),
        ("mlp.out.hook_out", lambda vjp: vjp.sum(), r"the shape \[\]", True),
        ("mlp.out.hook_out", lambda vjp: 0.5, "a float", False),
        ("mlp.out.hook_out", lambda vjp: [vjp], "a list", True),
        ("mlp.out.hook_out", lambda vjp: (vjp, vjp), "a tuple", True),
        ("mlp.out.hook_out", lambda vjp: vjp.numpy(), "a ndarray", True),
        ("mlp.out.hook_out", lambda vjp: vjp.bfloat16(), r"a tensor of torch\.bfloat16", True),
        ("attn.q.hook_out", lambda vjp: vjp[..., :-1], r"the shape \[1, 6, 4, ", True),
        ("attn.o.hook_in", lambda vjp: vjp[:, 1:], r"the shape \[1, 5, ", False),
    ],
)
def test_what_is_no_such_vjp_is_named(model, point, wrong, got, passed_in):
    hooks = {"bwd_hooks": [(f"blocks.1.{point}", returns(wrong))]}
    with attached_hook_points(model):
        name = re.escape(model.hook_dict[f"blocks.1.{point}"].name)
        before = state(model)
        with (
            model.hooks(**{} if passed_in else hooks),
            pytest.raises(ValueError, match=rf"hook at {name} returned {got}"),
        ):
            tlb.run_with_backward_cache(model, TOKENS, TARGET, **hooks if passed_in else {})
        assert state(model) == before
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    check(model, cache, without_hooks(model))


@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_hooks_passed_in_go_when_something_raises(model, direction, error):
    def fail(tensor, hook):
        raise error

    before = state(model)
    with pytest.raises(error):
        tlb.run_with_backward_cache(
            model, TOKENS, TARGET, **{direction: [("blocks.1.mlp.out.hook_out", fail)]}
        )
    assert state(model) == before
