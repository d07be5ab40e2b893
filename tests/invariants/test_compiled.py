"""Models that torch.compile has compiled."""

from __future__ import annotations

import pytest
import torch
from helpers.versions import HAS_BRIDGE, MODELS

import tl_backward as tlb

TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


def calls_counted(calls):
    """A backend that counts how often what it compiled runs."""

    def backend(graph, inputs):
        def run(*arguments):
            calls.append(1)
            return graph.forward(*arguments)

        return run

    return backend


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_compiled_in_place(model, part):
    """The capture runs what was compiled; the compiled code stays for all other runs."""
    _, want = tlb.run_with_backward_cache(model, TOKENS, TARGET)
    calls = []
    modules = [model] if part == "model" else list(model.blocks)
    if part == "model" and HAS_BRIDGE and hasattr(model, "original_model"):
        modules.append(model.original_model)
    for module in modules:
        module.compile(backend=calls_counted(calls))
    compiled = [module._compiled_call_impl for module in modules]
    try:
        _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET)
        assert not calls
        assert [module._compiled_call_impl for module in modules] == compiled
    finally:
        for module in modules:
            module._compiled_call_impl = None
    for name, g in want.items():
        assert torch.equal(cache[name].inputs, g.inputs), name
        assert torch.equal(cache[name].vjps, g.vjps), name


def test_a_compiled_copy_is_refused_by_name(model):
    with pytest.raises(TypeError, match=r"pass the original model, model\._orig_mod"):
        tlb.run_with_backward_cache(torch.compile(model), TOKENS, TARGET)
