"""Sites that share a parameter or memory, and how their matrices lie in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_backward.sites.site import UnsupportedWeight, WeightSite


class Axis(NamedTuple):
    """Equal steps along one side of ``W`` ``[d_in, d_out]``, and their stride in memory."""

    side: int
    size: int
    step: int
    stride: int


def with_ties(sites: Iterable[WeightSite]) -> list[WeightSite]:
    """The same sites, with references to sites that share a parameter or its memory."""
    sites = list(sites)
    plain = [site for site in sites if site.packed is None]
    computed = {site.name: how for site in plain if (how := site.recomputed)}
    stored = {site.name: site for site in plain if site.name not in computed}
    storages = {name: _storage(site.stored_in[0]) for name, site in stored.items()}
    inside: dict[object, list[str]] = defaultdict(list)
    fed: dict[object, list[str]] = defaultdict(list)
    for name, storage in storages.items():
        inside[storage].append(name)
    for name, how in computed.items():
        for storage in {_storage(source) for source in how.sources}:
            fed[storage].append(name)
    parameters: dict[str, Tensor] = {}
    overlapping: dict[str, list[str]] = {}
    for names in inside.values():
        of_stacks = {id(stored[name].stored_in[0]) for name in names}
        if len(names) > 1 and not (len(of_stacks) == 1 and _are_parts([stored[n] for n in names])):
            parameters |= (of_storage := {name: stored[name].parameter for name in names})
            overlapping |= _overlapping(of_storage)

    def related(site: WeightSite) -> WeightSite:
        others = overlapping.get(site.name, [])
        feeds = fed.get(storages.get(site.name), [])
        if not others and not feeds:
            return site
        tied = [name for name in others if _is_same(parameters[site.name], parameters[name])]
        return replace(
            site,
            tied_to=tuple(tied),
            in_storage_with=tuple(others),
            feeds=tuple(feeds),
        )

    return [related(site) for site in sites]


def _are_parts(sites: Sequence[WeightSite]) -> bool:
    """Whether the sites are different parts of one parameter, like the matrices of experts."""
    indices = [repr(site.index) for site in sites if site.index is not ...]
    return len(indices) == len(set(indices)) == len(sites)


def _overlapping(parameters: dict[str, Tensor]) -> dict[str, list[str]]:
    """For each parameter in one storage, the others whose extents overlap with it."""
    order = {name: number for number, name in enumerate(parameters)}
    extents = {name: _extent_in_bytes(parameter) for name, parameter in parameters.items()}
    found: dict[str, list[str]] = {name: [] for name in parameters}
    open_ones: list[str] = []
    for name in sorted(extents, key=lambda name: extents[name]):
        first, _ = extents[name]
        open_ones = [other for other in open_ones if extents[other][1] > first]
        for other in open_ones:
            found[name].append(other)
            found[other].append(name)
        open_ones.append(name)
    return {name: sorted(others, key=order.__getitem__) for name, others in found.items()}


def told_apart(
    found: Iterable[WeightSite | UnsupportedWeight],
) -> Iterator[WeightSite | UnsupportedWeight]:
    """Replace the sites of a module with several names by :class:`UnsupportedWeight`.

    A tensor that passes the module does not show by which name it was called.
    """
    found = list(found)
    names: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for one in found:
        if isinstance(one, WeightSite):
            names[_place(one)].append(one.name)
    for one in found:
        if isinstance(one, UnsupportedWeight):
            yield one
            continue
        others = [name for name in names[_place(one)] if name != one.name]
        if not others:
            yield one
            continue
        kind = type(one.holder[0]).__name__
        reason = (
            f"its {kind} is also that of {', '.join(others)}, and one module "
            "does not tell its uses apart; give each a module of its own with the same parameter"
        )
        parameter = None if one.packed else one.stored_in[0]
        yield UnsupportedWeight(one.name, one.kind, one.layer, reason, parameter)


def _place(site: WeightSite) -> tuple[int, str, str]:
    """The module, attribute and index that identify a weight."""
    module, attribute = site.holder
    return id(module), attribute, repr(site.index)


def shares_memory(one: WeightSite, other: WeightSite) -> bool:
    """Whether an in-place change of one weight changes the other."""
    p, q = one.parameter, other.parameter
    if _is_same(p, q):
        return True
    if _storage(p) != _storage(q):
        return False
    if p.dtype != q.dtype:
        return True
    (first, end), (other_first, other_end) = _extent(p), _extent(q)
    if end <= other_first or other_end <= first:
        return False
    base = min(first, other_first)
    taken = torch.zeros(max(end, other_end) - base, dtype=torch.bool, device=p.device)
    taken.as_strided(p.shape, p.stride(), first - base).fill_(True)
    return bool(taken.as_strided(q.shape, q.stride(), other_first - base).any())


def is_same_matrix(one: WeightSite, other: WeightSite) -> bool:
    """Whether two sites that share memory have the same ``W``, elementwise."""
    return _starts_alike(one, other) and _axes(one) == _axes(other)


def is_transposed(one: WeightSite, other: WeightSite) -> bool:
    """Whether one of two sites that share memory has the other's ``W`` transposed."""
    transposed = sorted(axis._replace(side=1 - axis.side) for axis in _axes(other))
    return _starts_alike(one, other) and _axes(one) == transposed


def rearranged(
    matrix: Float[Tensor, "d_in d_out"], site: WeightSite, other: WeightSite
) -> Float[Tensor, "other_d_in other_d_out"]:
    """The change of one weight that results from adding a matrix to another in the same memory.

    Raises:
        NotImplementedError: If they share only part of their memory.
    """
    p, q = site.parameter, other.parameter
    if not _starts_alike(site, other) or _merged(_memory(site)) != _merged(_memory(other)):
        raise NotImplementedError(
            f"{site.name} and {other.name} share part of their memory, so an edit of one changes "
            "part of the other; give one of them its own parameter"
        )
    stored = matrix.new_empty_strided(p.shape, p.stride())
    stored.copy_(site.to_parameter_layout(matrix))
    seen = matrix.new_empty(other.d_in, other.d_out)
    other.to_parameter_layout(seen).copy_(stored.as_strided(q.shape, q.stride()))
    return seen


def _storage(parameter: Tensor) -> object:
    """A key that is equal for tensors that may share memory."""
    if type(parameter.data) is Tensor and parameter.device.type != "meta":
        return parameter.device, parameter.untyped_storage().data_ptr() or id(parameter)
    return id(parameter)


def _is_same(p: Tensor, q: Tensor) -> bool:
    """Whether both are one parameter for autograd, or the same part of one.

    Offloaded weights are no parameters; those that are tied are several tensors in one memory.
    """
    if p is q:
        return True
    if not isinstance(p, nn.Parameter) and not isinstance(q, nn.Parameter):
        return p.data_ptr() == q.data_ptr() and p.shape == q.shape and p.stride() == q.stride()
    base = p._base
    return base is not None and base is q._base and p.data_ptr() == q.data_ptr()


def _extent(parameter: Tensor) -> tuple[int, int]:
    """Begin and end of the parameter in its storage, in elements."""
    first = int(parameter.storage_offset())
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    return first, first + 1 + sum(int((size - 1) * stride) for size, stride in steps)


def _extent_in_bytes(parameter: Tensor) -> tuple[int, int]:
    """The same in bytes; for a tensor subclass, a dummy extent that overlaps with all others."""
    if type(parameter.data) is not Tensor:
        return 0, 1
    first, end = _extent(parameter)
    return first * parameter.itemsize, end * parameter.itemsize


def _starts_alike(one: WeightSite, other: WeightSite) -> bool:
    p, q = one.parameter, other.parameter
    return p is q or (p.data_ptr() == q.data_ptr() and p.dtype == q.dtype)


def _axes(site: WeightSite) -> list[Axis]:
    """The layout of ``W`` in memory, with as few axes as possible."""
    matrix = torch.empty(site.d_in, site.d_out, device="meta")
    laid, parameter = site.to_parameter_layout(matrix), site.parameter
    axes = [
        Axis(0, size, step // site.d_out, stride)
        if step >= site.d_out
        else Axis(1, size, step, stride)
        for size, step, stride in zip(laid.shape, laid.stride(), parameter.stride(), strict=True)
        if size > 1
    ]
    return _merged(axes)


def _memory(site: WeightSite) -> list[Axis]:
    """The memory of ``W``, regardless of its sides."""
    return [Axis(0, size, stride, stride) for _, size, _, stride in _axes(site)]


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """Merge axes that follow each other without a gap."""
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda axis: (axis.side, axis.step)):
        if merged and axis == _next_axis(merged[-1], axis.size):
            merged[-1] = merged[-1]._replace(size=merged[-1].size * axis.size)
        else:
            merged.append(axis)
    return merged


def _next_axis(axis: Axis, size: int) -> Axis:
    """The axis of this size that continues another without a gap."""
    return Axis(axis.side, size, axis.size * axis.step, axis.size * axis.stride)
