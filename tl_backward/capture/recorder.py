"""Forward hooks that record tensors and the places in the graph whose VJPs to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from tl_backward.capture.run_hooks import Run
from tl_backward.sites import Tap


class Place(NamedTuple):
    """A place in the autograd graph, and its VJP if the loss does not depend on it (zeros)."""

    edge: GradientEdge | None
    device: torch.device
    no_gradient: Callable[[], Tensor]


class _Value(NamedTuple):
    tensor: Tensor
    version: int


class Recorder:
    """Records the tensors that pass taps during a run, and their places in the autograd graph.

    Forward calls made inside other hooks are ignored. The graph begins at the first place: nothing
    upstream requires a gradient.

    Args:
        run: The run. Its backward pass does not change recorded tensors.
        batch_size: Number of texts. A tensor that passes once for all texts, such as position
            embeddings, is expanded so that each text gets its own VJP.
        device: Device to move tensors to as soon as they are recorded. Default: they stay.
    """

    def __init__(self, run: Run, batch_size: int, device: torch.device | None = None) -> None:
        self.places: dict[Hashable, list[Place]] = defaultdict(list)
        self._values: dict[Hashable, list[_Value]] = defaultdict(list)
        self._uses_in_hooks: list[tuple[Hashable, GradientEdge]] = []
        self._of_tokens: set[Hashable] = set()
        self._run = run
        self._batch_size = batch_size
        self._device = device
        self._kept_values = WeakTensorKeyDictionary()

    def keep_value(
        self,
        tap: Tap,
        key: Hashable,
        copy: bool = False,
        of_tokens: bool = False,
        only_with_grad: bool = False,
    ) -> None:
        """Record the tensor that passes the tap; ``copy`` guards against in-place changes.

        Args:
            tap: Where to read.
            key: Name of the value.
            copy: Whether to record a copy.
            of_tokens: Whether rows are single tokens, possibly fewer than texts.
            only_with_grad: Whether to skip passes under ``torch.no_grad()``.
        """
        if of_tokens:
            self._of_tokens.add(key)
        self.watch(tap, partial(self._keep_value, key, copy, only_with_grad))

    def begin_graph(self, tap: Tap) -> None:
        """Make the tensor that passes the tap require a gradient, to begin the graph there."""
        self._listen(tap, self._begin_graph)

    def keep_place(
        self,
        tap: Tap,
        key: Hashable,
        on_a_branch: bool = False,
        own_branch: bool = False,
        alone: bool = False,
        of_tokens: bool = False,
        only_with_grad: bool = False,
    ) -> None:
        """Record the place where ``dL/dy`` arrives for the tensor ``y`` that passes the tap.

        Args:
            tap: The tap.
            key: The name of the place.
            on_a_branch: Whether ``y`` has other uses. If so, the model continues with ``y`` itself.
                Otherwise it may continue with a copy: if the graph begins at ``y``, or ``y`` is a
                view. A later in-place change is forbidden for a leaf, and would remove a view's
                place from the graph.
            own_branch: Whether to exclude the VJP from other uses of ``y``. If so, the model
                continues with a copy.
            alone: Whether to refuse a loss that depends on a call of the tap inside another hook.
            of_tokens: As in :meth:`keep_value`.
            only_with_grad: As in :meth:`keep_value`.
        """
        if on_a_branch:
            self._listen(tap, partial(self._keep_place_on_branch, key, alone))
        else:
            n_least = 0 if of_tokens else self._batch_size
            settings = own_branch, alone, only_with_grad, n_least
            self._listen(tap, partial(self._replace_and_keep_place, key, *settings))

    def watch(self, tap: Tap, see: Callable[[Any], None]) -> None:
        """Call ``see`` with the tensor that passes the tap in the forward pass."""
        self._listen(tap, partial(self._show, see))

    def _show(self, see: Callable[[Any], None], x: Any) -> None:
        if self._run.is_forward() and not self._run.depth:
            see(x)

    def _keep_value(self, key: Hashable, copy: bool, only_with_grad: bool, x: Tensor) -> None:
        if only_with_grad and not torch.is_grad_enabled():
            return
        value = self._kept(x)
        value = value.clone() if copy and value.device == x.device else value
        self._values[key].append(_Value(value, value._version))

    def _begin_graph(self, x: Tensor) -> Tensor | None:
        if not self._run.may_own(x) or x.requires_grad or not torch.is_grad_enabled():
            return None
        return x.detach().requires_grad_().clone()

    def _keep_place_on_branch(self, key: Hashable, alone: bool, y: Tensor) -> None:
        if not self._run.is_forward():
            return
        if not self._run.depth:
            self._keep_place(key, y)
        elif alone and y.requires_grad:
            self._uses_in_hooks.append((key, get_gradient_edge(y)))

    def _keep_place(self, key: Hashable, y: Tensor) -> None:
        edge = get_gradient_edge(y) if y.requires_grad else None
        no_gradient = partial(torch.zeros, y.shape, dtype=y.dtype, device=self._device or y.device)
        self.places[key].append(Place(edge, y.device, no_gradient))

    def _replace_and_keep_place(
        self,
        key: Hashable,
        own_branch: bool,
        alone: bool,
        only_with_grad: bool,
        n_least: int,
        y: Tensor,
    ) -> Tensor | None:
        run, in_hook = self._run, self._run.depth > 0
        if not run.may_own(y) or (in_hook and not alone):
            return None
        if not torch.is_grad_enabled():
            if run.is_forward() and not in_hook and not only_with_grad:
                raise NotImplementedError(
                    f"the model runs {_name(key)} under torch.no_grad(), so no VJP arrives there; "
                    "gradient checkpointing works only with use_reentrant=False"
                )
            return None
        replaced = None
        if len(y) < n_least and not in_hook:
            y = y.expand(n_least, *y.shape[1:])
        if not y.requires_grad:
            replaced = y = y.detach().requires_grad_().clone()
        elif own_branch or y._is_view():
            replaced = y = y.clone()
        if run.is_forward() and in_hook:
            self._uses_in_hooks.append((key, get_gradient_edge(y)))
        elif run.is_forward():
            self._keep_place(key, y)
        return replaced

    def values(self, key: Hashable) -> list[Tensor]:
        """The recorded tensors.

        Raises:
            RuntimeError: If one was changed in place after it was recorded.
        """
        for tensor, version in self._values[key]:
            if tensor._version != version:
                raise RuntimeError(f"the input of {_name(key)} was changed in place after its use")
        n_least = 0 if key in self._of_tokens else self._batch_size
        return [
            tensor.expand(n_least, *tensor.shape[1:]) if len(tensor) < n_least else tensor
            for tensor, _ in self._values[key]
        ]

    def backward(self, loss: Tensor, retain_graph: bool = False) -> dict[Hashable, list[Tensor]]:
        """The VJPs at all places, from one backward pass that forms no weight gradient.

        Raises:
            NotImplementedError: If the loss depends on a call of a tap inside another hook.
        """
        edges = [place.edge for places in self.places.values() for place in places if place.edge]
        edges += [edge for _, edge in self._uses_in_hooks]
        found: dict[GradientEdge | None, Tensor | None] = {}
        if loss.requires_grad and edges:
            if self._device is not None:
                found = self._moved_vjps_at(loss, edges, retain_graph)
            elif self._run.others_have_hooks:
                found = _vjps_after_hooks(loss, edges, retain_graph)
            else:
                found = _vjps_at(loss, edges, retain_graph)
        for key, edge in self._uses_in_hooks:
            if found.get(edge) is not None:
                raise NotImplementedError(
                    f"a hook on the model runs {_name(key)} again, and the loss depends on the "
                    "result, which the factors do not contain; run it under torch.no_grad()"
                )
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
        """The VJPs, each moved as soon as the backward pass reaches it, to free memory."""
        found: dict[GradientEdge | None, Tensor | None] = {}

        def move(edge: GradientEdge, vjps: tuple[Tensor | None, ...]) -> None:
            vjp = vjps[edge.output_nr]
            found[edge] = None if vjp is None else vjp.to(self._device)

        leaves = _upstream_leaves(edges)
        with _shown(edges, move):
            of_leaves = _vjps_at(loss, leaves, retain_graph)
        for edge in set(leaves).intersection(edges):
            vjp = of_leaves[edge]
            found[edge] = None if vjp is None else vjp.to(self._device)
        return found

    def _kept(self, x: Tensor) -> Tensor:
        """The tensor on the cache's device, moved once for all taps."""
        if self._device is None:
            return x.detach()
        known = self._kept_values.get(x)
        if known is None or known.version != x._version:
            known = self._kept_values[x] = _Value(x.detach().to(self._device), x._version)
        return known.tensor

    def _listen(self, tap: Tap, see: Callable[[Any], Tensor | None]) -> None:
        """Call ``see`` with the tensor that passes the tap; a returned tensor replaces it."""
        run, module, outside = self._run, tap.module, tap.is_outside_of_hooks
        if tap.keyword is not None:
            run.hook_forward_pre(module, partial(_see_keyword, see, tap.keyword), with_kwargs=True)
        elif tap.side == "input":
            run.hook_forward_pre(module, partial(_see_input, see, tap.item), first=outside)
        else:
            run.hook_forward(module, partial(_see_output, see, tap.item), first=not outside)


def _see_input(
    see: Callable[[Any], Tensor | None], item: int, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    replaced = see(args[item])
    return None if replaced is None else (*args[:item], replaced, *args[item + 1 :])


def _see_keyword(
    see: Callable[[Any], Tensor | None],
    keyword: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Show an argument that is never replaced.

    Raises:
        NotImplementedError: When the module is called without it.
    """
    if kwargs.get(keyword) is None:
        raise NotImplementedError(
            f"{type(module).__name__} was called without {keyword}=, so that nothing says which "
            "rows of it were looked up; leave its weight out with weights=..."
        )
    see(kwargs[keyword])


def _see_output(
    see: Callable[[Any], Tensor | None],
    item: int,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    if not isinstance(output, tuple):
        return see(output)
    replaced = see(output[item])
    return None if replaced is None else (*output[:item], replaced, *output[item + 1 :])


def _vjps_at(
    loss: Tensor, edges: list[GradientEdge], retain_graph: bool
) -> dict[GradientEdge | None, Tensor | None]:
    vjps = torch.autograd.grad(loss, edges, allow_unused=True, retain_graph=retain_graph)
    return dict(zip(edges, vjps, strict=True))


def _vjps_after_hooks(
    loss: Tensor, edges: list[GradientEdge], retain_graph: bool
) -> dict[GradientEdge | None, Tensor | None]:
    """The VJPs after all hooks of their tensors.

    ``autograd.grad`` returns VJPs before the hooks, except where the backward pass ends.
    """
    found: dict[GradientEdge | None, Tensor | None] = {}

    def note(edge: GradientEdge, vjps: tuple[Tensor | None, ...]) -> None:
        found[edge] = vjps[edge.output_nr]

    with _shown(edges, note):
        at_ends = _vjps_at(loss, edges, retain_graph)
    return at_ends | found


@contextmanager
def _shown(
    edges: Iterable[GradientEdge], see: Callable[[GradientEdge, tuple[Tensor | None, ...]], None]
) -> Iterator[None]:
    """Call ``see`` with the VJPs at the nodes of edges when the backward pass reaches them."""
    with ExitStack() as hooks:
        for edge in dict.fromkeys(edges):
            hooks.callback(edge.node.register_prehook(partial(see, edge)).remove)
        yield


def depends_on(loss: Tensor, y: Tensor) -> bool:
    """Whether the graph of a loss contains ``y``."""
    return y.grad_fn in set(_graph_of([loss.grad_fn]))


def _upstream_leaves(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """The graph's leaves upstream of the edges; a backward pass to them visits every edge."""
    nodes = _graph_of([edge.node for edge in edges])
    return [
        GradientEdge(node, 0)
        for node in nodes
        if all(other is None for other, _ in node.next_functions)
    ]


def _graph_of(nodes: Iterable[Node | None]) -> Iterator[Node]:
    """The nodes and everything upstream of them, each once."""
    seen: set[Node] = set()
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions]
            yield node


def vjp_between(later: Place, vjp: Tensor, earlier: Place) -> Tensor:
    """The part of the VJP at an earlier place that flows through a later one."""
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


def _name(key: Hashable) -> Hashable:
    """The name in a key, which is a name or a tuple that begins with one."""
    return key[0] if isinstance(key, tuple) else key
