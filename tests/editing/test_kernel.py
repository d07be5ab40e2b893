"""The kernel of the editors against the formulae of their sources, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import relative_error

from tl_backward.editing._kernel import kernel, update

D_IN, D_OUT, N = 13, 5, 3
GENERATOR = torch.Generator().manual_seed(2)


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


SAMPLE = drawn(40, D_IN)
C = SAMPLE.mT @ SAMPLE / len(SAMPLE)


def whitened(x):
    return torch.linalg.solve(C, x.mT).mT


def test_rome():
    """dW = outer(C^-1 kbar, v* - k W) / (k . C^-1 kbar)."""
    mean, plain, change = drawn(1, D_IN), drawn(1, D_IN), drawn(1, D_OUT)
    weighted = torch.linalg.solve(C, mean[0])
    expected = torch.outer(weighted, change[0]) / plain[0].dot(weighted)
    got = update(kernel(mean, whitened, probes=plain), change).dense()
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("weight", [0.5, 20_000.0])
def test_memit(weight):
    """dW^T = R^T K^T (weight C + K K^T)^-1."""
    K, R = drawn(N, D_IN), drawn(N, D_OUT)
    expected = torch.linalg.solve(weight * C + K.mT @ K, K.mT) @ R
    got = update(kernel(K, whitened, ridge=weight), R).dense()
    assert relative_error(got, expected) <= 1e-12


def test_alpha_edit_with_earlier_keys():
    """dW = (P (K K^T + cache) + l2 I)^-1 P K R."""
    K, R, cached = drawn(N, D_IN), drawn(N, D_OUT), drawn(4, D_IN)
    Q = torch.linalg.qr(drawn(D_IN, 8)).Q
    P, identity = Q @ Q.mT, torch.eye(D_IN, dtype=torch.float64)
    inner = P @ (K.mT @ K + cached.mT @ cached) + 10 * identity
    expected = torch.linalg.solve(inner, P @ K.mT @ R)
    rows = kernel(torch.cat([K, cached]), lambda x: x @ P, ridge=10)
    assert relative_error(update(rows[:N], R).dense(), expected) <= 1e-12


def test_each_keys_output_changes_by_its_own_row():
    K, R = drawn(N, D_IN), drawn(N, D_OUT)
    for metric in (None, whitened):
        dW = update(kernel(K, metric), R).dense()
        torch.testing.assert_close(K @ dW, R)


def test_the_change_is_the_smallest_there_is():
    """Without a metric, the pseudo-inverse's."""
    K, R = drawn(N, D_IN), drawn(N, D_OUT)
    expected = torch.linalg.pinv(K) @ R
    assert relative_error(update(kernel(K), R).dense(), expected) <= 1e-12


def test_equal_keys_are_refused_unless_there_is_a_ridge():
    key = drawn(1, D_IN)
    twice = torch.cat([key, key])
    with pytest.raises(ValueError, match="do not tell its facts apart"):
        kernel(twice)
    expected = torch.linalg.solve(twice.mT @ twice + torch.eye(D_IN).double(), twice.mT).mT
    torch.testing.assert_close(kernel(twice, ridge=1.0), expected)
