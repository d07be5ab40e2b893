"""``peft`` layers: their base matrix, and the two matrices of each LoRA adapter.

Nothing here imports ``peft``: a model has such layers only if ``peft`` is already imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class AdapterMatrix(NamedTuple):
    """One of the two matrices of a LoRA adapter, ``y + scaling * (x A) B``.

    Attributes:
        kind: ``"lora_A"`` or ``"lora_B"``, followed by the adapter's name unless it is ``default``.
        module: The linear layer that holds it; None in an embedding, which has none.
        weight: Its parameter.
        unused: Why the forward pass currently does not use it; None if it does.
    """

    kind: str
    module: nn.Linear | None
    weight: Tensor
    unused: str | None


def adapted(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """The ``peft`` layers among the modules, with their paths."""
    return [one for one in modules if _is_adapted(one[1])] if "peft" in sys.modules else []


def _is_adapted(module: object) -> bool:
    """Whether a module is a ``peft`` layer around another layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def base_layer(module: Any) -> Any:
    """The layer in use inside a ``peft`` layer; any other module itself."""
    if _has_copies(module):
        copies, active = module.modules_to_save, module.active_adapters
        unused = module.disable_adapters or not active or any(one not in copies for one in active)
        return module.original_module if unused else copies[active[0]]
    return module.base_layer if _is_adapted(module) else module


def unused_copies(module: Any) -> list[nn.Module]:
    """The unused layers if ``peft`` trains copies of a layer (``modules_to_save``)."""
    if not _has_copies(module):
        return []
    every = [module.original_module, *module.modules_to_save.values()]
    return [one for one in every if one is not base_layer(module)]


def _has_copies(module: object) -> bool:
    """Whether ``peft`` trains a copy of the module for each adapter."""
    wrappers = sys.modules.get("peft.utils.other")
    return wrappers is not None and isinstance(module, wrappers.ModulesToSaveWrapper)


def applied_adapters(module: Any) -> list[str]:
    """The adapters that the module's forward pass adds to its base layer's output."""
    if not _is_adapted(module) or module.disable_adapters or module.merged:
        return []
    available = {name for held in module.adapter_layer_names for name in getattr(module, held)}
    return [name for name in module.active_adapters if name in available]


def not_plain_lora(module: Any) -> str | None:
    """Why a ``peft`` layer does not compute ``x W + scaling * (x A) B``; None if it does."""
    if not _is_adapted(module):
        return None
    lora = sys.modules["peft.tuners.lora.layer"]
    if type(module).forward not in (lora.Linear.forward, lora.Embedding.forward) or _is_adapted(
        module.base_layer
    ):
        package = type(module).__module__.split(".")[2]
        return f"it is in a peft layer that is not plain LoRA ({package} {type(module).__name__})"
    for name in applied_adapters(module):
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None or module.use_dora.get(name):
            kind = "DoRA" if variant is None else type(variant).__name__
            return f"its peft adapter {name!r} is not plain LoRA ({kind})"
    return None


def adapter_matrices(layer: Any, weight: str) -> Iterator[AdapterMatrix]:
    """The matrices of every LoRA adapter of the weight with this name."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or not isinstance(layer, lora.LoraLayer):
        return
    applied = applied_adapters(layer)
    for stored in ("lora_", "lora_embedding_"):
        for adapter in getattr(layer, f"{stored}A"):
            unused = None if adapter in applied else _why_unused(layer, adapter, weight)
            for side in ("A", "B"):
                one = getattr(layer, f"{stored}{side}")[adapter]
                kind = f"lora_{side}" if adapter == "default" else f"lora_{side}.{adapter}"
                if isinstance(one, nn.Linear):
                    yield AdapterMatrix(kind, one, one.weight, unused)
                else:
                    unused = unused or "peft applies it without a module"
                    yield AdapterMatrix(kind, None, one, unused)


def _why_unused(module: Any, adapter: str, weight: str) -> str:
    if adapter in module.merged_adapters:
        return f"the adapter {adapter!r} is merged into {weight}"
    if module.merged:
        return f"no adapter is applied while {module.merged_adapters[0]!r} is merged into {weight}"
    if module.disable_adapters:
        return "the adapters are disabled"
    return f"the adapter {adapter!r} is not active; see peft's set_adapter()"
