"""Linear layers of a bridge beside those in TransformerLens's plan of attention and MLP.

Every linear layer that no other site or reason accounts for is found, whether or not
TransformerLens has a component for it. Its kind is in :data:`KINDS`, by its path in the block, or
else it is named after its module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from tl_backward.sites.adapters import base_layer
from tl_backward.sites.packing import how_packed

MAMBA = {"in_proj": "W_in_proj", "x_proj": "W_x", "dt_proj": "W_dt", "out_proj": "W_out_proj"}
ATTENTION = {"q_proj": "W_Q", "k_proj": "W_K", "v_proj": "W_V", "o_proj": "W_O"}
MLP = {"gate_proj": "W_gate", "up_proj": "W_in", "down_proj": "W_out"}
PARTS: dict[str, dict[str, str]] = {
    "mixer": MAMBA | ATTENTION | MLP,  # Nemotron-H has one of the three in each block
    "mamba": MAMBA,
    "mamba_decoder.mamba": MAMBA,
    "conv": {"in": "W_in_proj", "out": "W_out_proj"},
    "linear_attn": {
        **{"q_proj": "W_Q_linear", "k_proj": "W_K_linear", "v_proj": "W_V_linear"},
        **{"a_proj": "W_A", "b_proj": "W_B", "g_proj": "W_Z", "o_proj": "W_out_proj"},
        **{"in_proj_a": "W_A", "in_proj_b": "W_B", "in_proj_z": "W_Z", "out_proj": "W_out_proj"},
        **{"in_proj_qkv": "W_QKV", "in_proj_qkvz": "W_QKVZ", "in_proj_ba": "W_BA"},
    },
    "attn": {
        **{"q_a_proj": "W_DQ", "q_b_proj": "W_UQ", "kv_proj": "W_KV"},
        **{"kv_a_proj_with_mqa": "W_DKV", "kv_b_proj": "W_UKV", "kv": "W_KV"},
        **dict.fromkeys(("gate", "gate_proj", "g_proj"), "W_G"),
    },
    "shared_mlp": {"gate": "W_gate", "in": "W_in", "out": "W_out"},
    "temporal_block": ATTENTION,
    "mlp_block": MLP,
    "time_mix": {
        **{"receptance": "W_R_time", "key": "W_K_time"},
        **{"value": "W_V_time", "output": "W_O_time"},
    },
    "channel_mix": {"receptance": "W_R_channel", "in": "W_K_channel", "out": "W_V_channel"},
}
KINDS = {
    f"{part}.{leaf}": kind for part, of_part in PARTS.items() for leaf, kind in of_part.items()
}
"""The kind of a linear layer, by its path in a block: TransformerLens's, or else its own."""


OF_EXPERTS = re.compile("expert|router")


class OtherLinear(NamedTuple):
    """A linear layer, or the layer of ``peft`` around it.

    Attributes:
        name: The name of its site.
        kind: Its kind.
        path: Its path, in TransformerLens's names as far as they go.
        is_component: Whether TransformerLens wraps it, so that there are HookPoints around it.
        module: The layer.
        reason: Why it can have no site; None if it may.
    """

    name: str
    kind: str
    path: str
    is_component: bool
    module: nn.Module
    reason: str | None


WIDTHS = {"in_features", "nf"}
"""Attributes of linear layers, one of which each kind of them has."""


def other_linears(
    owner: Any, path: str, accounted_for: Callable[[nn.Module], bool]
) -> Iterator[OtherLinear]:
    """Every linear layer inside a component of a bridge, in TransformerLens's order, then the rest.

    Those of experts and their routers are left out.

    Args:
        owner: The component, such as a block.
        path: Its path.
        accounted_for: Whether a linear layer has a site already, or needs none.
    """
    if all(accounted_for(one) for one in owner.modules() if not WIDTHS.isdisjoint(vars(one))):
        return
    named = [*_components(owner, path)]
    components = {id(module): name for name, module in reversed(named)}
    seen = set()
    for name, module in (*named, *_inside(owner, path, components)):
        if id(module) in seen or not _is_linear(module) or accounted_for(module):
            continue
        seen.add(id(module))
        inside = name.removeprefix(f"{path}.")
        if not OF_EXPERTS.search(inside):
            part, leaf = _part_and_leaf(inside)
            kind = KINDS.get(inside, f"W_{leaf}")
            yield OtherLinear(
                name=".".join(filter(None, (path, part, kind))),
                kind=kind,
                path=name,
                is_component=id(module) in components,
                module=module,
                reason=_obstacle(inside),
            )


def _part_and_leaf(inside: str) -> tuple[str, str]:
    """A path without its end, and the end, with the indices in lists that belong to it."""
    part, _, leaf = inside.rpartition(".")
    while leaf.split("_")[0].isdigit():
        part, _, name = part.rpartition(".")
        leaf = f"{name}_{leaf}"
    return part, leaf


def _obstacle(inside: str) -> str | None:
    if inside.endswith(".dt_proj"):
        return "its mixer multiplies by the weight without calling the module"
    if "indexer" in inside.split("."):
        return "it only chooses positions, through which no gradient passes"
    if any(part.isdigit() for part in inside.split(".")):
        return "it is one of a list of layers, from which the block chooses"
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or one of ``peft`` around it."""
    from transformers.pytorch_utils import Conv1D

    layer = base_layer(module)
    return isinstance(layer, nn.Linear | Conv1D) or how_packed(layer) is not None


def _components(owner: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    """What the components wrap that TransformerLens has in one, and what itself does."""
    wrapped = getattr(owner, "original_component", None)
    if wrapped is not None and not _is_of_experts(wrapped):
        yield path, wrapped
        for name, child in owner._modules.items():
            if name != "_original_component":
                yield from _components(child, f"{path}.{name}")


def _inside(module: Any, path: str, components: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a component wraps, under the names of the components where there are any."""
    module = getattr(module, "original_component", module)
    path = components.get(id(module), path)
    yield path, module
    if not _is_linear(module):
        for name, child in module._modules.items():
            if child is not None and not _is_of_experts(child):
                yield from _inside(child, f"{path}.{name}", components)


def _is_of_experts(module: Any) -> bool:
    """Whether a module holds experts, or chooses them."""
    kind = type(getattr(module, "original_component", module)).__name__
    return bool(re.search("Expert|Router|Gating", kind))
