"""Hooks of one run of a model, and their interplay with other hooks on it."""

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
"""PyTorch hooks of one kind, per module or global, by handle id."""

FROM_HOOK_POINTS = "transformer_lens.hook_points"
FROM_BRIDGES = "transformer_lens.model_bridge"


class Run:
    """One run of a model, and the hooks on the model during it.

    The hooks act only on the run's own tensors: not on those of other threads, nor after the run,
    nor while its loss is computed. The backward pass belongs to the run, because gradient
    checkpointing repeats parts of the forward pass there.

    Attributes:
        stage: The current stage of the run.
        depth: Number of other hooks that the run is inside of. Their calls are not part of the run.
        others_have_hooks: Whether other forward hooks are on the model.

    Args:
        undo: Ends the run.
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
        """Whether the calling thread is the run's."""
        return get_ident() == self._thread

    def may_own(self, tensor: Any) -> bool:
        """Whether a tensor seen by a hook may belong to the run.

        Autograd runs the backward pass of accelerator tensors in its own threads.
        """
        if self.stage not in ("forward", "backward"):
            return False
        return self.is_in_its_thread() or (self.stage == "backward" and tensor.device.type != "cpu")

    def is_forward(self) -> bool:
        """Whether the calling hook was called by the run's forward pass."""
        return self.stage == "forward" and self.is_in_its_thread()

    def hook_forward_pre(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        first: bool = False,
        with_kwargs: bool = False,
    ) -> None:
        """Add a PyTorch forward pre-hook, after the existing ones or before them all."""
        if with_kwargs:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            return
        global_hooks = torch_module._global_forward_pre_hooks
        self._hook(module, module._forward_pre_hooks, global_hooks, hook, first)

    def hook_forward(
        self, module: nn.Module, hook: Callable[..., Any], first: bool = False
    ) -> None:
        """Add a PyTorch forward hook, after the existing ones or before them all."""
        global_hooks = torch_module._global_forward_hooks
        self._hook(module, module._forward_hooks, global_hooks, hook, first)

    def hook_backward(
        self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]
    ) -> None:
        """Add PyTorch hooks before and after a module's full backward hooks."""
        self._add(module._backward_pre_hooks, before)
        self._add(module._backward_hooks, after)

    def _hook(
        self,
        module: nn.Module,
        registry: Registry,
        global_hooks: Registry,
        hook: Callable[..., Any],
        first: bool,
    ) -> None:
        """Global hooks run before a module's own, so only a global hook can run first."""
        if first and global_hooks:
            self._add(global_hooks, partial(_call_at, module, hook), first)
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
        """Put TransformerLens hooks on a model, as ``model.hooks`` does, until undone.

        Raises:
            Exception: As TransformerLens, for instance if no HookPoint has the name.
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
        """Count in ``depth`` while forward hooks of the modules, or global ones, run.

        The hooks by which a bridge calls its own HookPoints belong to the forward pass.
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
    """Wraps another hook so that the run counts it in ``depth`` while it runs."""

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
    """Restore the wrapped hook unless it was removed, also if several runs wrap it."""
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
    """Exit ``model.hooks``, and clean up after an interrupt during entry or exit.

    Args:
        model: The model.
        level: The model's context level before the run.
        context: The generator of ``model.hooks``. Closing it again does nothing.
        cut_short: Not empty if entering, or an earlier call of this function, was interrupted.
    """
    must_clean_up = bool(cut_short)
    cut_short.append(True)
    context.close()
    if not must_clean_up:
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
    """Run modules that were compiled in place without compilation, until undone.

    A compiled forward pass would be traced again together with the hooks.
    """
    for module in modules:
        if module._compiled_call_impl is not None:
            undo.add(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None


def freeze(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Freeze parameters until undone, so that the graph has no path to a weight gradient."""
    frozen: list[tuple[nn.Module, str, Tensor]] = []
    undo.add(_thaw, frozen)
    for module in modules:
        for name, held in module._parameters.items():
            if held is not None and held.requires_grad and held.is_leaf:
                frozen.append((module, name, held))
    for _, _, parameter in frozen:
        parameter.requires_grad_(False)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context with frozen parameters and gradients enabled."""
    with Undo() as undo, undo, undo:
        freeze(modules, undo)
        set_grad_enabled(True, undo)
        yield


def _thaw(frozen: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
    """Thaw the parameters, and what has replaced those that are offloaded."""
    for module, name, parameter in frozen:
        parameter.requires_grad_(True)
        current = module._parameters.get(name)
        if current is not None and parameter.device.type == "meta":
            current.requires_grad_(True)


def set_grad_enabled(enabled: bool, undo: Undo) -> None:
    """Enable or disable gradients until undone."""
    undo.add(torch.set_grad_enabled, torch.is_grad_enabled())
    torch.set_grad_enabled(enabled)


def _module_of(hook: Callable[..., Any]) -> str:
    """The module that defines a hook."""
    return str(getattr(hook, "__module__", ""))
