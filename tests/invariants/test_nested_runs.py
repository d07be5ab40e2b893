"""Hooks that run the model, or a part of it, while a capture is under way."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import product

import pytest
import torch
from helpers.gradients import gradient_of_parameter, reference_loss
from helpers.versions import MODELS

import tl_backward as tlb
from tl_backward.capture.batch import batch_of
from tl_backward.editing.runs import WholeRun, weight_inputs
from tl_backward.sites import attached_hook_points

ROUNDING = {"rtol": 1e-12, "atol": 1e-14}
"""In float64, of products that are made at some rows or at all."""
TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5
OTHER = torch.tensor([[9, 9, 1]])
POINTS = ["hook_embed", "blocks.1.attn.o.hook_out"]


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def capture(model, **options):
    return tlb.run_with_backward_cache(model, TOKENS, TARGET, **options)


def same(cache, want):
    assert cache.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(cache[name].inputs, g.inputs, **ROUNDING)
        torch.testing.assert_close(cache[name].vjps, g.vjps, **ROUNDING)
    torch.testing.assert_close(cache.accumulated_vjps(), want.accumulated_vjps(), **ROUNDING)
    return True


def run_all(model, activation):
    model(OTHER)


def run_on_the_same_tokens(model, activation):
    model(TOKENS)


def run_one_block(model, activation):
    width = (1, 2, model.cfg.d_model)
    model.blocks[1].mlp(torch.ones(width, dtype=model.W_U.dtype))


def read_logits(model, activation):
    if activation.shape[-1] == model.cfg.d_model:
        model.unembed(model.ln_final(activation))


def run_a_capture(model, activation):
    tlb.run_with_backward_cache(model, OTHER, TARGET, weights="W_O")


RUNS = [run_all, run_on_the_same_tokens, run_one_block, read_logits, run_a_capture]


def once(function):
    """The function, which does nothing while it runs."""
    running, calls = [], []

    def outermost(*arguments):
        if not running:
            running.append(True)
            calls.append(True)
            try:
                function(*arguments)
            finally:
                running.clear()

    return outermost, calls


@contextmanager
def hooked(model, point, run, grad, kind):
    """A hook that only looks on, but runs something itself; put there in one of four ways."""

    def look(activation):
        with torch.set_grad_enabled(grad):
            run(model, activation)

    look, calls = once(look)
    module = model.hook_dict[point]
    if kind == "TransformerLens's":
        with model.hooks(fwd_hooks=[(point, lambda activation, hook: look(activation))]):
            yield calls
        return
    if kind == "pre-hook":
        handle = module.register_forward_pre_hook(lambda module, args: look(args[0]))
    elif kind == "of all modules":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, args, output: look(output) if m is module else None
        )
    else:
        handle = module.register_forward_hook(lambda module, args, output: look(output))
    with handle:
        yield calls


@pytest.mark.parametrize("run", RUNS)
def test_what_a_hook_runs_is_no_part_of_the_capture(model, run):
    with attached_hook_points(model):
        _, want = capture(model)
        for point, grad in product(POINTS, (False, True)):
            with hooked(model, point, run, grad, "TransformerLens's") as calls:
                _, cache = capture(model)
            assert calls and same(cache, want)


def test_a_capture_in_a_hook_is_as_it_is_alone(model):
    caches = []

    def capture_other(activation, hook):
        if not caches:
            caches.append(None)
            caches[:] = [tlb.run_with_backward_cache(model, OTHER, TARGET)[1]]

    _, want = tlb.run_with_backward_cache(model, OTHER, TARGET)
    capture(model, fwd_hooks=[("blocks.1.hook_mlp_out", capture_other)])
    assert same(caches[0], want)


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "of all modules"])
def test_nor_in_hooks_of_pytorch(model, kind):
    with attached_hook_points(model):
        _, want = capture(model)
        with hooked(model, "blocks.1.mlp.in.hook_out", run_all, True, kind) as calls:
            _, cache = capture(model)
    assert len(calls) == 1 and same(cache, want)


def test_nor_in_hooks_of_the_capture_alone(model):
    _, want = capture(model)
    look, calls = once(lambda: model(OTHER))
    hook = ("blocks.1.mlp.in.hook_out", lambda activation, hook: look())
    _, cache = capture(model, fwd_hooks=[hook])
    assert len(calls) == 1 and same(cache, want)


def test_other_runs_leave_them_out_too(model):
    with attached_hook_points(model):
        sites = tlb.weight_sites(model, "W_out")
        batch = batch_of(model, TOKENS)
        inputs, whole = weight_inputs(model, sites, batch), WholeRun(model, batch, sites)
        with hooked(model, "hook_embed", run_all, False, "forward hook") as calls:
            hooked_inputs = weight_inputs(model, sites, batch)
            hooked_whole = WholeRun(model, batch, sites)
    assert len(calls) == 2
    for name, x in inputs.items():
        assert torch.equal(hooked_inputs[name], x)
        assert torch.equal(hooked_whole.inputs[name], x)
        assert torch.equal(hooked_whole.outputs[name], whole.outputs[name])
    assert torch.equal(hooked_whole.logits, whole.logits)


def test_a_loss_that_depends_on_it_is_refused_by_name(model):
    """The gradient of those weights has terms that are no rows of their factors."""

    def add_again(activation, hook):
        return activation + model.blocks[1].mlp(activation)

    with (
        attached_hook_points(model),
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", add_again)]),
    ):
        with pytest.raises(NotImplementedError, match=r"runs blocks\.1\.mlp\.W_\w+ again"):
            capture(model)
        check(model, weights="W_O")


def test_a_constant_from_another_run_is_a_patch(model):
    def patch(activation, hook):
        return activation + model.blocks[1].mlp(activation.detach() / 2).detach()

    with (
        attached_hook_points(model),
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", patch)]),
    ):
        check(model)


def check(model, weights=None):
    """The gradients, against autograd's."""
    sites = tlb.weight_sites(model, weights)
    _, cache = capture(model, weights=weights)
    loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(loss, [site.parameter for site in sites])
    for site, gradient in zip(sites, gradients, strict=True):
        got = gradient_of_parameter(sites, cache, site)
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12, msg=site.name)
