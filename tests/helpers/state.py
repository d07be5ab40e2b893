"""What a model must leave as it was, so that a test can compare before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

REGISTRIES = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def state(model: Any) -> dict[str, Any]:
    """Everything of a model of either class, and of torch, that hooks or a capture might change."""
    return {
        **state_of_model(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "rng": bits(torch.get_rng_state()),
        "grad_mode": torch.is_grad_enabled(),
    }


def left_as_it_came(model: Any) -> Iterator[Any]:
    """Lend a model to several tests, which have to leave it as it came: ``yield from`` this.

    It may have more attributes: a bridge notes what it has found out about its model.
    """
    before = state_of_model(model)
    yield model
    changes = changes_of(model, before)
    assert not changes, f"a test has changed a model that others share: {changes}"


def changes_of(model: Any, before: dict[str, Any]) -> list[str]:
    """What is not as it was in an earlier ``state_of_model``."""
    after = state_of_model(model)
    return [name for name, value in before.items() if after[name] != value]


def state_of_model(model: Any) -> dict[str, Any]:
    models = [model, *filter(None, [getattr(model, "original_model", None)])]
    named = [pair for one in models for pair in one.named_modules(remove_duplicate=False)]
    modules = list({id(module): module for _, module in named}.values())
    parameters = [parameter for one in models for parameter in one.parameters()]
    buffers = [buffer for one in models for buffer in one.buffers()]
    return {
        "tree": [(name, id(module), type(module)) for name, module in named],
        "torch_hooks": [[_hooks_of(m, name) for name in REGISTRIES] for m in modules],
        "tl_hooks": [
            (len(m.fwd_hooks), len(m.bwd_hooks)) for m in modules if isinstance(m, HookPoint)
        ],
        "hook_dict": [(name, id(point)) for name, point in model.hook_dict.items()],
        "mod_dict": [(name, id(module)) for name, module in getattr(model, "mod_dict", {}).items()],
        "state_dict": list(model.state_dict()),
        "training": [module.training for module in modules],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "grad": [p.grad if p.grad is None else bits(p.grad) for p in parameters],
        "weights": [bits(tensor) for tensor in (*parameters, *buffers)],
    }


def _hooks_of(module: nn.Module, registry: str) -> list[int]:
    """The hooks but those that transformers adds at the first use of an argument."""
    hooks = getattr(module, registry).items()
    return [n for n, hook in hooks if not str(hook.__module__).startswith("transformers.")]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()
