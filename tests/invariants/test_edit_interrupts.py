"""Interrupts at random points of applying and reverting edits: no weight stays changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from helpers.edits import random_edit, same_bits, weights
from helpers.versions import CLASSES

from tl_backward.editing import WeightEdit, edit_hooks, fine_tune
from tl_backward.editing._weight_change import WeightChange

N_TRIES = 60
PLACES = ("/tl_backward/", "/contextlib.py", "/torch/utils/")
NAMES = ("blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "blocks.1.attn.W_Q")


@pytest.fixture(autouse=True)
def grad_mode_is_put_back():
    """An interrupt inside of ``torch.no_grad`` itself leaves gradients off for the thread."""
    yield
    torch.set_grad_enabled(True)


class Interrupts:
    """Raises a KeyboardInterrupt at the given numbers of the events that Python traces.

    Events are the calls, lines and returns of functions in ``PLACES``. Python stops tracing when a
    trace function raises; the profile function takes it up again at once.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.count = set(numbers), 0

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not any(place in frame.f_code.co_filename for place in PLACES):
            return None
        self.count += 1
        if self.count in self.numbers:
            raise KeyboardInterrupt
        return self.trace

    def take_up(self, frame: Any, event: str, arg: Any) -> None:
        if sys.gettrace() is None:
            frame.f_trace = self.trace
            sys.settrace(self.trace)

    def __call__(self, function: Callable[[], Any]) -> bool:
        """Whether the function was interrupted."""
        traced, unraisable = sys.gettrace(), sys.unraisablehook
        sys.unraisablehook = lambda _: None  # pytest's own keeps the frames of finalizers
        try:
            sys.settrace(self.trace)
            sys.setprofile(self.take_up)
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
            sys.settrace(traced)
            sys.unraisablehook = unraisable
        return False


def events_of(function: Callable[[], Any]) -> int:
    """How many events a run has that nothing interrupts and that is not the first."""
    function()
    run = Interrupts()
    assert not run(function)
    return run.count


@pytest.fixture(params=[f"{cls}-gpt2" for cls in CLASSES])
def model(models, request):
    return models(request.param)


@pytest.fixture
def edit(model) -> WeightEdit:
    return sum((random_edit(model, n) for n in NAMES[1:]), random_edit(model, NAMES[0]))


def with_edit_applied(edit: WeightEdit) -> None:
    with edit.applied():
        pass


@pytest.mark.parametrize("n_interrupts", [1, 2, 3])
def test_the_weights_are_back_after_the_block(model, edit, n_interrupts):
    """However many interrupts come one after the other, wherever the first one comes."""
    rng = random.Random(n_interrupts)
    before = weights(model)
    n_events, n_interrupted = events_of(lambda: with_edit_applied(edit)), 0
    for _ in range(N_TRIES):
        first = rng.randrange(1, n_events)
        following = [first + sum(rng.choices([1, 2, 7, 40], k=k)) for k in range(1, n_interrupts)]
        n_interrupted += Interrupts(first, *following)(lambda: with_edit_applied(edit))
        assert same_bits(weights(model), before), (first, following)
        assert not edit.is_applied
    assert n_interrupted > 0.9 * N_TRIES


def test_apply_changes_all_weights_or_none(model, edit):
    """And an edit that says that it is applied can be reverted."""
    rng = random.Random(0)
    before = weights(model)
    with edit.applied():
        after = weights(model)

    run = Interrupts()
    assert not run(edit.apply)
    edit.revert()
    for _ in range(N_TRIES):
        Interrupts(first := rng.randrange(1, run.count))(edit.apply)
        assert same_bits(weights(model), after if edit.is_applied else before), first
        if edit.is_applied:
            edit.revert()
    assert same_bits(weights(model), before)


def test_revert_restores_all_weights_or_none(model, edit):
    rng = random.Random(0)
    before = weights(model)
    edit.apply()
    after, run = weights(model), Interrupts()
    assert not run(edit.revert)
    for _ in range(N_TRIES):
        if not edit.is_applied:
            edit.apply()
        Interrupts(first := rng.randrange(1, run.count))(edit.revert)
        assert same_bits(weights(model), after if edit.is_applied else before), first
    with suppress(RuntimeError):
        edit.revert()
    assert same_bits(weights(model), before)


def test_nested_edits_of_one_weight(model):
    rng = random.Random(0)
    one, other = (random_edit(model, NAMES[0], seed=seed) for seed in (0, 1))
    before = weights(model)

    def both() -> None:
        with one.applied(), other.applied():
            pass

    n_events = events_of(both)
    for _ in range(N_TRIES):
        Interrupts(first := rng.randrange(1, n_events))(both)
        assert same_bits(weights(model), before), first
        assert not one.is_applied and not other.is_applied


def test_after_a_storm_of_interrupts_the_edit_knows_whether_it_is_applied(model, edit):
    """One at every line or at every few: no undoing can come to its end, but revert() is left."""
    rng = random.Random(0)
    before = weights(model)
    n_events = events_of(lambda: with_edit_applied(edit))
    for _ in range(N_TRIES):
        first = rng.randrange(n_events // 2, n_events)
        storm = range(first, first + 200, rng.choice([1, 2, 3, 5]))
        Interrupts(*storm)(lambda: with_edit_applied(edit))
        if edit.is_applied:
            edit.revert()
        assert same_bits(weights(model), before), storm


@pytest.mark.parametrize("mend", ["revert", "apply", "applied"])
def test_half_an_undoing_is_finished_by_the_next_call(model, edit, monkeypatch, mend):
    before, undone = weights(model), []
    undo = WeightChange.undo

    def only_once(self, parameter):
        if undone:
            raise KeyboardInterrupt
        undone.append(self)
        undo(self, parameter)

    monkeypatch.setattr(WeightChange, "undo", only_once)
    with pytest.raises(KeyboardInterrupt), edit.applied():
        after = weights(model)
    monkeypatch.undo()
    assert edit.is_applied and not same_bits(weights(model), before)
    if mend == "revert":
        edit.revert()
    elif mend == "apply":
        edit.apply()
        assert same_bits(weights(model), after)
        edit.revert()
    else:
        with edit.applied():
            assert same_bits(weights(model), after)
    assert same_bits(weights(model), before) and not edit.is_applied


def test_no_weight_changes_where_hooks_are_made_or_steps_taken(model, edit):
    rng = random.Random(0)
    before, tokens = weights(model), torch.tensor([3, 17, 3, 29])
    steps = {"lr": 0.1, "weights": "W_out", "layers": 1, "max_steps": 1}
    for function, n_tries in (
        (lambda: edit_hooks(model, [edit, 2 * edit], [0, 1]), 30),
        (lambda: fine_tune(model, tokens, 5, **steps), 8),
    ):
        n_events = events_of(function)
        for _ in range(n_tries):
            Interrupts(rng.randrange(1, n_events))(function)
            assert same_bits(weights(model), before)
