"""Descriptions of functions, models and other values as JSON, equal in every process.

Values are described by content, not by name or address: functions by their code and everything
that it refers to, models by their weights.
"""

from __future__ import annotations

import copyreg
import dis
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from hashlib import sha256
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from torch import Tensor, nn

from tl_backward._fingerprint import fingerprint
from tl_backward.provenance.models import hooks, settings, tokenizer_settings, weights
from tl_backward.provenance.modules import is_installed, is_own, known_module

Parts: TypeAlias = dict[str, Any]
"""JSON, or its hash if it is long, by path such as ``"method.lr"``."""

LONGEST = 100
MOST_LISTED = 50
ITSELF = "<itself>"


def describe(**values: Any) -> dict[str, Parts]:
    """The parts of functions, models and other values.

    A function consists of its code, its defaults, its closure and, outside installed packages, its
    globals; a ``functools.partial`` and a method also of their bound values. A torch module
    consists of its config, weights, hooks and tokenizer. Any other object consists of its pickled
    state: a class may omit state without effect on results in ``__getstate__``. An attribute
    ``made_by`` of a function or a partial replaces its bound values: it holds the inputs that they
    were computed from, which are equal even if rounding differs.

    Raises:
        TypeError: If a part is identified by its address only; the error names it.
    """
    describer = _Describer()
    described: dict[str, Parts] = {}
    for category, value in values.items():
        parts = described[category] = {}
        for name, part in describer.parts(value):
            while name in parts:  # a partial overrides a default
                name += "'"
            parts[name] = part
    return described


def describe_each(values: Iterable[object]) -> Parts:
    """The number of values and one hash of all of them.

    Raises:
        TypeError: If a value is identified by its address only; the error names its index.
    """
    describer, digest, n = _Describer(), sha256(), 0
    for n, value in enumerate(values, start=1):
        describer.forget_objects()
        _, plain = describer.part(f"record {n - 1}", value)
        digest.update(text_of(plain).encode())
    return {"number": n, "contents": f"sha256:{digest.hexdigest()[:32]}"}


def text_of(plain: Any) -> str:
    """Canonical text of JSON."""
    return json.dumps(plain, sort_keys=True)


def hash_of(plain: Any) -> str:
    """A hash of JSON."""
    return "sha256:" + sha256(text_of(plain).encode()).hexdigest()[:32]


class _Describer:
    """Describes values, and caches the hashes of values with many references."""

    def __init__(self) -> None:
        self._lasting: dict[int, tuple[object, str]] = {}
        self._objects: dict[int, tuple[object, str]] = {}
        self._modules: dict[int, list[tuple[str, Any]]] = {}
        self._open: set[int] = set()

    def forget_objects(self) -> None:
        """Clear the cache, except functions, classes and torch modules."""
        self._objects.clear()

    def part(self, name: str, value: Any) -> tuple[str, Any]:
        """Describe a value as a single part."""
        try:
            plain = self._plain(value)
            return name, plain if len(text_of(plain)) <= LONGEST else hash_of(plain)
        except Exception as error:  # the value's own methods can raise anything
            raise TypeError(
                f"{name} cannot be recognised when the sweep resumes ({error}); build it from "
                "mappings, lists, strings, numbers and tensors, give its class a __getstate__ that "
                "returns its contents, or sweep without a path"
            ) from error

    def parts(self, value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        """The parts of a value, with paths that begin with its name."""
        if isinstance(value, nn.Module) and not name:
            yield from self._of_module(value)
        elif _is_listed(value):
            for key, item in value.items():
                yield from self.parts(item, path(name, key))
        elif id(value) in self._open:
            yield name, ITSELF
        elif _binds(value):
            self._open.add(id(value))
            yield from self._of_callable(value, name)
            self._open.discard(id(value))
        else:
            yield self.part(name or "value", value)

    def _plain(self, value: Any) -> Any:
        """Convert a value to JSON."""
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self._plain(one) for one in value]
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: self._plain(one) for key, one in value.items()}
            return {"<items>": sorted((self._plain(pair) for pair in value.items()), key=text_of)}
        if isinstance(value, AbstractSet):
            return {"<set>": sorted((self._plain(one) for one in value), key=text_of)}
        if isinstance(value, bytes | bytearray):
            return {"<bytes>": sha256(value).hexdigest()}
        if isinstance(value, Tensor):
            return {"<tensor>": fingerprint(value)}
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            contents = sha256(value.tobytes()).hexdigest()
            return {"<array>": [value.dtype.str, list(value.shape), contents]}
        if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
            return self._plain(value.item())
        if isinstance(value, CellType):
            return self._plain(_contents(value))
        if isinstance(value, type) and is_installed(value.__module__):
            return {"<class>": f"{value.__module__}.{value.__qualname__}"}
        if isinstance(value, ModuleType):
            return {"<module>": known_module(value)}
        return self._hash(value)

    def _hash(self, value: Any) -> str:
        key = id(value)
        lasts = isinstance(value, nn.Module | FunctionType | type)
        hashes = self._lasting if lasts else self._objects
        if key in hashes:
            return hashes[key][1]
        if key in self._open:
            return ITSELF
        self._open.add(key)
        hashes[key] = value, hash_of(self._insides(value))  # keeping the value keeps its id unique
        self._open.discard(key)
        return hashes[key][1]

    def _insides(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._of_module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, CodeType):
            return self._code(value)
        if hasattr(type(value), "backend_tokenizer"):
            return tokenizer_settings(value)
        return list(self._of_callable(value)) if _binds(value) else self._pickled(value)

    # functions and other callables

    def _of_callable(self, value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, partial):
            by_place = {f"args[{i}]": argument for i, argument in enumerate(value.args)}
            yield from self.parts(vars(value).get("made_by", value.keywords | by_place), name)
            yield from self.parts(value.func, name)
        elif isinstance(value, MethodType):
            yield from self.parts(value.__func__, name)
            yield from self.parts(value.__self__, path(name, "__self__"))
        elif isinstance(value, FunctionType):
            yield from self._of_function(value, name)
        elif hasattr(value, "__wrapped__"):  # functools.lru_cache and the like
            yield from self.parts(value.__wrapped__, name)
        else:
            yield self.part(path(name, "__class__"), type(value))
            yield from self.parts(_attributes(value), name)

    def _of_function(self, function: FunctionType, name: str) -> Iterator[tuple[str, Any]]:
        if is_own(function.__module__):
            function = inspect.unwrap(function)  # runtime type checks only wrap it
        code, defaults = function.__code__, function.__defaults__ or ()
        yield self.part(path(name, "__qualname__"), function.__qualname__)
        yield self.part(path(name, "__code__"), code)
        named = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        yield from self.parts(dict(zip(named, defaults, strict=True)), name)
        yield from self.parts(function.__kwdefaults__ or {}, name)
        cells = zip(code.co_freevars, map(_contents, function.__closure__ or ()), strict=True)
        yield from self.parts(vars(function).get("made_by", dict(cells)), name)
        for key in vars(function).keys() - {"made_by"}:
            yield self.part(path(name, f"__dict__.{key}"), vars(function)[key])
        if not is_installed(function.__globals__.get("__name__")):
            for key in sorted(_global_names(code) & function.__globals__.keys()):
                yield self.part(path(name, f"__globals__.{key}"), function.__globals__[key])

    def _code(self, code: CodeType) -> Any:
        """The code without line numbers and file names."""
        return [
            sha256(code.co_code).hexdigest(),
            sha256(getattr(code, "co_exceptiontable", b"")).hexdigest(),  # Python 3.11
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
            [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars],
            [self._plain(constant) for constant in code.co_consts],
        ]

    # classes and objects

    def _class(self, kind: type) -> Any:
        """The members and bases of a class."""
        members = {}
        for key, member in sorted(vars(kind).items()):
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            elif isinstance(member, property):
                member = [member.fget, member.fset, member.fdel]
            elif isinstance(member, cached_property):
                member = member.func
            is_from_python = key.startswith("__") and not isinstance(member, FunctionType)
            if not is_from_python and not isinstance(member, MemberDescriptorType):
                members[key] = self._plain(member)
        return [kind.__qualname__, self._plain(kind.__bases__), members]

    def _pickled(self, value: Any) -> Any:
        """The state that ``pickle`` would store."""
        reduced = _reduced(value)
        if isinstance(reduced, str):
            return [getattr(value, "__module__", None), reduced]
        made, arguments, state, *items = reduced
        return [self._plain(x) for x in (made, arguments, state, *(list(i or ()) for i in items))]

    # torch modules

    def _of_module(self, module: nn.Module) -> list[tuple[str, Any]]:
        if id(module) not in self._modules:
            tensors = dict(weights(module))
            with ThreadPoolExecutor() as pool:  # hashing releases the GIL
                hashes = [text[:32] for text in pool.map(fingerprint, tensors.values())]
            tokenizer = ("tokenizer", getattr(module, "tokenizer", None))
            self._modules[id(module)] = [
                self.part("__class__", type(module)),
                *(self.part(*named) for named in [*settings(module), *hooks(module), tokenizer]),
                *zip(tensors, hashes, strict=True),
            ]
        return self._modules[id(module)]


def path(name: str, key: str) -> str:
    """The path of a part; ``name`` is empty for a part of the whole."""
    return f"{name}.{key}" if name else key


def _is_listed(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether each item of a mapping is a separate part."""
    is_short = type(value) is dict and len(value) <= MOST_LISTED
    return is_short and all(isinstance(key, str) for key in value)


def _binds(value: Any) -> bool:
    """Whether a value is callable and refers to functions or values that may differ."""
    if isinstance(value, partial | MethodType | FunctionType):
        return True
    if not callable(value) or isinstance(value, type | nn.Module):
        return False
    return hasattr(value, "__wrapped__") or _attributes(value) is not None


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that ``pickle`` would store as a class and attributes."""
    try:
        reduced = _reduced(value)
    except Exception:  # the object's own methods can raise anything
        return None
    is_plain = isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
    return reduced[2] if is_plain and _is_listed(reduced[2]) else None


def _reduced(value: Any) -> Any:
    """The state that ``pickle`` would store, without cached properties."""
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
    if isinstance(reduced, str):  # the name of a global
        return reduced
    made, arguments, state, *items = [*reduced, None, None, None][:5]
    if isinstance(state, dict):
        defined = {key: getattr(type(value), str(key), None) for key in state}
        state = {k: v for k, v in state.items() if not isinstance(defined[k], cached_property)}
    return made, arguments, state, *items


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None


def _global_names(code: CodeType) -> set[str]:
    """The globals and builtins that code and the functions in it refer to."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {step.argval for step in dis.get_instructions(code) if step.opname in loads}
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return names.union(*map(_global_names, nested))
