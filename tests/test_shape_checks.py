"""The checks that the rest of the suite relies on refuse wrong shapes, in closures too.

The annotations here are no strings: jaxtyping could not look them up in a closure.
"""

import pytest
import torch
from helpers import shape_checks
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor


def define(annotation, default=None):
    """A function that is defined anew in every call, as hooks are."""

    @jaxtyped(typechecker=shape_checks.checked)
    def hook(x: annotation, y: annotation, scale=default) -> annotation:
        return x[: len(y)]

    return hook


def test_every_definition_of_a_closure_is_checked():
    for _ in range(2):
        hook = define(Float[Tensor, "pos d"])
        assert hook(torch.ones(4, 3), torch.ones(4, 3)).shape == (4, 3)
        with pytest.raises(TypeCheckError, match="parameter"):
            hook(torch.ones(4, 3), torch.ones(2, 3))
        with pytest.raises(TypeCheckError, match="parameter"):
            hook(torch.ones(4), torch.ones(4))


def test_the_result_is_checked():
    hook = define(Float[Tensor, "_ d"])
    assert hook(torch.ones(4, 3), torch.ones(2, 3)).shape == (2, 3)

    @jaxtyped(typechecker=shape_checks.checked)
    def transposed(x: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
        return x.T

    with pytest.raises(TypeCheckError, match="return value"):
        transposed(torch.ones(4, 3))


def test_other_annotations_have_a_check_of_their_own():
    matrix, vector = define(Float[Tensor, "pos d"]), define(Float[Tensor, "d"])
    assert vector(torch.ones(3), torch.ones(3)).shape == (3,)
    with pytest.raises(TypeCheckError):
        matrix(torch.ones(3), torch.ones(3))


def test_an_equal_definition_is_compiled_once():
    define(Float[Tensor, "pos d"])
    n_compiled = len(shape_checks.compiled)
    define(Float[Tensor, "pos d"])
    assert len(shape_checks.compiled) == n_compiled
    define(Float[Tensor, "pos d_model"])
    assert len(shape_checks.compiled) > n_compiled


def test_what_has_no_hash_is_checked_all_the_same():
    with pytest.raises(TypeCheckError):
        define(Float[Tensor, "pos d"], default=[])(torch.ones(3), torch.ones(3))
