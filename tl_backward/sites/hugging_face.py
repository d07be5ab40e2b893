"""The weights of the Hugging Face model inside a bridge, by their names there, and their sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_backward.sites.adapters import base_layer
from tl_backward.sites.site import WeightSite

WRAPPED = "._original_component"
"""What a bridge adds to the name of each module that it wraps."""


class Part(NamedTuple):
    """What a site has of the weight of a Hugging Face module.

    Attributes:
        site: The site.
        columns: The outputs of the module that are those of the site, in its order; None for all.
    """

    site: WeightSite
    columns: Int[Tensor, "d_out"] | None


def original_name(name: str) -> str:
    """The name of a module or parameter before the bridge wrapped it."""
    return name.replace(WRAPPED, "").removeprefix(WRAPPED.removeprefix(".") + ".")


def parts_of_modules(model: Any, sites: Sequence[WeightSite]) -> dict[str, list[Part]]:
    """By its Hugging Face name, the sites that each module of a bridge became.

    Modules without a weight matrix that has a site have none.
    """
    by_module = {id(site.holder[0]): site for site in sites if "lora_" not in site.kind}
    fused = {id(one.module): one.parts(by_module) for one in fused_modules(model)}
    found: dict[str, list[Part]] = {}
    for name, module in model.original_model.named_modules(remove_duplicate=False):
        parts = found.setdefault(original_name(name), [])
        layer = base_layer(module)
        if not parts and id(layer) in by_module:
            parts.append(Part(by_module[id(layer)], None))
        elif not parts:
            parts.extend(fused.get(id(layer), ()))
    return found


class FusedModule(NamedTuple):
    """A module whose weight a bridge has split into several.

    Attributes:
        module: The linear layer.
        columns: By the module that has a part of it, the outputs that are in that part.
    """

    module: Any
    columns: list[tuple[Any, Int[Tensor, "d_out"]]]

    def parts(self, by_module: dict[int, WeightSite]) -> list[Part]:
        """Its parts that are sites."""
        return [
            Part(by_module[id(part)], columns)
            for part, columns in self.columns
            if id(part) in by_module
        ]


def fused_modules(model: Any) -> Iterator[FusedModule]:
    """The fused projections (QKV, gate and up) of a bridge that are used in parts.

    Raises:
        NotImplementedError: When a part is something else than some of the outputs.
    """
    for block in model._modules.get("blocks") or ():
        for part in block._modules.values():
            yield from _fused_in(part)


def _fused_in(part: Any) -> Iterator[FusedModule]:
    original = getattr(part, "original_component", None)
    qkv = getattr(part, "_modules", {}).get("qkv")
    gate_up = getattr(original, str(getattr(part, "fused_attr", None)), None)
    for fused, split, names in (
        (qkv, getattr(part, "split_qkv_matrix", None), ("q", "k", "v")),
        (gate_up, getattr(part, "split_gate_up_matrix", None), ("gate", "in")),
    ):
        if fused is not None and split is not None:
            module = base_layer(getattr(fused, "original_component", fused))
            components = [part._modules[name].original_component for name in names]
            columns = _columns(original, fused, module, split)
            yield FusedModule(module, list(zip(components, columns, strict=True)))


def _columns(
    original: Any, fused: nn.Module, module: Any, split: Callable[[Any], tuple[Any, ...]]
) -> list[Int[Tensor, "d_out"]]:
    """Which outputs each part has: what the bridge's own split makes of a weight of their numbers.

    The split is given a stand-in of the layer, so that nothing of the model changes.
    """
    of_outputs = 0 if isinstance(module, nn.Linear) else 1
    numbers = torch.arange(module.weight.shape[of_outputs], dtype=torch.float32)
    numbers = numbers.unsqueeze(1 - of_outputs).expand(module.weight.shape)
    stand_in, counted = _with_own_children(original), _with_own_children(module)
    counted._parameters["weight"] = nn.Parameter(numbers, requires_grad=False)
    for name, child in original._modules.items():
        if child is fused or getattr(child, "original_component", child) is module:
            stand_in._modules[name] = counted
    with torch.random.fork_rng([]):  # the new layers are initialised at random first
        parts = [part.weight for part in split(stand_in)]
    columns = [part.detach()[:, 0].cpu().long() for part in parts]
    every = torch.cat(columns)
    if len(every.unique()) != len(every) or any(bool((p != p[:, :1]).any()) for p in parts):
        raise NotImplementedError(
            f"TransformerLens splits the weight of a {type(original).__name__} into something "
            "else than its outputs, so an update of it has no parts"
        )
    return columns


def _with_own_children(module: nn.Module) -> Any:
    """The same module, of which children and parameters can be replaced."""
    twin = copy.copy(module)
    vars(twin).update(_modules=dict(module._modules), _parameters=dict(module._parameters))
    return twin
