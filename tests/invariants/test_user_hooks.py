"""Hooks of every kind that a user may have, at every site: the factors are autograd's gradient."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache, partial

import pytest
import torch
from helpers.gradients import gradient_of_parameter, reference_loss
from helpers.versions import MODELS
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

import tl_backward as tlb
from tl_backward.sites import attached_hook_points

TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5


def scaled(tensors, factor):
    """A tensor, or those of a tuple that are no token ids, times a factor."""
    if isinstance(tensors, torch.Tensor):
        return factor * tensors if tensors.is_floating_point() else tensors
    return tuple(None if t is None else scaled(t, factor) for t in tensors)


def scale_output(module, args, output, factor):
    return scaled(output, factor)


def scale_output_in_place(module, args, output, factor):
    output.mul_(factor)


def scale_output_with_kwargs(module, args, kwargs, output, factor):
    return scaled(output, factor)


def scale_input(module, args, factor):
    return scaled(args, factor)


def scale_input_with_kwargs(module, args, kwargs, factor):
    return scaled(args, factor), kwargs


def scale_gradient(module, gradients, other=None, factor=1.0):
    return scaled(gradients, factor)


def scale_gradient_of_input(module, of_input, of_output, factor):
    return None if of_input[0] is None else scaled(of_input, factor)


def scale_gradient_of_output(module, args, output, factor):
    if output.requires_grad:
        output.register_hook(lambda gradient: factor * gradient)


OF_A_MODULE = {
    "forward hook": lambda m, f: m.register_forward_hook(partial(scale_output, factor=f)),
    "forward hook, first": lambda m, f: m.register_forward_hook(
        partial(scale_output, factor=f), prepend=True
    ),
    "forward hook, in place": lambda m, f: m.register_forward_hook(
        partial(scale_output_in_place, factor=f)
    ),
    "forward hook, with kwargs": lambda m, f: m.register_forward_hook(
        partial(scale_output_with_kwargs, factor=f), with_kwargs=True, always_call=True
    ),
    "tensor hook": lambda m, f: m.register_forward_hook(
        partial(scale_gradient_of_output, factor=f)
    ),
    "pre-hook": lambda m, f: m.register_forward_pre_hook(partial(scale_input, factor=f)),
    "pre-hook, first": lambda m, f: m.register_forward_pre_hook(
        partial(scale_input, factor=f), prepend=True
    ),
    "pre-hook, with kwargs": lambda m, f: m.register_forward_pre_hook(
        partial(scale_input_with_kwargs, factor=f), with_kwargs=True
    ),
    "backward hook": lambda m, f: m.register_full_backward_hook(
        partial(scale_gradient_of_input, factor=f)
    ),
    "backward pre-hook": lambda m, f: m.register_full_backward_pre_hook(
        partial(scale_gradient, factor=f)
    ),
}


def only_at(modules, hook):
    """A hook for all modules that does something at some of them."""
    return lambda module, *arguments: hook(module, *arguments) if module in modules else None


OF_ALL_MODULES = {
    "global forward hook": lambda modules, f: register_module_forward_hook(
        only_at(modules, partial(scale_output, factor=f))
    ),
    "global pre-hook": lambda modules, f: register_module_forward_pre_hook(
        only_at(modules, partial(scale_input, factor=f))
    ),
    "global backward hook": lambda modules, f: register_module_full_backward_hook(
        only_at(modules, partial(scale_gradient_of_input, factor=f))
    ),
}


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def modules_of(model, where):
    """The modules that hold the weights, or the HookPoints around them."""
    sites = tlb.weight_sites(model)
    if where == "weights":
        modules = [site.y_tap().module for site in sites]
    else:
        modules = [
            model.hook_dict[name] for site in sites for name in (site.hook_in, site.hook_out)
        ]
    return list(dict.fromkeys(modules))


def check(model):
    """Every gradient, against autograd's, with the hooks that are on the model."""
    sites = tlb.weight_sites(model)
    loss, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    want_loss = reference_loss(model, TOKENS, TARGET)
    gradients = torch.autograd.grad(want_loss, [site.parameter for site in sites])
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    for site, gradient in zip(sites, gradients, strict=True):
        got = gradient_of_parameter(sites, cache, site)
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12, msg=site.name)
    return torch.cat([gradient.flatten() for gradient in gradients])


@contextmanager
def factors_at_random(modules, put):
    """A hook at each module, each with a factor of its own."""
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for module in modules:
            factor = float(0.8 + 0.4 * torch.rand((), generator=generator))
            stack.callback(put(module, factor).remove)
        yield


@cache
def plain_gradients(model):
    return check(model)


@pytest.mark.parametrize("where", ["weights", "points"])
@pytest.mark.parametrize("kind", OF_A_MODULE)
def test_at_every_site(model, kind, where):
    if kind == "forward hook, in place" and where == "points":
        pytest.skip("in place, it changes what was multiplied by another weight, too")
    plain = plain_gradients(model)
    with (
        attached_hook_points(model),
        factors_at_random(modules_of(model, where), OF_A_MODULE[kind]),
    ):
        hooked = check(model)
    assert (hooked - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("where", ["weights", "points"])
@pytest.mark.parametrize("kind", OF_ALL_MODULES)
def test_on_all_modules(model, kind, where):
    plain = plain_gradients(model)
    with (
        attached_hook_points(model),
        OF_ALL_MODULES[kind](modules_of(model, where), 1.1),
    ):
        hooked = check(model)
    assert (hooked - plain).norm() > 0.01 * plain.norm()


def test_several_at_once(model):
    """Of every kind at every module that holds a weight, and TransformerLens's own hooks."""
    with attached_hook_points(model), ExitStack() as stack:
        for kind in ("pre-hook", "forward hook", "backward hook", "backward pre-hook"):
            put = OF_A_MODULE[kind]
            stack.enter_context(factors_at_random(modules_of(model, "weights"), put))
        points = [site.hook_out for site in tlb.weight_sites(model)]
        hooks = [(point, lambda tensor, hook: 1.1 * tensor) for point in points]
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        check(model)
