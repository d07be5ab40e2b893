"""Hooks that note, during one forward pass, where the backward pass has to be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from tl_backward.sites import Tap


class Place(NamedTuple):
    """A place in the autograd graph, and what arrives there when the loss does not depend on it."""

    edge: GradientEdge | None
    device: torch.device
    no_gradient: Callable[[], Tensor]


class _Value(NamedTuple):
    tensor: Tensor
    version: int


class Recorder:
    """Keeps tensors that pass, and their places in the autograd graph, each time they pass.

    It looks on until its context ends, and has what it saw afterwards, too. Below the first place
    nothing requires a gradient: the graph is begun there.

    Args:
        batch_size: Number of texts. What passes once for all of them, such as the embeddings of
            positions, is repeated for each, so that each gets its own VJP.
        device: Where tensors are moved as soon as they are there. Default: they stay.
    """

    def __init__(self, batch_size: int, device: torch.device | None = None) -> None:
        self.places: dict[Hashable, list[Place]] = defaultdict(list)
        self._values: dict[Hashable, list[_Value]] = defaultdict(list)
        self._batch_size = batch_size
        self._device = device
        self._kept_values = WeakTensorKeyDictionary()
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def keep_value(self, tap: Tap, key: Hashable, copy: bool = False) -> None:
        """Keep the tensor that passes the tap, or a copy where the model may change it later."""

        def see(x: Tensor) -> None:
            value = self._kept(x)
            value = value.clone() if copy and value.device == x.device else value
            self._values[key].append(_Value(value, value._version))

        self._hooks.callback(_hook(tap, see).remove)

    def keep_place(
        self, tap: Tap, key: Hashable, on_a_branch: bool = False, own_branch: bool = False
    ) -> None:
        """Keep the place where ``dL/dy`` arrives for the tensor ``y`` that passes the tap.

        Args:
            tap: Where to look.
            key: The name of the place.
            on_a_branch: Whether ``y`` is used elsewhere, too. Then the model goes on with ``y``
                itself. Else it may be given a copy: where the graph begins and where ``y`` is a
                view, because a later change in place is forbidden for a leaf, and would take a
                view's place out of the graph.
            own_branch: Whether only what comes through the tap counts, not the other uses of ``y``.
                Then the model goes on with a copy.
        """

        def see(y: Tensor) -> Tensor | None:
            replaced = None
            if on_a_branch:
                edge = get_gradient_edge(y) if y.requires_grad else None
            else:
                if len(y) < self._batch_size:
                    y = y.expand(self._batch_size, *y.shape[1:])
                if not y.requires_grad:
                    replaced = y = y.detach().requires_grad_().clone()
                elif own_branch or y._is_view():
                    replaced = y = y.clone()
                edge = get_gradient_edge(y)
            kept_on = self._device or y.device
            no_gradient = partial(torch.zeros, y.shape, dtype=y.dtype, device=kept_on)
            self.places[key].append(Place(edge, y.device, no_gradient))
            return replaced

        self._hooks.callback(_hook(tap, see).remove)

    def values(self, key: Hashable) -> list[Tensor]:
        """The tensors that passed, as they were then.

        Raises:
            RuntimeError: When one was changed in place since.
        """
        for tensor, version in self._values[key]:
            if tensor._version != version:
                raise RuntimeError(f"the input of {key} was changed in place after its use")
        return [
            tensor.expand(self._batch_size, *tensor.shape[1:])
            if len(tensor) < self._batch_size
            else tensor
            for tensor, _ in self._values[key]
        ]

    def backward(self, loss: Tensor, retain_graph: bool = False) -> dict[Hashable, list[Tensor]]:
        """The VJPs at all places, from one backward pass that forms no weight gradient."""
        edges = [place.edge for places in self.places.values() for place in places if place.edge]
        found: dict[GradientEdge | None, Tensor | None] = {}
        if loss.requires_grad and edges:
            keep = _vjps_at if self._device is None else self._moved_vjps_at
            found = keep(loss, edges, retain_graph)
        return {
            key: [
                place.no_gradient() if (vjp := found.get(place.edge)) is None else vjp
                for place in places
            ]
            for key, places in self.places.items()
        }

    def _moved_vjps_at(
        self, loss: Tensor, edges: list[GradientEdge], retain_graph: bool
    ) -> dict[GradientEdge | None, Tensor | None]:
        """The VJPs, each moved when the backward pass gets there: none is kept behind it."""
        found: dict[GradientEdge | None, Tensor | None] = {}

        def move(edge: GradientEdge, vjps: tuple[Tensor | None, ...]) -> None:
            vjp = vjps[edge.output_nr]
            found[edge] = None if vjp is None else vjp.to(self._device)

        leaves = _leaves_behind(edges)
        with ExitStack() as hooks:
            for edge in dict.fromkeys(edges):
                hooks.callback(edge.node.register_prehook(partial(move, edge)).remove)
            of_leaves = _vjps_at(loss, leaves, retain_graph)
        for edge in set(leaves).intersection(edges):
            vjp = of_leaves[edge]
            found[edge] = None if vjp is None else vjp.to(self._device)
        return found

    def _kept(self, x: Tensor) -> Tensor:
        """A tensor where it is to be kept, once for all who look at it."""
        if self._device is None:
            return x.detach()
        known = self._kept_values.get(x)
        if known is None or known.version != x._version:
            known = self._kept_values[x] = _Value(x.detach().to(self._device), x._version)
        return known.tensor


def _vjps_at(
    loss: Tensor, edges: list[GradientEdge], retain_graph: bool
) -> dict[GradientEdge | None, Tensor | None]:
    vjps = torch.autograd.grad(loss, edges, allow_unused=True, retain_graph=retain_graph)
    return dict(zip(edges, vjps, strict=True))


def depends_on(loss: Tensor, y: Tensor) -> bool:
    """Whether the graph of a loss goes back to ``y``."""
    return y.grad_fn in set(_graph_of([loss.grad_fn]))


def _leaves_behind(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Where the graph upstream of some places begins: the backward pass to there meets them all."""
    nodes = _graph_of([edge.node for edge in edges])
    return [
        GradientEdge(node, 0)
        for node in nodes
        if all(other is None for other, _ in node.next_functions)
    ]


def _graph_of(nodes: Iterable[Node | None]) -> Iterator[Node]:
    """The nodes, and all that are upstream of them, once."""
    seen: set[Node] = set()
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions]
            yield node


def vjp_between(later: Place, vjp: Tensor, earlier: Place) -> Tensor:
    """The part of the VJP at an earlier place that comes through a later one."""
    if later.edge is None or earlier.edge is None:
        return earlier.no_gradient()
    (part,) = torch.autograd.grad(
        later.edge,
        earlier.edge,
        grad_outputs=vjp.to(later.device),
        allow_unused=True,
        retain_graph=True,
    )
    return earlier.no_gradient() if part is None else part.to(vjp.device)


def _hook(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show ``see`` the tensor that passes the tap; what it returns takes the tensor's place."""
    if tap.side == "output":
        return tap.module.register_forward_hook(lambda module, args, output: see(output))

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = see(args[0])
        return None if replaced is None else (replaced, *args[1:])

    return tap.module.register_forward_pre_hook(before)
