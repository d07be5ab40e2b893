"""Hooks that are on a model for one run of it, and the hooks of others around them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from tl_backward._undo import Undo

Hooks: TypeAlias = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]
"""Pairs of a HookPoint's name, or a function that selects names, and a hook."""
Registry: TypeAlias = dict[int, Callable[..., Any]]
"""PyTorch's hooks of one kind, of a module or of all modules, by the ids of their handles."""

FROM_HOOK_POINTS = "transformer_lens.hook_points"
FROM_BRIDGES = "transformer_lens.model_bridge"


class Run:
    """One run of a model, and the hooks that are on the model for it.

    They see only the run's own tensors: none of other threads, none once the run is over, and none
    while its loss is computed. Its backward pass belongs to it, as gradient checkpointing repeats
    parts of the forward pass there.

    Attributes:
        stage: What is computed.
        depth: How many hooks of others the run is inside of. What they run is no part of it.
        others_have_hooks: Whether others have forward hooks on the model.

    Args:
        undo: What ends the run.
    """

    def __init__(self, undo: Undo) -> None:
        self.stage: Literal["forward", "loss", "backward", "over"] = "forward"
        self.depth = 0
        self.others_have_hooks = False
        self._thread = get_ident()
        self._handles: list[RemovableHandle] = []
        undo.add(self._end)

    def _end(self) -> None:
        self.stage = "over"
        for handle in self._handles:
            handle.remove()

    def is_in_its_thread(self) -> bool:
        """Whether the calling thread is that of the run."""
        return get_ident() == self._thread

    def may_own(self, tensor: Any) -> bool:
        """Whether a tensor that passes a hook may be the run's.

        The backward pass of an accelerator's tensors has threads of its own.
        """
        if self.stage not in ("forward", "backward"):
            return False
        return self.is_in_its_thread() or (self.stage == "backward" and tensor.device.type != "cpu")

    def is_forward(self) -> bool:
        """Whether it is the run's forward pass that calls the hook that asks."""
        return self.stage == "forward" and self.is_in_its_thread()

    def hook_forward_pre(
        self, module: nn.Module, hook: Callable[..., Any], first: bool = False
    ) -> None:
        """Add a pre-hook of PyTorch, behind those that are there or before them all."""
        of_all_modules = torch_module._global_forward_pre_hooks
        self._hook(module, module._forward_pre_hooks, of_all_modules, hook, first)

    def hook_forward(
        self, module: nn.Module, hook: Callable[..., Any], first: bool = False
    ) -> None:
        """Add a hook of PyTorch, behind those that are there or before them all."""
        of_all_modules = torch_module._global_forward_hooks
        self._hook(module, module._forward_hooks, of_all_modules, hook, first)

    def hook_backward(
        self, module: nn.Module, before: Callable[..., Any], behind: Callable[..., Any]
    ) -> None:
        """Add PyTorch's hooks around the full backward hooks that a module has."""
        self._add(module._backward_pre_hooks, before)
        self._add(module._backward_hooks, behind)

    def _hook(
        self,
        module: nn.Module,
        registry: Registry,
        of_all_modules: Registry,
        hook: Callable[..., Any],
        first: bool,
    ) -> None:
        """Hooks of all modules run before those of one, so only one of them can run first."""
        if first and of_all_modules:
            self._add(of_all_modules, partial(_call_at, module, hook), first)
        else:
            self._add(registry, hook, first)

    def _add(self, registry: Registry, hook: Callable[..., Any], first: bool = False) -> None:
        handle = RemovableHandle(registry)
        self._handles.append(handle)
        registry[handle.id] = hook
        if first:
            cast(OrderedDict, registry).move_to_end(handle.id, last=False)

    def put_hooks(
        self, model: Any, undo: Undo, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()
    ) -> None:
        """Put TransformerLens's hooks on a model, as ``model.hooks`` does, until they are undone.

        Raises:
            Exception: What TransformerLens raises, such as for a name that no HookPoint has.
        """
        if not fwd_hooks and not bwd_hooks:
            return
        fwd, bwd = (
            [(name, partial(self._call, hook)) for name, hook in hooks]
            for hooks in (fwd_hooks, bwd_hooks)
        )
        context: Any = model.hooks(fwd_hooks=fwd, bwd_hooks=bwd)
        cut_short = [True]
        undo.add(_take_hooks_off, model, model.context_level, context.gen, cut_short)
        context.__enter__()
        cut_short.clear()

    def _call(self, function: Callable[..., Any], tensor: Tensor | None, hook: Any) -> Any:
        return function(tensor, hook=hook) if self.may_own(tensor) else None

    def step_aside_for_others(self, modules: Iterable[nn.Module], undo: Undo) -> None:
        """Count, in ``depth``, when the forward hooks run that are on some modules, or on all.

        Those by which a bridge itself passes its HookPoints are a part of the forward pass.
        """
        registries = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        for module in modules:
            registries += filter(None, (module._forward_pre_hooks, module._forward_hooks))
        for registry in registries:
            for number, hook in list(registry.items()):
                if not _module_of(hook).startswith(FROM_BRIDGES):
                    self.others_have_hooks = True
                    counted = _Counted(self, hook)
                    undo.add(_uncount, registry, number, counted)
                    registry[number] = counted


def _call_at(
    module: nn.Module, hook: Callable[..., Any], called: nn.Module, *arguments: Any
) -> Any:
    return hook(called, *arguments) if called is module else None


class _Counted:
    """Someone's hook, and that the run is inside of it while it runs."""

    def __init__(self, run: Run, hook: Callable[..., Any]) -> None:
        self.run, self.hook = run, hook

    def __call__(self, *arguments: Any) -> Any:
        if not self.run.is_in_its_thread():
            return self.hook(*arguments)
        self.run.depth += 1
        try:
            return self.hook(*arguments)
        finally:
            self.run.depth -= 1


def _uncount(registry: Registry, number: int, counted: _Counted) -> None:
    """Put the hook itself back, unless it was removed, also if it is counted by several runs."""
    outer: Any = registry.get(number)
    if outer is counted:
        registry[number] = counted.hook
    while isinstance(outer, _Counted):
        if outer.hook is counted:
            outer.hook = counted.hook
        outer = outer.hook


def _take_hooks_off(
    model: Any, level: int, context: Generator[Any, None, None], cut_short: list[bool]
) -> None:
    """Leave ``model.hooks``, and remove what it leaves when an interrupt cuts it short.

    Args:
        model: The model.
        level: The level of contexts that the model was at.
        context: What ``model.hooks`` is made of. Closing it again does nothing.
        cut_short: Not empty when it was interrupted on its way in, or here before.
    """
    must_mend = bool(cut_short)
    cut_short.append(True)
    context.close()
    if not must_mend:
        return
    for point in model.hook_dict.values():
        for handles, registry in (
            (point.fwd_hooks, point._forward_hooks),
            (point.bwd_hooks, point._backward_hooks),
        ):
            handles[:] = [handle for handle in handles if handle.context_level != level + 1]
            known = {handle.hook.id for handle in handles}
            for number, hook in list(registry.items()):
                if number not in known and _module_of(hook) == FROM_HOOK_POINTS:
                    del registry[number]
    model.context_level = level


def run_uncompiled(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Have modules that were compiled in place run as they were before, until it is undone.

    A compiled forward pass would be traced again with the hooks in it.
    """
    for module in modules:
        if module._compiled_call_impl is not None:
            undo.add(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None


def freeze(parameters: Iterable[Tensor], undo: Undo) -> None:
    """Freeze parameters until it is undone, so that the graph has no path to a weight gradient."""
    frozen: list[Tensor] = []
    undo.add(_thaw, frozen)
    for parameter in parameters:
        if parameter.requires_grad and parameter.is_leaf:
            frozen.append(parameter)
            parameter.requires_grad_(False)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Frozen parameters, and gradients on, for a block of code."""
    with Undo() as undo, undo, undo:
        freeze(parameters, undo)
        set_grad_enabled(True, undo)
        yield


def _thaw(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


def set_grad_enabled(enabled: bool, undo: Undo) -> None:
    """Switch gradients on or off until it is undone."""
    undo.add(torch.set_grad_enabled, torch.is_grad_enabled())
    torch.set_grad_enabled(enabled)


def _module_of(hook: Callable[..., Any]) -> str:
    """Where a hook was defined."""
    return str(getattr(hook, "__module__", ""))
