"""The algebra of `GradientFactors` against dense linear algebra in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tl_backward.factors import GradientFactors

# Error allowed relative to the natural scale of a result, e.g. the product of the factors' norms:
# about 100 (float32) and 1000 (float64) machine epsilons of the precision computed in, where at
# most 40 rows of at most 8 numbers lose around 10. Half precision is computed with in float32; one
# rounding to it would cost 5e-4 (float16) or 4e-3 (bfloat16), a Gram root 3e-4 (float32).
TOL = {torch.float64: 2e-13, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
COMPUTED_IN = dict.fromkeys(TOL, torch.float32) | {torch.float64: torch.float64}

algebra = settings(deadline=None, derandomize=True, max_examples=100, database=None)


# ----- generated gradients -----


@dataclass(frozen=True)
class Case:
    g: GradientFactors

    @property
    def dtype(self) -> torch.dtype:
        return self.g.inputs.dtype

    @property
    def tol(self) -> float:
        return TOL[self.dtype]

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.g.inputs.shape[:-2])

    @property
    def dense(self) -> Tensor:
        return outer_sum(self.g.inputs, self.g.vjps)

    @property
    def scale(self) -> float:
        """An upper bound of the gradient's norm that does not shrink where rows cancel."""
        return float(self.g.inputs.double().norm() * self.g.vjps.double().norm())


def outer_sum(inputs: Tensor, vjps: Tensor) -> Tensor:
    """The dense gradient in float64, one outer product at a time."""
    X, D = (rows.double().reshape(-1, rows.shape[-1]) for rows in (inputs, vjps))
    total = torch.zeros(X.shape[1], D.shape[1], dtype=torch.float64)
    for x, delta in zip(X, D, strict=True):
        total += torch.outer(x, delta)
    return total


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient(*rows: int, d_in: int = 4, d_out: int = 3, **kwargs: Any) -> GradientFactors:
    X, D = randn(*rows, d_in + d_out, **kwargs).split([d_in, d_out], dim=-1)
    return GradientFactors(X, D)


@st.composite
def factors(draw: st.DrawFn, batch: tuple[int, ...], n: int, d: int, dtype: torch.dtype) -> Tensor:
    rows = randn(*batch, n, d, seed=draw(st.integers(0, 999)))
    pattern = draw(st.sampled_from(["plain", "zero rows", "repeated rows", "strided", "zero"]))
    if pattern == "zero rows":
        rows[..., ::2, :] = 0
    elif pattern == "repeated rows":
        rows = rows[..., torch.arange(n) // 3, :]
    elif pattern == "strided":
        rows = rows.mT.contiguous().mT
    elif pattern == "zero":
        rows = rows * 0
    largest = 4 if dtype == torch.float16 else 6
    return (rows * 10.0 ** draw(st.sampled_from([0, -6, -3, 3, largest]))).to(dtype)


@st.composite
def cases(
    draw: st.DrawFn,
    shape: tuple[int, int] | None = None,
    batch: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Case:
    dims = st.lists(st.integers(1, 8), min_size=2, max_size=2, unique=True)
    d_in, d_out = shape or draw(dims)
    if batch is None:
        batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    dtype = dtype or draw(st.sampled_from(list(TOL)))
    n = draw(st.integers(1, 10))
    X, D = (draw(factors(batch, n, d, dtype)) for d in (d_in, d_out))
    return Case(GradientFactors(X, D))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Case, Case]:
    a = draw(cases())
    return a, draw(cases(shape=a.g.shape, batch=a.batch, dtype=a.dtype))


def assert_close(actual: Tensor, expected: Tensor | float, atol: float, dtype: torch.dtype) -> None:
    """`actual` has the dtype that was computed in and is within `atol` in Frobenius norm."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.dtype == COMPUTED_IN[dtype]
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= atol, f"off by {error:.3g}, allowed {atol:.3g}:\n{actual}\nis not\n{expected}"


def dense_singular_values(case: Case) -> Tensor:
    return torch.from_numpy(np.linalg.svd(case.dense.numpy(), compute_uv=False))


# ----- what the factors stand for -----


@algebra
@given(cases())
def test_dense_and_shape(case: Case):
    assert case.g.shape == tuple(case.dense.shape)
    assert_close(case.g.dense(), case.dense, case.tol * case.scale, case.dtype)


@algebra
@given(cases())
def test_transpose(case: Case):
    assert case.g.T.shape == case.g.shape[::-1]
    assert_close(case.g.T.dense(), case.dense.T, case.tol * case.scale, case.dtype)


@algebra
@given(cases(), st.integers(0, 4), st.sampled_from([torch.float64, torch.float32]))
def test_matmul(case: Case, m: int, v_dtype: torch.dtype):
    """`m = 0` stands for a vector; its dtype gives way to the one computed in."""
    v = randn(case.g.shape[1], *([m] if m else []), seed=m, dtype=v_dtype)
    atol = case.tol * case.scale * float(v.norm())
    if case.dtype == torch.float64:
        assert_close(case.g @ v, case.dense @ v.double(), atol, case.dtype)
    else:
        assert_close(case.g @ v, case.dense @ v.float().double(), atol, case.dtype)


@algebra
@given(cases(batch=(3,)) | cases(batch=(1,)) | cases(batch=(2, 2)))
def test_example(case: Case):
    g = case.g
    for b in range(case.batch[0]):
        one = Case(g.example(b))
        assert one.batch == case.batch[1:]
        expected = outer_sum(g.inputs[b], g.vjps[b])
        assert_close(one.g.dense(), expected, case.tol * case.scale, case.dtype)
    if len(case.batch) == 2:
        assert torch.equal(g.example(1).example(0).inputs, g.inputs[1, 0])


@pytest.mark.parametrize(
    ("of_inputs", "of_vjps", "result"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_precision(of_inputs: torch.dtype, of_vjps: torch.dtype, result: torch.dtype):
    g = GradientFactors(randn(5, 4, dtype=of_inputs), randn(5, 3, seed=1, dtype=of_vjps))
    case = Case(g)
    assert_close(g.dense(), case.dense, TOL[result] * case.scale, result)
    assert_close(g.norm(), case.dense.norm(), TOL[result] * case.scale, result)
    assert g.svd().U.dtype == result


def test_repr_names_shape_tokens_and_batch():
    assert "shape=(4, 3), n=5, dtype=torch.float64" in repr(gradient(5))
    assert "n=5, batch=(2,)" in repr(gradient(2, 5))


# ----- singular values -----


@algebra
@given(cases())
def test_singular_values(case: Case):
    rows = math.prod(case.batch) * case.g.inputs.shape[-2]
    k = min(rows, *case.g.shape)
    S = case.g.singular_values()
    expected = dense_singular_values(case)
    assert_close(S, expected[:k], case.tol * case.scale, case.dtype)
    assert (S.diff() <= 0).all() and (S >= 0).all()
    assert expected[k:].norm() <= TOL[torch.float64] * case.scale  # Lemma 4.1


@algebra
@given(cases())
def test_svd(case: Case):
    U, S, Vh = case.g.svd()
    k = len(S)
    assert_close(S, dense_singular_values(case)[:k], case.tol * case.scale, case.dtype)
    assert (S.diff() <= 0).all() and (S >= 0).all()
    assert_close((U * S) @ Vh, case.dense, case.tol * case.scale, case.dtype)
    assert_close(U.mT @ U, torch.eye(k), case.tol, case.dtype)
    assert_close(Vh @ Vh.mT, torch.eye(k), case.tol, case.dtype)


@algebra
@given(cases())
def test_rank_is_at_most_the_number_of_tokens(case: Case):
    """Lemma 4.1."""
    rank = case.g.rank()
    assert isinstance(rank, int)
    assert rank <= min(math.prod(case.batch) * case.g.inputs.shape[-2], *case.g.shape)
    if case.scale == 0:
        assert rank == 0


@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("batch", [(), (1,), (4,)])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_rank_of_repeated_rows(r: int, batch: tuple[int, ...], dtype: torch.dtype):
    X, D = randn(r, 9, dtype=dtype), randn(r, 7, seed=1, dtype=dtype)
    token = (torch.arange(12) % r).expand(*batch, -1)
    for scale in (1e-3, 1, 1e3):
        assert GradientFactors(X[token] * scale, D[token]).rank() == r
    assert GradientFactors(X[token], D[torch.zeros_like(token)]).rank() == 1


def known_spectrum(S: Tensor, n: int, d_in: int, d_out: int, dtype: torch.dtype) -> Case:
    """Factors whose gradient has the singular values `S`, spread over all of `n` tokens."""
    r = len(S)
    U, V = (torch.linalg.qr(randn(d, r, seed=d)).Q for d in (d_in, d_out))
    mix = torch.linalg.qr(randn(n, r, seed=n)).Q
    return Case(GradientFactors((mix @ U.mT).to(dtype), ((mix * S) @ V.mT).to(dtype)))


def test_rank_counts_singular_values_above_rtol_times_the_largest():
    g = known_spectrum(0.5 ** torch.arange(6), n=11, d_in=8, d_out=6, dtype=torch.float64).g * 1e3
    assert g.rank() == 6
    assert [g.rank(rtol=1.5 * 0.5**j) for j in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert g.rank(rtol=0.0) == 6
    assert g.T.rank(rtol=0.1) == g.rank(rtol=0.1) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_default_rtol_is_the_one_of_torch(dtype: torch.dtype):
    eps = torch.finfo(dtype).eps
    for factor, rank in ((0.25, 1), (4, 2)):  # of max(d_in, d_out) * eps
        X = torch.eye(2, 50, dtype=dtype)
        D = torch.eye(2, 9, dtype=dtype) * torch.tensor([[1.0], [factor * 50 * eps]], dtype=dtype)
        g = GradientFactors(X, D)
        assert g.rank() == g.T.rank() == torch.linalg.matrix_rank(g.dense()) == rank
        assert g.rank(rtol=0.0) == 2


# ----- truncation -----


@algebra
@given(cases())
def test_truncation_error_is_the_tail_of_the_singular_values(case: Case):
    S = dense_singular_values(case)
    for k in range(1, len(case.g.singular_values()) + 1):
        t = case.g.truncate(k)
        assert t.inputs.shape == (k, case.g.shape[0]) and t.vjps.shape == (k, case.g.shape[1])
        kept = outer_sum(t.inputs, t.vjps)
        error = (case.dense - kept).norm()
        assert abs(error - S[k:].norm()) <= case.tol * case.scale
        assert_close(t.singular_values(), S[:k], case.tol * case.scale, case.dtype)


@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(5, 9, 7), (8, 9, 7), (20, 7, 9)])
def test_truncation_is_the_dense_one(n: int, d_in: int, d_out: int, dtype: torch.dtype):
    """Eckart-Young; the singular values are well apart, so that the nearest matrix is unique."""
    case = known_spectrum(0.5 ** torch.arange(5), n, d_in, d_out, dtype)
    U, S, Vh = np.linalg.svd(case.dense.numpy())
    for k in range(1, 6):
        nearest = torch.from_numpy(U[:, :k] * S[:k] @ Vh[:k])
        gap = (S[k - 1] - S[k]) / S[0] if k < len(S) else 1.0
        assert_close(
            case.g.truncate(k).dense(), nearest, case.tol * case.scale / max(gap, 1e-2), dtype
        )


# ----- norm, inner product, cosine -----


@algebra
@given(cases())
def test_norm(case: Case):
    assert_close(case.g.norm(), case.dense.norm(), case.tol * case.scale, case.dtype)


@algebra
@given(pairs())
def test_inner(pair: tuple[Case, Case]):
    a, b = pair
    atol = a.tol * a.scale * b.scale
    assert_close(a.g.inner(b.g), (a.dense * b.dense).sum(), atol, a.dtype)
    assert_close(a.g.inner(a.g), a.dense.norm() ** 2, a.tol * a.scale**2, a.dtype)


def test_inner_takes_gradients_with_different_tokens_and_batches():
    a, b = gradient(2, 5), gradient(3, seed=1)
    expected = (outer_sum(a.inputs, a.vjps) * outer_sum(b.inputs, b.vjps)).sum()
    torch.testing.assert_close(a.inner(b), expected)


@algebra
@given(pairs())
def test_cosine(pair: tuple[Case, Case]):
    a, b = pair
    norms = float(a.dense.norm() * b.dense.norm())
    assume(norms > 1e-3 * a.scale * b.scale > 0)
    atol = a.tol * a.scale * b.scale / norms
    expected = (a.dense * b.dense).sum() / norms
    assert_close(a.g.cosine(b.g), expected, atol, a.dtype)


@algebra
@given(cases())
def test_cosine_to_itself(case: Case):
    norm = float(case.dense.norm())
    assume(norm > 1e-2 * case.scale > 0)
    atol = case.tol * (case.scale / norm) ** 2
    assert_close(case.g.cosine(case.g), 1.0, atol, case.dtype)
    assert_close(case.g.cosine(-2 * case.g), -1.0, atol, case.dtype)
    assert abs(case.g.cosine(case.g)) <= 1


def test_cosine_to_zero_is_nan():
    g = gradient(5)
    assert g.cosine(0 * g).isnan() and (0 * g).cosine(g).isnan()


# ----- sums and multiples -----


@algebra
@given(pairs())
def test_sum(pair: tuple[Case, Case]):
    a, b = pair
    total = a.g + b.g
    assert total.inputs.shape[:-2] == a.batch
    assert total.inputs.shape[-2] == a.g.inputs.shape[-2] + b.g.inputs.shape[-2]
    atol = a.tol * (a.scale + b.scale)
    assert_close(total.dense(), a.dense + b.dense, atol, a.dtype)
    if len(a.batch) == 1:
        first = a.g.example(0).dense().double() + b.g.example(0).dense().double()
        assert_close(total.example(0).dense(), first, atol, a.dtype)


NUMBERS = [3, -1.0, 0.1, 1e-6, 1e6, 0, np.float64(0.3)]


@algebra
@given(cases(), st.sampled_from(NUMBERS + [torch.tensor(float(c)) for c in NUMBERS]))
def test_multiple(case: Case, scalar: float | Tensor):
    """In the precision computed in, also where half precision has no room for the product."""
    c = float(scalar)
    for multiple in (case.g * scalar, scalar * case.g):
        assert isinstance(multiple, GradientFactors)
        atol = abs(c) * case.tol * case.scale
        assert_close(multiple.dense(), c * case.dense, atol, case.dtype)
        assert torch.equal(multiple.inputs, case.g.inputs)


@algebra
@given(cases(), st.sampled_from([1.0, 1 - 2**-10, 1 - 2**-20]))
def test_norm_where_outer_products_cancel(case: Case, c: float):
    """Accurate to the factors' scale times epsilon; the root of a Gram norm only to its root."""
    difference = Case(case.g + (-c) * case.g)
    atol = case.tol * case.scale
    assert_close(difference.g.norm(), difference.dense.norm(), atol, case.dtype)
    if c == 1:
        assert difference.g.norm() <= atol
        assert difference.g.singular_values().norm() <= atol


# ----- TransformerLens -----


@algebra
@given(cases())
def test_factored_matrix(case: Case):
    m = case.g.to_factored_matrix()
    assert tuple(m.shape) == case.g.shape
    assert_close(m.AB, case.dense, case.tol * case.scale, case.dtype)
    S = m.svd()[1]
    k = min(len(S), len(case.g.singular_values()))
    assert_close(S[:k], case.g.singular_values()[:k].double(), case.tol * case.scale, case.dtype)


# ----- costs and side effects -----

OPERATIONS: dict[str, Callable[[GradientFactors], Any]] = {
    "rank": lambda g: g.rank(),
    "singular_values": lambda g: g.singular_values(),
    "svd": lambda g: g.svd(),
    "norm": lambda g: g.norm(),
    "inner": lambda g: g.inner(g),
    "cosine": lambda g: g.cosine(g),
    "vector": lambda g: g @ torch.ones(g.shape[1]),
    "matrix": lambda g: g @ torch.ones(g.shape[1], 2),
    "sum": lambda g: (g + g).vjps,
    "multiple": lambda g: (2 * g).vjps,
    "transpose": lambda g: g.T.inputs,
    "example": lambda g: g.example(0).inputs,
    "truncate": lambda g: g.truncate(2).vjps,
    "factored_matrix": lambda g: g.to_factored_matrix().A,
    "repr": repr,
}
by_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


class LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        numels = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *numels, 0)
        return out


@by_operation
def test_no_dense_matrix_is_formed(operation: Callable[[GradientFactors], Any]):
    g = gradient(1, 3, d_in=400, d_out=500, dtype=torch.float32)
    with LargestOutput() as largest:
        operation(g)
    assert largest.numel <= 2 * 3 * 500


@by_operation
def test_nothing_is_quadratic_in_many_tokens(operation: Callable[[GradientFactors], Any]):
    g = gradient(1, 2000, d_in=9, d_out=8, dtype=torch.float32)
    with LargestOutput() as largest:
        operation(g)
    assert largest.numel <= 2 * 2000 * 9


def test_dense_is_what_forms_it():
    g = gradient(1, 3, d_in=400, d_out=500, dtype=torch.float32)
    with LargestOutput() as largest:
        g.dense()
    assert largest.numel == 400 * 500


@by_operation
@pytest.mark.parametrize("dtype", TOL)
def test_factors_stay_untouched(dtype: torch.dtype, operation: Callable[[GradientFactors], Any]):
    inputs, vjps = randn(2, 3, 5, dtype=dtype), randn(2, 3, 4, seed=1, dtype=dtype)
    before = inputs.clone(), vjps.clone()
    g = GradientFactors(inputs, vjps)
    result = operation(g)
    assert g.inputs is inputs and g.vjps is vjps
    assert g.inputs.dtype == g.vjps.dtype == dtype
    assert inputs._version == vjps._version == 0
    assert torch.equal(inputs, before[0]) and torch.equal(vjps, before[1])
    assert not any(t.requires_grad for t in tree_leaves(result) if isinstance(t, Tensor))


@pytest.mark.parametrize("dtype", TOL)
def test_operations_chain(dtype: torch.dtype):
    case = Case(gradient(2, 6, d_in=5, d_out=4, dtype=dtype))
    g = (case.g + 0.5 * case.g).truncate(4).T * 2
    assert_close(g.dense(), 3 * case.dense.T, 4 * case.tol * case.scale, dtype)
    assert_close(g.cosine(case.g.T), 1.0, 4 * case.tol * case.scale / case.dense.norm(), dtype)


def test_factors_are_frozen():
    with pytest.raises(FrozenInstanceError):
        gradient(5).inputs = torch.zeros(5, 4)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_tokens_are_the_zero_gradient(rows: tuple[int, ...]):
    g = gradient(*rows)
    assert torch.equal(g.dense(), torch.zeros(4, 3))
    assert g.rank() == 0 and g.norm() == 0 and len(g.singular_values()) == 0
    assert torch.equal(g @ torch.ones(3, dtype=torch.float64), torch.zeros(4))


# ----- bad input -----


bad_input = pytest.mark.usefixtures("unchecked")


@bad_input
@pytest.mark.parametrize(
    ("inputs", "vjps"),
    [((5, 4), (6, 3)), ((2, 5, 4), (3, 5, 3)), ((2, 5, 4), (5, 3)), ((4,), (3,)), ((5, 4), (5,))],
)
def test_mismatched_factors(inputs: tuple[int, ...], vjps: tuple[int, ...]):
    with pytest.raises(ValueError, match="same batch and n, got") as error:
        GradientFactors(torch.zeros(inputs), torch.zeros(vjps))
    assert f"{inputs} and {vjps}" in str(error.value)


@bad_input
@pytest.mark.parametrize("shape", [(), (4,), (1,), (4, 3), (3, 2, 1)])
def test_wrong_right_hand_side(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"shape \(4, 3\) needs a \[3\] vector") as error:
        gradient(5) @ torch.zeros(shape)
    assert str(error.value).endswith(f"got {shape}")


@bad_input
@pytest.mark.parametrize("other", [2.0, [1.0, 2.0, 3.0]])
def test_matmul_takes_tensors_only(other: Any):
    with pytest.raises(TypeError, match="unsupported operand"):
        gradient(5) @ other


NO_SCALARS = {
    "tensor": torch.ones(3),
    "one-element tensor": torch.ones(1),
    "array": np.ones(3),
    "list": [1.0, 2.0, 3.0],
    "string": "2",
    "gradient": gradient(5),
    "none": None,
}


@bad_input
@pytest.mark.parametrize("other", NO_SCALARS.values(), ids=NO_SCALARS)
def test_multiplication_by_no_scalar(other: Any):
    with pytest.raises(TypeError, match="only be multiplied by a scalar"):
        gradient(5) * other
    with pytest.raises(TypeError, match="only be multiplied by a scalar"):
        other * gradient(5)


@bad_input
def test_inner_needs_equal_shapes():
    for other in (gradient(5, d_in=5), gradient(5).T):
        with pytest.raises(ValueError, match=r"shapes \(4, 3\) and .* have no inner product"):
            gradient(5).inner(other)
        with pytest.raises(ValueError, match="no inner product"):
            gradient(5).cosine(other)


@bad_input
@pytest.mark.parametrize("other", [gradient(5).T, gradient(2, 5), gradient(5, d_out=2)], ids=repr)
def test_sum_needs_equal_shapes_and_batches(other: GradientFactors):
    with pytest.raises(ValueError, match=r"cannot add .*: shapes and batches must be equal"):
        gradient(5) + other


@bad_input
def test_sum_takes_gradients_only():
    with pytest.raises(TypeError, match="unsupported operand"):
        gradient(5) + 1.0
    with pytest.raises(TypeError, match="unsupported operand"):
        gradient(5) + torch.zeros(4, 3)


@bad_input
def test_example_needs_a_batch_that_large():
    with pytest.raises(ValueError, match="no batch axis"):
        gradient(5).example(0)
    with pytest.raises(IndexError, match="index 2 is out of bounds"):
        gradient(2, 5).example(2)


@bad_input
@pytest.mark.parametrize("k", [-1, 0, 4])
def test_truncation_needs_as_many_singular_values(k: int):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], got {k}"):
        gradient(5).truncate(k)


def ragged(*lengths: int) -> GradientFactors:
    whole = gradient(sum(lengths))
    return GradientFactors(whole.inputs, whole.vjps, lengths)


def test_examples_of_different_lengths():
    g = ragged(3, 1, 4)
    assert repr(g).endswith("n=8, lengths=(3, 1, 4), dtype=torch.float64)")
    examples = [g.example(b) for b in range(3)]
    assert [len(e.vjps) for e in examples] == [3, 1, 4]
    assert all(e.lengths is None for e in examples)
    torch.testing.assert_close(sum(e.dense() for e in examples), g.dense())
    for other in (g.T, 0.5 * g):
        assert other.lengths == g.lengths
    torch.testing.assert_close((0.5 * g).example(2).dense(), 0.5 * examples[2].dense())
    torch.testing.assert_close(g.T.example(1).dense(), examples[1].dense().T)


def test_sum_of_batches_goes_example_by_example():
    g, h, even = ragged(3, 1), ragged(2, 5), gradient(2, 4)
    for a, b, lengths in ((g, h, (5, 6)), (g, even, (7, 5)), (even, h, (6, 9))):
        assert (a + b).lengths == lengths
        for i in range(2):
            want = a.example(i).dense() + b.example(i).dense()
            torch.testing.assert_close((a + b).example(i).dense(), want)


@bad_input
def test_lengths_must_add_up():
    whole = gradient(5)
    for lengths in ((2, 2), (6,)):
        with pytest.raises(ValueError, match="must add up to the number of rows"):
            GradientFactors(whole.inputs, whole.vjps, lengths)
    with pytest.raises(ValueError, match="shapes and batches must be equal"):
        ragged(3, 1) + ragged(3, 1, 1)
    with pytest.raises(IndexError):
        ragged(3, 1).example(2)
