"""Several threads on one model, and on several."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from helpers.versions import MODELS

import tl_backward as tlb
from tl_backward import _turns
from tl_backward._turns import take_turn
from tl_backward._undo import Undo
from tl_backward.capture.batch import batch_of
from tl_backward.editing.runs import WholeRun, weight_inputs

TEXTS = [[3, 17, 3, 29, 8, 0], [5, 1], [9, 30, 2, 11], [7, 7, 20, 3, 1, 12, 4]]
TARGET = 5
THREADS, TIMES = 4, 2


@pytest.fixture(params=MODELS)
def model(models, request):
    return models(request.param)


@contextmanager
def many_switches():
    """Threads that take turns after a few instructions each."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(function, arguments):
    with many_switches(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, arguments))


def capture(model, text, **options):
    _, cache = tlb.run_with_backward_cache(model, torch.tensor([text]), TARGET, **options)
    return [tensor for g in cache.values() for tensor in (g.inputs, g.vjps)]


def equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_captures_of_one_model(model):
    want = [capture(model, text) for text in TEXTS]
    got = in_threads(lambda i: capture(model, TEXTS[i % len(TEXTS)]), range(TIMES * len(TEXTS)))
    for i, tensors in enumerate(got):
        assert equal(tensors, want[i % len(TEXTS)])


def test_hooks_of_one_capture_are_not_those_of_another(model):
    """Each capture is patched by a factor of its own, forward and backward."""
    factors = [0.5, 1.5, 2.0]

    def patched(factor):
        return capture(
            model,
            TEXTS[0],
            fwd_hooks=[("blocks.1.mlp.out.hook_in", lambda tensor, hook: factor * tensor)],
            bwd_hooks=[("blocks.0.attn.o.hook_out", lambda vjp, hook: factor * vjp)],
        )

    want = [patched(factor) for factor in factors]
    got = in_threads(lambda i: patched(factors[i % 3]), range(6))
    for i, tensors in enumerate(got):
        assert equal(tensors, want[i % 3])


@pytest.mark.parametrize("grad", [True, False])
def test_forward_passes_beside_captures(model, grad):
    """A thread that only runs the model gets its logits, and none of its tensors is captured."""

    def logits(text):
        with torch.set_grad_enabled(grad):
            return model(torch.tensor([text])).detach()

    want, want_logits = [capture(model, t) for t in TEXTS], [logits(t) for t in TEXTS]

    def run(i):
        which = i // 2 % len(TEXTS)
        if i % 2:
            return torch.equal(logits(TEXTS[which]), want_logits[which])
        return equal(capture(model, TEXTS[which]), want[which])

    assert all(in_threads(run, range(2 * TIMES * len(TEXTS))))


def test_edits_and_searches_beside_captures(model):
    sites = tlb.weight_sites(model, "W_out", [1])
    tokens = torch.tensor(TEXTS[:1])
    batch = batch_of(model, tokens)
    edit = tlb.gradient_step(
        tlb.run_with_backward_cache(model, tokens, TARGET)[1], lr=0.1, model=model
    )
    jobs = [
        lambda: capture(model, TEXTS[0]),
        lambda: list(weight_inputs(model, sites, batch).values()),
        lambda: list(weight_inputs(model, sites, batch, edit).values()),
        lambda: [WholeRun(model, batch).edited_logits([edit])],
    ]
    want = [job() for job in jobs]
    got = in_threads(lambda i: jobs[i % len(jobs)](), range(TIMES * len(jobs)))
    for i, tensors in enumerate(got):
        assert equal(tensors, want[i % len(jobs)])


def test_captures_of_several_models(models):
    each = [models(name) for name in MODELS]
    want = [capture(model, TEXTS[0]) for model in each]
    got = in_threads(lambda i: capture(each[i % len(each)], TEXTS[0]), range(TIMES * len(each)))
    for i, tensors in enumerate(got):
        assert equal(tensors, want[i % len(each)])


def test_captures_of_several_models_run_at_the_same_time(models):
    """Each waits, in a hook, until the other is there as well."""
    both = threading.Barrier(2)

    def wait(tensor, hook):
        both.wait(timeout=60)

    def run(model):
        return capture(model, TEXTS[0], fwd_hooks=[("blocks.0.hook_mlp_out", wait)])

    first, second = models(MODELS[0]), models(MODELS[1])
    got = in_threads(run, [first, second])
    assert equal(got[0], capture(first, TEXTS[0])) and equal(got[1], capture(second, TEXTS[0]))


def test_a_thread_waits_for_its_turn(model):
    order = []

    def other():
        capture(model, TEXTS[1])
        order.append("other")

    thread = threading.Thread(target=other)

    def begin(tensor, hook):
        if not thread.ident:
            thread.start()
            thread.join(timeout=0.05)
            order.append("this")

    capture(model, TEXTS[0], fwd_hooks=[("blocks.0.hook_mlp_out", begin)])
    thread.join()
    assert order == ["this", "other"]


def leave_behind(model, undone):
    """A turn that is never ended."""
    undo = Undo()
    take_turn(model, undo)
    undo.add(undone.append, True)
    return undo


@pytest.mark.parametrize("still_referenced", [True, False])
@pytest.mark.parametrize("in_another_thread", [True, False])
def test_what_was_left_behind_is_undone_at_the_next_turn(in_another_thread, still_referenced):
    """Unless it may be going on: in this thread, and referenced."""
    model, undone, left = torch.nn.Linear(2, 3), [], []

    def leave():
        left.append(leave_behind(model, undone))

    if in_another_thread:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    else:
        leave()
    if not still_referenced:
        left.clear()
    assert not undone
    with Undo() as undo:
        take_turn(model, undo)
        assert bool(undone) == (in_another_thread or not still_referenced)
    with suppress(IndexError), left.pop():
        pass
    assert undone and model not in _turns._turns


def test_turns_keep_no_model_alive():
    models = [torch.nn.Linear(2, 3) for _ in range(3)]
    for model in models:
        with Undo() as undo:
            take_turn(model, undo)
            assert model in _turns._turns
    before = weakref.ref(models[0])
    del models, model, undo
    gc.collect()
    assert before() is None
