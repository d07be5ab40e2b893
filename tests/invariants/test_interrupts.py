"""Ctrl-C at random places, once and twice: the model is left as it came, and works as before.

The interrupts are exceptions that a trace function raises before a line of Python, at a place drawn
at random from all that a job passes; the second one comes from a profile function, at a call or a
return a little later.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.versions import HAS_BRIDGE, HAS_HOOKED_TRANSFORMER

import tl_backward as tlb
from tl_backward import _turns, _undo
from tl_backward.capture.batch import batch_of
from tl_backward.editing.runs import WholeRun, weight_inputs
from tl_backward.evaluation.scoring import Case, score_targets
from tl_backward.sites import all_modules, hook_points

MODELS = ["bridge-llama"] * HAS_BRIDGE + ["hooked-llama"] * HAS_HOOKED_TRANSFORMER
TOKENS, TARGET = torch.tensor([[3, 17, 3, 29, 8, 9]]), 5
TRACED = (
    *("tl_backward", "transformer_lens", "contextlib.py", "weakref.py", "_weakrefset.py"),
    *("torch/utils/hooks.py", "torch/nn/modules/module.py", "torch/autograd"),
)
NOT_TRACED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "inner", "__getattr__")
"""Functions that run so often that few interrupts would be left for others."""
UNRAISABLE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def grad_mode_is_put_back():
    """An interrupt inside of ``torch.no_grad`` itself leaves gradients off for the thread."""
    yield
    torch.set_grad_enabled(True)


class Interrupts:
    """Counts the places that a job passes, and raises at one of them, and after it at another.

    Args:
        first: Which place, counted from 1; none if 0.
        second: How many calls and returns later a second time; never if 0.
    """

    is_traced: ClassVar[dict] = {}

    def __init__(self, first=0, second=0):
        self.first, self.second = first, second
        self.passed, self.restoring = 0, []

    def __enter__(self):
        sys.setprofile(self.profile if self.second else None)
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc):
        sys.settrace(None)
        sys.setprofile(None)

    def trace(self, frame, event, arg):
        code = frame.f_code
        if code not in self.is_traced:
            self.is_traced[code] = code.co_name not in NOT_TRACED and any(
                part in code.co_filename for part in TRACED
            )
        if not self.is_traced[code]:
            return None
        self.passed += 1
        if code.co_filename == _undo.__file__:
            self.restoring.append(self.passed)
        if self.passed == self.first:
            raise KeyboardInterrupt("the first")
        return self.trace

    def profile(self, frame, event, arg):
        if 0 < self.first <= self.passed and Path(frame.f_code.co_filename) != Path(__file__):
            self.second -= 1
            if self.second == 0:
                raise KeyboardInterrupt("the second")


def interrupted(job, model, interrupts):
    """What the job raises, if anything; alive, so that nothing is put right by its end."""
    with interrupts:
        try:
            job(model)
        except KeyboardInterrupt as error:
            return error
    return None


def state(model):
    """All of a model that a job may change, and the modes of PyTorch."""
    modules = [module for _, module in all_modules(model)]
    registries = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    parameters = list(model.parameters())
    return {
        "classes": [type(module) for module in modules],
        "children": [list(module._modules) for module in modules],
        "attributes": [sorted(vars(module)) for module in modules],
        "hooks": [list(getattr(m, name).items()) for m in modules for name in registries],
        "tl_hooks": [[*point.fwd_hooks, *point.bwd_hooks] for point in model.hook_dict.values()],
        "names": [list(model.hook_dict), list(getattr(model, "mod_dict", ()))],
        "context_level": model.context_level,
        "requires_grad": [p.requires_grad for p in parameters],
        "grad": [p.grad for p in parameters],
        "training": [module.training for module in modules],
        "weights": [p.detach().numpy().tobytes() for p in parameters],
        "rng": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
        "turns": list(_turns._turns.values()),
        "attached": list(hook_points._temporarily_attached),
    } | {
        name: list(getattr(torch.nn.modules.module, name).items())
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    }


def capture(model):
    hooks = {
        "fwd_hooks": [("blocks.1.mlp.out.hook_in", lambda tensor, hook: 2 * tensor)],
        "bwd_hooks": [("blocks.0.hook_mlp_out", lambda vjp, hook: 2 * vjp)],
    }
    _, cache = tlb.run_with_backward_cache(model, TOKENS, TARGET, **hooks)
    return [tensor for g in cache.values() for tensor in (g.inputs, g.vjps)]


def edit_of(model):
    (site,) = tlb.weight_sites(model, "W_out", 1)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(1, d, generator=generator) for d in (site.d_in, site.d_out))
    return tlb.WeightEdit(model, {site.name: tlb.GradientFactors(u, v)})


def search(model):
    edit = edit_of(model)
    sites = tlb.weight_sites(model, "W_out")
    inputs = weight_inputs(model, sites, batch_of(model, TOKENS), edit)
    return [*inputs.values(), WholeRun(model, batch_of(model, TOKENS)).edited_logits([edit])]


def score(model):
    case = Case([3, 17, 3], [[5, 1], [8]])
    return [score_targets(model, [case], edits=[edit_of(model)], rows=[0]).nll]


@UNRAISABLE
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("job", "trials"), [(capture, 60), (search, 25), (score, 15)])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_came(models, name, job, trials, times):
    """Half of the interrupts come where a job ends and takes its changes back."""
    model = models(name)
    want, logits = job(model), model(TOKENS)
    before = state(model)
    counted = Interrupts()
    assert interrupted(job, model, counted) is None and state(model) == before
    ends = max(i for i, j in pairwise([0, *counted.restoring]) if j - i > 1)
    hits = 0
    for seed in range(trials):
        rng = random.Random(f"{name} {job.__name__} {times} {seed}")
        first = rng.randint(ends if seed % 2 else 1, counted.passed)
        second = rng.randint(1, 40) if times == 2 else 0
        error = interrupted(job, model, Interrupts(first, second))
        assert state(model) == before, f"seed {seed}: interrupted at {first}, then {second}"
        hits += error is not None
        del error
    assert hits > 0.9 * trials
    with torch.no_grad():
        assert torch.equal(model(TOKENS), logits)
    assert all(map(torch.equal, job(model), want))


@UNRAISABLE
@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="a bridge has its HookPoints")
@pytest.mark.parametrize("function", ["add_hook_points", "remove_hook_points"])
def test_hook_points_come_and_go_together(models, function):
    model = models("hooked-llama")
    change = getattr(tlb, function)
    undo = tlb.add_hook_points if function == "remove_hook_points" else tlb.remove_hook_points
    undo(model)
    counted = Interrupts()
    names_before = set(model.hook_dict)
    interrupted(change, model, counted)
    names_after = set(model.hook_dict)
    logits = model(TOKENS)
    for seed in range(60):
        undo(model)
        first = random.Random(seed).randint(1, counted.passed)
        interrupted(change, model, Interrupts(first))
        assert set(model.hook_dict) in (names_before, names_after), first
        assert torch.equal(model(TOKENS), logits)
    tlb.remove_hook_points(model)
