"""The type checker that jaxtyping runs in the tests: beartype, compiled once for each signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

compiled: dict[object, Callable[..., Any]] = {}


def checked(signature: Callable[..., Any]) -> Callable[..., Any]:
    """``beartype(signature)``, compiled only if no equal signature was.

    jaxtyping checks the arguments of a function through a stub of the same signature, without a
    body. It makes a new stub each time that the function is defined: for a hook, which is a
    closure, in every call of the package. Compiling each of them takes most of the suite's time.
    """
    key = (
        *(signature.__module__, signature.__qualname__, signature.__code__),
        *(tuple(signature.__annotations__.items()), signature.__defaults__),
        tuple((signature.__kwdefaults__ or {}).items()),
    )
    try:
        if key not in compiled:
            compiled[key] = beartype(signature)
    except TypeError:  # an annotation or a default has no hash
        return beartype(signature)
    return compiled[key]
