"""The type checker that jaxtyping runs in the tests: beartype, compiled once for each signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

compiled: dict[object, Callable[..., Any]] = {}


def checked(stub: Callable[..., Any]) -> Callable[..., Any]:
    """``beartype(stub)``, compiled only if no equal stub was.

    jaxtyping checks the arguments of a function through a stub of the same signature, without a
    body. It makes a new stub each time that the function is defined: for a hook, which is a
    closure, in every call of the package. Compiling each of them takes most of the suite's time.

    Annotations are compared by what they look like, since ``Float[Tensor, "a b"]`` is another class
    each time. Defaults do not matter: beartype looks at the arguments that are passed.
    """
    annotations = repr(stub.__annotations__)
    key = (stub.__module__, stub.__qualname__, stub.__code__, annotations)
    if key not in compiled:
        compiled[key] = beartype(stub)
    return compiled[key]
