"""The HookPoints that a ``HookedTransformer`` lacks around its weights: added, called, removed.

While HookPoints are added, the modules around a weight get subclasses of their own classes, as
``torch.nn.utils.parametrize`` makes them. The subclasses call the HookPoints and leave the
computation to TransformerLens. They use no torch hooks, so a user's hooks run in the order of the
tensors, forward and backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tl_backward._turns import take_turn
from tl_backward._undo import Undo

_temporarily_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose added HookPoints will be removed."""


def add_hook_points(model: Any) -> None:
    """Add the HookPoints that the model lacks, under their names on a bridge.

    These are ``blocks.L.attn.{q,k,v,o}``, ``blocks.L.mlp.{in,gate,out}``, ``embed``, ``pos_embed``
    and ``unembed``, each with ``.hook_in`` and ``.hook_out``; ``embed.hook_in`` sees the token ids
    and ``pos_embed.hook_in`` the positions (-1 for padding). The model's results do not change.
    Adding them twice is harmless; `remove_hook_points` removes them.

    Raises:
        NotImplementedError: For weights quantised to 4 bits.
    """
    with Undo() as undo, undo, undo:
        take_turn(model, undo)
        attach_hook_points(model, undo)
        _temporarily_attached.discard(model)


def remove_hook_points(model: Any) -> None:
    """Remove the HookPoints that `add_hook_points` added, with their hooks, and nothing else."""
    with Undo() as undo, undo, undo:
        take_turn(model, undo)
        undo.add(_detach, model)


def attach_hook_points(model: Any, undo: Undo) -> None:
    """Add the HookPoints that the model lacks, until undone.

    Raises:
        NotImplementedError: For weights quantised to 4 bits.
    """
    refuse_quantized(model)
    if _passing(model.embed):
        return
    undo.add(_detach_again, model)
    _temporarily_attached.add(model)
    present = dict(model.named_modules())
    for module, passing in _passings(model):
        _mix_in(passing, module)
    for name, module in model.named_modules():
        if name not in present:
            parent, _, end = name.rpartition(".")
            module.name = name
            module.training = model.get_submodule(parent).training
            model.mod_dict[name] = module
            if end in ("hook_in", "hook_out"):
                model.hook_dict[name] = module


def _detach_again(model: Any) -> None:
    if model in _temporarily_attached:
        _detach(model)
        _temporarily_attached.discard(model)


def _detach(model: Any) -> None:
    """Remove all added HookPoints that are present."""
    for module in [*model.modules()]:
        module.__dict__.pop("neighbour", None)
        if passing := _passing(module):
            for name in passing.added:
                module._modules.pop(name, None)
            module.__class__ = type(module).__base__
    left = dict(model.named_modules())
    for names in (model.mod_dict, model.hook_dict):
        for name in [name for name in names if name not in left]:
            names.pop(name, None)


def refuse_quantized(model: Any) -> None:
    """Raise if weights are packed in 4 bits."""
    if model.cfg.load_in_4bit:
        raise NotImplementedError(
            "this HookedTransformer holds weights quantised to 4 bits (cfg.load_in_4bit), which "
            "have no site yet; load it without load_in_4bit"
        )


def reads_positions(model: Any) -> bool:
    """Whether the forward pass uses ``W_pos``."""
    return model.cfg.positional_embedding_type in ("standard", "shortformer")


def is_dense(mlp: Any) -> bool:
    """Whether an MLP is not a mixture of experts."""
    return has_matrix(mlp, "W_in")


def has_matrix(module: nn.Module, kind: str) -> bool:
    """Whether a module has such a weight, stored or recomputed."""
    return isinstance(getattr(module, kind, None), Tensor)


@dataclass(frozen=True, eq=False)
class _Passing:
    """The changes to a module while the added HookPoints are present.

    Another thread may run the model while HookPoints are added or removed. So every method copes
    with missing HookPoints, and none checks the module's class.

    Attributes:
        name: The method of the module's class to replace.
        method: Its replacement: a function of the module, the original method, and the arguments.
        added: New submodules: HookPoints, or pairs of them.
        beside: Existing submodules, each with the added HookPoint to call before or after it.
    """

    name: str
    method: Callable[..., Tensor]
    added: tuple[str, ...] = ()
    beside: Mapping[str, tuple[_Passing, str]] = field(default_factory=dict)


def _passing(module: nn.Module) -> _Passing | None:
    return getattr(type(module), "passing", None)


def _mix_in(passing: _Passing, module: Any) -> None:
    module.__class__ = _mixed(passing, module.__class__)
    for name in passing.added:
        module.add_module(name, _hook_point() if name in ("hook_in", "hook_out") else _ends())
    for name, (before_or_after, point) in passing.beside.items():
        submodule: Any = module.get_submodule(name)
        vars(submodule)["neighbour"] = module.get_submodule(point)
        submodule.__class__ = _mixed(before_or_after, submodule.__class__)


@cache
def _mixed(passing: _Passing, cls: Any) -> Any:
    own = getattr(cls, passing.name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return passing.method(self, partial(own, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"passing": passing, passing.name: method})


def _hook_point() -> nn.Module:
    from transformer_lens.hook_points import HookPoint

    return HookPoint()


def _ends() -> nn.Module:
    ends = nn.Module()
    ends.hook_in, ends.hook_out = _hook_point(), _hook_point()
    return ends


def _through(point: Any, x: Tensor) -> Tensor:
    """Pass ``x`` through a HookPoint, if present."""
    return x if point is None else point(x)


def _leave(module: nn.Module, name: str, x: Tensor) -> Tensor:
    return _through(_added(module, name), x)


def _enter(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Pass ``x`` through a HookPoint; hooks get a copy, so in-place edits do not affect others."""
    point = _added(module, name)
    return _through(point, x.clone() if point is not None and point.fwd_hooks else x)


def _added(module: nn.Module, name: str) -> Any:
    """An added HookPoint, if present."""
    parent, _, end = name.rpartition(".")
    holder = module._modules.get(parent) if parent else module
    return None if holder is None else holder._modules.get(end)


def _before(self: Any, own: Any, x: Tensor) -> Tensor:
    return own(_through(vars(self).get("neighbour"), x))


def _after(self: Any, own: Any, x: Tensor) -> Tensor:
    return _through(vars(self).get("neighbour"), own(x))


BEFORE = _Passing("__call__", _before)
AFTER = _Passing("__call__", _after)


def _linear(self: Any, own: Any, x: Tensor) -> Tensor:
    return _leave(self, "hook_out", own(_enter(self, "hook_in", x)))


def _normed_embed(self: Any, own: Any, tokens: Tensor) -> Tensor:
    return own(_enter(self, "hook_in", tokens))


def _pos_embed(self: Any, own: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Expose the positions that TransformerLens computes internally.

    Its own lookup returns them from a table of the numbers from 1 on; padding gives 0.
    """
    numbers = torch.arange(1, len(self.W_pos) + 1, device=self.W_pos.device).unsqueeze(-1)
    stand_in = SimpleNamespace(W_pos=numbers)
    positions = own.func(stand_in, tokens, *args, **kwargs).squeeze(-1) - 1
    seen = _enter(self, "hook_in", positions)
    if seen is positions or torch.equal(seen, positions):
        return _leave(self, "hook_out", own(tokens, *args, **kwargs))
    return _leave(self, "hook_out", torch.where(seen.unsqueeze(-1) < 0, 0, self.W_pos[seen]))


def _attention(
    self: Any,
    own: Any,
    query_input: Tensor,
    key_input: Tensor,
    value_input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    query_input = _enter(self, "q.hook_in", query_input)
    key_input = _enter(self, "k.hook_in", key_input)
    value_input = _enter(self, "v.hook_in", value_input)
    return _leave(self, "o.hook_out", own(query_input, key_input, value_input, *args, **kwargs))


def _mlp(self: Any, own: Any, x: Tensor) -> Tensor:
    return _leave(self, "out.hook_out", own(_enter(self, "in.hook_in", x)))


def _gated_mlp(self: Any, own: Any, x: Tensor) -> Tensor:
    branches = _Branches(_enter(self, "gate.hook_in", x), _enter(self, "in.hook_in", x))
    return _leave(self, "out.hook_out", own(branches))


class _Branches:
    """Stand-in for the input of a gated MLP; each product takes the next of its tensors.

    TransformerLens's own forward pass, whichever operations it uses, thus multiplies separate
    tensors by ``W_gate`` and then by ``W_in``.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def to(self, device: torch.device) -> _Branches:
        return _Branches(*(tensor.to(device) for tensor in self.tensors))

    @classmethod
    def __torch_function__(
        cls, product: Callable, types: Any, args: tuple, kwargs: dict | None = None
    ) -> Tensor:
        branches, *weight = args
        return product(branches.tensors.pop(0), *weight, **(kwargs or {}))


LINEAR = _Passing("forward", _linear, ("hook_in", "hook_out"))
NORMED_EMBED = _Passing(
    "forward", _normed_embed, ("hook_in", "hook_out"), {"ln": (BEFORE, "hook_out")}
)
POS_EMBED = _Passing("forward", _pos_embed, ("hook_in", "hook_out"))
ATTENTION = _Passing(
    "forward",
    _attention,
    ("q", "k", "v", "o"),
    {
        "hook_q": (BEFORE, "q.hook_out"),
        "hook_k": (BEFORE, "k.hook_out"),
        "hook_v": (BEFORE, "v.hook_out"),
        "hook_z": (AFTER, "o.hook_in"),
    },
)
MLP = _Passing(
    "forward",
    _mlp,
    ("in", "out"),
    {"hook_pre": (BEFORE, "in.hook_out"), "hook_post": (AFTER, "out.hook_in")},
)
GATED_MLP = _Passing(
    "forward",
    _gated_mlp,
    ("in", "gate", "out"),
    {
        "hook_pre": (BEFORE, "gate.hook_out"),
        "hook_pre_linear": (BEFORE, "in.hook_out"),
        "hook_post": (AFTER, "out.hook_in"),
    },
)


def _passings(model: Any) -> Iterator[tuple[nn.Module, _Passing]]:
    """The modules around the weights, and the changes to each."""
    yield model.embed, NORMED_EMBED if "ln" in model.embed._modules else LINEAR
    if reads_positions(model):
        yield model.pos_embed, POS_EMBED
    for block in model.blocks:
        yield block.attn, ATTENTION
        mlp = block._modules.get("mlp")
        if mlp is not None and is_dense(mlp):
            yield mlp, GATED_MLP if has_matrix(mlp, "W_gate") else MLP
    if "hook_in" not in model.unembed._modules:
        yield model.unembed, LINEAR
