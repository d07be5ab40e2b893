"""A bridge around a model in training that shares its weights and none of its modules."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn

from tl_backward.sites import Model
from tl_backward.sites.hugging_face import fused_modules

SHARDED = ("DeepSpeedEngine", "FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel")


def bridge_of(model: Any, tokenizer: Any) -> Model:
    """A bridge in eval mode whose parameters are those of a Hugging Face model, now and later.

    The model itself keeps its modules, hooks and mode: what is wrapped is a copy of its modules
    around the same parameters and buffers.

    Args:
        model: A transformers model, or a ``PeftModel`` of LoRA adapters around one.
        tokenizer: Its tokenizer.

    Raises:
        NotImplementedError: When the parameters are sharded.
        ImportError: Where TransformerLens has no ``TransformerBridge``.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            "watching a training run needs a TransformerLens with TransformerBridge: pip install "
            "'transformer-lens>=3.9'"
        ) from error
    require_whole(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    twin = _twin(inner)
    if not getattr(twin.config, "architectures", None):
        twin.config.architectures = [type(inner).__name__]
    first = next(inner.parameters())
    bridge = TransformerBridge.boot_transformers(
        twin.config.name_or_path or twin.config.model_type,
        hf_model=twin,
        tokenizer=tokenizer,
        dtype=first.dtype,
        device=None if hasattr(inner, "hf_device_map") else str(first.device),
    )
    return bridge.eval()


def require_whole(model: Any) -> None:
    """Refuse a model of which this process holds a part, or which is wrapped for several.

    Raises:
        NotImplementedError: Naming the wrapper.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in SHARDED:
                raise NotImplementedError(
                    f"the model is in a {cls.__name__}: its weights are sharded over processes, or "
                    "wrapped; pass the plain model, and watch no training under DeepSpeed or FSDP"
                )


@torch.no_grad()
def refresh(bridge: Model) -> None:
    """Bring the parts that a bridge has copied out of fused weights up to date."""
    for fused in fused_modules(bridge):
        stored_out_in = isinstance(fused.module, nn.Linear)
        for part, columns in fused.columns:
            weight = fused.module.weight.detach()
            rows = weight if stored_out_in else weight.mT
            _update(part.weight, rows, columns)
            if getattr(part, "bias", None) is not None and fused.module.bias is not None:
                _update(part.bias, fused.module.bias.detach(), columns)


def _update(copied: torch.Tensor, source: torch.Tensor, columns: torch.Tensor) -> None:
    if copied.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        copied.data.copy_(source[columns.to(source.device)])


def _twin(model: Any) -> Any:
    """A copy of the modules around the same parameters and buffers."""
    shared = chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if "_original_forward" in vars(twin):  # accelerate's mixed precision, bound to the other model
        del twin.forward, twin._original_forward
    return twin
