"""Everything that a torch module's outputs depend on: settings, weights, hooks and tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from tl_backward.provenance.modules import is_installed

WITHOUT_EFFECT = {
    *("device", "init_mode", "init_weights", "model_name", "n_devices", "n_params", "seed"),
    *("tokenizer_name", "transformers_version"),
}
"""Config entries that do not affect the outputs, given the weights."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The configs of a model; for a module without one, the attributes of its submodules."""
    holders: dict[str, Any] = {"cfg": module, "config": getattr(module, "original_model", module)}
    configs = {
        name: getattr(holder, name).to_dict()
        for name, holder in holders.items()
        if hasattr(getattr(holder, name, None), "to_dict")
    }
    if not configs:
        for name, part in module.named_modules():
            public = {key: value for key, value in vars(part).items() if not key.startswith("_")}
            public.pop("training")
            yield f"attributes.{name}", [type(part), public]
    for name, config in configs.items():
        for key, value in config.items():
            if key not in WITHOUT_EFFECT and not key.startswith("_"):
                yield f"{name}.{key}", value


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each once."""
    seen = set()
    for root in (getattr(module, "original_model", None), module):
        for name, part in root.named_modules() if isinstance(root, nn.Module) else ():
            derived = part._non_persistent_buffers_set
            buffers = {key: value for key, value in part._buffers.items() if key not in derived}
            for key, tensor in {**part._parameters, **buffers}.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"weights.{name}.{key}", _stored(part, key, tensor)


def hooks(module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """The user's hooks: all at HookPoints, and elsewhere those not defined in a package."""
    for name, part in module.named_modules():
        every = [(kind, hook) for kind in HOOKS for hook in getattr(part, kind).values()]
        if type(part).__name__ == "HookPoint":
            found = [(kind, _given_hook(hook)) for kind, hook in every]
        else:
            found = [(kind, hook) for kind, hook in every if not is_installed(_module_of(hook))]
        if found:
            yield f"hooks.{name}", found


def tokenizer_settings(tokenizer: Any) -> list[Any]:
    """A tokenizer's settings, except the padding and truncation of its last call."""
    every = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: every[key] for key in every if key not in ("padding", "truncation")}
    return [type(tokenizer).__qualname__, str(tokenizer.special_tokens_map), kept]


def _stored(part: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """The stored values of a weight, also if accelerate offloads it or it is quantised."""
    elsewhere = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
    if tensor.is_meta and elsewhere is not None:
        return elsewhere[key]
    return tensor if tensor.is_floating_point() else tensor.detach().as_subclass(Tensor)


def _given_hook(hook: Any) -> Any:
    """The hook passed to ``HookPoint.add_hook``, without TransformerLens's wrappers."""
    while _module_of(hook) == "transformer_lens.hook_points":
        around = inspect.getclosurevars(hook).nonlocals
        hook = around["full_hook"] if "full_hook" in around else around["hook"]
    return hook


def _module_of(hook: Any) -> str | None:
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__module__", None)
