"""A bridge's weights as the Hugging Face checkpoint that they came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_backward.sites import Model, all_modules, weights_processing
from tl_backward.sites.adapters import adapted
from tl_backward.sites.hugging_face import fused_modules, original_name


@torch.no_grad()
def export_model(model: Model, folder: Path) -> Path:
    """Write the weights of a bridge as they are now.

    Raises:
        NotImplementedError: For a ``HookedTransformer``, processed weights and adapters.
    """
    original = getattr(model, "original_model", None)
    if original is None:
        raise NotImplementedError(
            "a HookedTransformer holds no Hugging Face model to write; boot a TransformerBridge, "
            "and bind() the edit to it"
        )
    processing = weights_processing(model)
    if processing != "raw":
        raise NotImplementedError(
            f"the weights are processed ({processing}), and a checkpoint holds raw ones; boot the "
            "bridge anew without enable_compatibility_mode(), and bind() the edit to it"
        )
    if found := adapted(all_modules(model)):
        name = original_name(found[0][0])
        raise NotImplementedError(
            f"{name} has an adapter of peft, which a checkpoint of the model has no place for; "
            "boot a bridge of the merged model"
        )
    plain = _unwrapped(original)
    plain.load_state_dict(_state(model, plain), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    return folder


def _unwrapped(original: Any) -> Any:
    """A model of the same class without the bridge's modules, and without numbers."""
    with torch.device("meta"):
        plain = type(original)(copy.deepcopy(original.config))
    plain.generation_config = original.generation_config
    return plain.to(original.dtype)


def _state(model: Any, plain: nn.Module) -> dict[str, Tensor]:
    """The weights under their Hugging Face names; fused ones with what their parts are now."""
    live = {
        original_name(name): tensor
        for name, tensor in model.original_model.state_dict(keep_vars=True).items()
    }
    for fused in fused_modules(model):
        names = [name for name, tensor in live.items() if tensor is fused.module.weight]
        stored_out_in = isinstance(fused.module, nn.Linear)
        weight = fused.module.weight.detach().clone()
        part: Any
        for part, columns in fused.columns:
            outputs = weight if stored_out_in else weight.mT
            outputs[columns.to(weight.device)] = part.weight.to(weight.dtype)
        live |= dict.fromkeys(names, weight)
    return {name: live[name] for name in plain.state_dict()}
