"""Inside autocast: what the package computes itself is computed in full precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.texts import PROMPT, TARGET
from helpers.versions import NEEDS_BRIDGE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_backward as tlb
from tl_backward.capture.batch import batch_of
from tl_backward.editing import WeightEdit
from tl_backward.editing.runs import weight_inputs
from tl_backward.factors import GradientFactors

pytestmark = NEEDS_BRIDGE

TOKENS = torch.tensor([[3, 17, 3, 29, 8, 9]])
FLOAT32 = 3e-6
"""Relative error of a few float32 operations; bfloat16 has 4e-3 for each."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.fixture
def model(boot, kind):
    return boot(kind, torch.float32)


OPERATIONS: dict[str, Callable[[GradientFactors, GradientFactors], Tensor]] = {
    "dense": lambda g, h: g.dense(),
    "singular values": lambda g, h: g.singular_values(),
    "svd": lambda g, h: g.svd().U.double() * g.svd().S @ g.svd().Vh.double(),
    "norm": lambda g, h: g.norm(),
    "inner": lambda g, h: g.inner(h),
    "cosine": lambda g, h: g.cosine(h),
    "vector": lambda g, h: g @ h.vjps[0],
    "matrix": lambda g, h: g @ h.vjps.mT,
    "truncation": lambda g, h: g.truncate(2).dense(),
    "sum": lambda g, h: (g + h).dense(),
    "multiple": lambda g, h: (0.3 * g).dense(),
    "transpose": lambda g, h: g.T.dense(),
    "rank": lambda g, h: torch.tensor(float((g + -1 * g + h).rank(1e-5))),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("n", [3, 40], ids=["factored", "dense"])
def test_every_operation_of_factors(name, n):
    """Against the same operation of the same numbers in float64, which autocast leaves alone."""
    g, h = (GradientFactors(randn(n, 7, seed=i), randn(n, 5, seed=9 - i)) for i in (0, 1))
    exact = OPERATIONS[name](*(GradientFactors(a.inputs.double(), a.vjps.double()) for a in (g, h)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = OPERATIONS[name](g, h)
        assert torch.is_autocast_enabled("cpu")
    assert error(got, exact.double()) <= FLOAT32


def update(site, seed: int = 0) -> GradientFactors:
    return GradientFactors(randn(3, site.d_in, seed=seed), randn(3, site.d_out, seed=seed + 1))


def test_applied_edits_and_their_norm(model):
    for site in tlb.weight_sites(model, layers=1):
        edit, before = WeightEdit(model, {site.name: update(site)}), site.parameter.detach().clone()
        dense = update(site).inputs.double().mT @ update(site).vjps.double()
        exact = before.double() + site.to_parameter_layout(dense)
        with torch.autocast("cpu"):
            norm = edit.norm()
            with edit.applied():
                assert error(site.parameter.detach(), exact) <= FLOAT32, site.name
        assert error(norm, dense.norm()) <= FLOAT32
        assert torch.equal(site.parameter, before)


@pytest.mark.parametrize("with_grad", [False, True])
def test_applied_edits_act_on_a_model_that_has_run_before(model, with_grad):
    """Autocast keeps what it has cast; what is kept has to go with the weight."""
    site = tlb.weight_sites(model, "W_out", 1)[0]
    edit = WeightEdit(model, {site.name: update(site)})
    with torch.set_grad_enabled(with_grad):
        with torch.autocast("cpu"):
            before = model(TOKENS)
            with edit.applied():
                edited = model(TOKENS)
            after = model(TOKENS)
        with edit.applied(), torch.autocast("cpu"):
            expected = model(TOKENS)
    assert torch.equal(edited, expected) and torch.equal(after, before)
    assert error(edited.detach(), before.detach().double()) > 1e-2


def test_edits_by_hooks(model):
    """The hooks themselves, called with an input and an output of float32."""
    for site in tlb.weight_sites(model, layers=1):
        g, x, y = update(site), randn(1, 6, site.d_in, seed=5), randn(1, 6, site.d_out, seed=6)
        (_, note), (_, add) = WeightEdit(model, {site.name: g}).fwd_hooks()
        with torch.autocast("cpu"):
            note(x, hook=None)
            got = add(y, hook=None)
        exact = y.double() + x.double() @ g.inputs.double().mT @ g.vjps.double()
        assert error(got, exact) <= FLOAT32, site.name


def test_captured_gradients_and_a_step_along_them(model):
    """The factors are what the model computed under autocast; nothing behind them is rounded."""
    with torch.autocast("cpu"):
        _, cache = tlb.run_with_backward_cache(model, TOKENS, 5)
        step = tlb.gradient_step(cache, lr=0.1, model=model)
        for name, g in cache.items():
            X, D = (side.double().flatten(0, -2) for side in (g.inputs, g.vjps))
            assert error(g.dense(), X.mT @ D) <= FLOAT32, name
            assert error(step.factors[name].dense(), -0.1 * (X.mT @ D)) <= FLOAT32, name


def test_losses(model):
    """From the logits of bfloat16 that the model gives under autocast, in float32."""
    seen: list[Tensor] = []
    hooks = [("unembed.hook_out", lambda logits, hook: seen.append(logits.detach()))]
    other = randn(1, 6, model.cfg.d_vocab)
    with torch.autocast("cpu"):
        nll, _ = tlb.run_with_backward_cache(model, TOKENS, 5, fwd_hooks=hooks)
        text, _ = tlb.run_with_backward_cache(model, TOKENS, loss_fn=tlb.lm_cross_entropy_loss)
        kl, _ = tlb.run_with_backward_cache(model, TOKENS, loss_fn=tlb.kl_divergence(other))
    assert seen[0].dtype == torch.bfloat16
    log_probs = seen[0].double().log_softmax(-1)[0]
    wanted = other.double().log_softmax(-1)[0, -1]
    assert error(nll.reshape(()), -log_probs[-1, 5]) <= FLOAT32
    assert error(kl.reshape(()), (wanted.exp() * (wanted - log_probs[-1])).sum()) <= 10 * FLOAT32
    of_text = -log_probs[:-1].gather(-1, TOKENS[0, 1:, None]).mean()
    assert error(text.reshape(()), of_text) <= FLOAT32


def test_key_statistics(model):
    sites = tlb.weight_sites(model, "W_out", [0, 1])
    with torch.autocast("cpu"):
        statistics = tlb.key_statistics(model, [TOKENS[0]], [0, 1])
        inputs = weight_inputs(model, sites, batch_of(model, TOKENS))
        keys = {site.name: statistics.whitened(site.name, randn(2, site.d_in)) for site in sites}
    for site in sites:
        X = inputs[site.name][0].double()
        C = X.mT @ X / len(X)
        assert error(statistics.second_moments[site.name], C) <= FLOAT32
        stored = statistics.second_moments[site.name].double()
        ridged = stored + 0.01 * stored.diagonal().mean() * torch.eye(site.d_in)
        x = randn(2, site.d_in).double()
        solved = torch.linalg.solve(ridged, x.mT).mT
        scale = x.square().sum(-1) / (x * solved).sum(-1)
        assert error(keys[site.name], scale[:, None] * solved) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"apply_ln": False}], ids=str)
def test_the_lens_reads_alike(model, options):
    """The same vectors, inside and outside of autocast, to the bit."""
    lens, J = tlb.BackwardLogitLens(model), randn(model.cfg.d_model, model.cfg.d_model)
    vectors = randn(4, model.cfg.d_model)
    _, cache = tlb.run_with_backward_cache(model, PROMPT, TARGET)
    options = options | {"lens": lambda rows, layer: rows @ J, "top_k": 7, "return_type": "logits"}
    plain = lens.read(vectors, targets=[5, 6], **options)
    of_cache = lens(cache=cache, **options)
    with torch.autocast("cpu"):
        cast = lens.read(vectors, targets=[5, 6], **options)
        of_cache_cast = lens(cache=cache, **options)
    pairs = [(plain, cast), *((of_cache[kind], of_cache_cast[kind]) for kind in ("W_in", "W_out"))]
    for one, other in pairs:
        for field in ("top_ids", "top_values", "bottom_ids", "target_ranks", "target_values"):
            torch.testing.assert_close(
                getattr(other, field), getattr(one, field), rtol=0, atol=0, equal_nan=True
            )


# numbers whose squares are no floats

SIZES = st.integers(-36, 36)


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_norms_and_cosines_of_any_size(of_inputs, of_vjps, n, dtype):
    """Wherever the number is one of float32: against float64, which has room for the squares."""
    size = of_inputs + of_vjps
    X, D = randn(n, 6, seed=n) * 10.0**of_inputs, randn(n, 5, seed=n + 1) * 10.0**of_vjps
    g = GradientFactors(X.to(dtype), D.to(dtype))
    other = GradientFactors(randn(n, 6, seed=7), randn(n, 5, seed=8))
    dense = g.inputs.double().mT @ g.vjps.double()
    unit = dense / dense.norm()
    of_other = other.inputs.double().mT @ other.vjps.double()
    cosine = (unit * of_other).sum() / of_other.norm()
    torch.testing.assert_close(g.cosine(other).double(), cosine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g.cosine(g), torch.tensor(1.0), rtol=0, atol=1e-5)
    if abs(size) <= 35:
        assert error(g.norm(), dense.norm()) <= 1e-4
        inner = (dense * of_other).sum()
        assert abs(g.inner(other).double() - inner) <= 1e-4 * dense.norm() * of_other.norm()


def test_the_norm_of_a_large_edit(model):
    sites = tlb.weight_sites(model, "W_out")
    for scale in (1e21, 1e-25):
        edit = WeightEdit(model, {s.name: scale * update(s, i) for i, s in enumerate(sites)})
        exact = [(g.inputs.double().mT @ g.vjps.double()).norm() for g in edit.factors.values()]
        assert error(edit.norm(), torch.tensor(math.hypot(*exact))) <= FLOAT32


def test_the_lens_takes_short_vectors_for_vectors(model):
    """Of 1e-30, whose squares vanish, and of 1e30, whose squares overflow."""
    lens, unit = tlb.BackwardLogitLens(model), randn(1, model.cfg.d_model)
    zero = torch.zeros_like(unit)
    read = lens.read(
        torch.cat([1e-30 * unit, unit, 1e30 * unit, zero]), normalize=True, return_type="logits"
    )
    assert read.zero_mask.tolist() == [False, False, False, True]
    exact = unit.double().norm() * torch.tensor([1e-30, 1, 1e30]).double()
    torch.testing.assert_close(read.norms[:3].double(), exact)
    for row in (0, 2):
        torch.testing.assert_close(read.top_values[row], read.top_values[1], rtol=1e-4, atol=1e-4)
