"""The checks that the rest of the suite relies on refuse wrong shapes, in closures too.

The annotations here are no strings: jaxtyping could not look them up in a closure.
"""

import pytest
import torch
from helpers import shape_checks
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor


def define(dims, default=None):
    """A function that is defined anew in every call, as hooks are."""

    @jaxtyped(typechecker=shape_checks.checked)
    def hook(x: Float[Tensor, dims], y: Float[Tensor, dims], scale=default) -> Float[Tensor, dims]:
        return x.flip(0) if default is None else default

    return hook


def test_every_definition_of_a_closure_is_checked():
    for _ in range(2):
        hook = define("pos d")
        assert hook(torch.ones(4, 3), torch.ones(4, 3)).shape == (4, 3)
        for y in (torch.ones(2, 3), torch.ones(4), torch.ones(4, 3).int()):
            with pytest.raises(TypeCheckError, match="parameter"):
                hook(torch.ones(4, 3), y)


def test_every_result_is_checked():
    for result in (torch.ones(4, 2), torch.ones(4), 5):
        with pytest.raises(TypeCheckError, match="return value"):
            define("pos d", result)(torch.ones(4, 3), torch.ones(4, 3))


def test_other_dimensions_have_a_check_of_their_own():
    matrix, vector = define("pos d"), define("d")
    assert vector(torch.ones(3), torch.ones(3)).shape == (3,)
    with pytest.raises(TypeCheckError):
        matrix(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeCheckError):
        vector(torch.ones(4, 3), torch.ones(4, 3))


def test_an_equal_definition_is_compiled_once():
    define("pos d")
    n_compiled = len(shape_checks.compiled)
    define("pos d")
    assert len(shape_checks.compiled) == n_compiled
    define("pos d_model")
    assert len(shape_checks.compiled) > n_compiled
