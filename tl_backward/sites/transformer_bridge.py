"""``TransformerBridge``: the wrapped Hugging Face modules hold and multiply by the weights.

A site is a module that computes ``x W + b`` (a linear layer, or an embedding lookup) in a place
that TransformerLens names. ``x`` and ``y`` are read at that module itself, because the bridge's own
HookPoints may show their hooks a reshaped copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_backward._undo import Undo
from tl_backward.sites.adapters import (
    adapted,
    adapter_matrices,
    applied_adapters,
    base_layer,
    not_plain_lora,
    unused_copies,
)
from tl_backward.sites.experts import expert_sites, has_experts
from tl_backward.sites.kinds import writes_stream
from tl_backward.sites.names import layer_of
from tl_backward.sites.offloading import values_of
from tl_backward.sites.other_linears import other_linears
from tl_backward.sites.packing import how_packed
from tl_backward.sites.parameters import NamedParameter
from tl_backward.sites.site import (
    PER_HEAD,
    RESIDUAL_HOOKS,
    UnsupportedWeight,
    WeightSite,
    final_norm,
    unchanged,
)
from tl_backward.sites.tap import Tap
from tl_backward.sites.ties import told_apart

PROJECTIONS = {
    "attn": {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"},
    "mlp": {"W_gate": "gate", "W_in": "in", "W_out": "out"},
}
LOOKUPS = {"W_E": "embed", "W_pos": "pos_embed", "W_token_type": "token_type_embed"}
STACKS = ("blocks", "L_blocks", "H_blocks")
"""The lists of blocks. Those of hrm_text run several times, and are no layers by number."""
HEADS = ("mlm_head", "prediction_head")
"""Components between the last block and the unembedding."""
SEES_PADDING = ("DeepseekV4ForCausalLM", "FalconH1ForCausalLM", "OpenAIGPTLMHeadModel")
"""Attention models that do not ignore tokens with an attention mask of 0."""


def accepts(model: object) -> bool:
    """Whether the model is a ``TransformerBridge``.

    Raises:
        NotImplementedError: If it wraps something other than a decoder-only language model.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return False
    if not isinstance(model, TransformerBridge):
        return False
    other_kinds = {
        "an encoder-decoder model": "decoder_blocks" in model._modules,
        "a vision model": getattr(model.cfg, "is_visual_model", False),
        "an audio model": getattr(model.cfg, "is_audio_model", False),
        "a model without unembedding": "unembed" not in model._modules,
    }
    for kind, is_so in other_kinds.items():
        if is_so:
            raise NotImplementedError(
                f"this TransformerBridge wraps {kind} ({type(model.original_model).__name__}); "
                "only decoder-only language models are supported"
            )
    return True


def survey(model: Any) -> Iterator[WeightSite | UnsupportedWeight]:
    """Every weight matrix of the model: its site, or why it has none.

    Raises:
        NotImplementedError: If the bridge leaves a ``peft`` adapter out of its forward pass.
    """
    _require_adapters_at_work(model)
    found = [*_matrices(model)]
    found += _other_matrices(model, found)
    present = {(one.kind, one.layer) for one in found if isinstance(one, WeightSite)}
    return told_apart(
        one
        for one in found
        if isinstance(one, WeightSite)
        or one.parameter is not None
        or (one.kind, one.layer) not in present
    )


def _other_matrices(
    model: Any, found: Iterable[WeightSite | UnsupportedWeight]
) -> Iterator[WeightSite | UnsupportedWeight]:
    """The linear layers beside those that are found, and beside the experts."""
    known = {id(part) for module, _ in _copied(model) for part in module.modules()}
    known |= {id(one.holder[0]) for one in found if isinstance(one, WeightSite)}
    refused = {id(one.parameter) for one in found if isinstance(one, UnsupportedWeight)}

    def is_accounted_for(module: nn.Module) -> bool:
        layer = base_layer(module)
        return id(layer) in known or id(getattr(layer, "weight", None)) in refused

    beside = _beside_blocks(model)
    for path, module in beside:
        if isinstance(module, nn.Embedding) and not is_accounted_for(module):
            yield from _lookup(f"W_{path}", path, module, None)
    heads = [(name, model._modules[name]) for name in HEADS if name in model._modules]
    for path, owner in [*((path, block) for path, _, block in _blocks(model)), *beside, *heads]:
        layer = layer_of(f"{path}.")
        for one in other_linears(owner, path, is_accounted_for):
            if one.reason is not None:
                weight = getattr(base_layer(one.module), "weight", None)
                yield UnsupportedWeight(one.name, one.kind, layer, one.reason, weight)
            else:
                at = one.path if one.is_component else None
                for found_there in _linear(one.name, one.kind, layer, at, one.module):
                    yield _with_first_cycles(found_there)


def _blocks(model: Any) -> Iterator[tuple[str, int | None, Any]]:
    """Every block with its path, and its layer if it is one."""
    for stack in STACKS:
        for i, block in enumerate(model._modules.get(stack) or ()):
            yield f"{stack}.{i}", i if stack == "blocks" else None, block


def _beside_blocks(model: Any) -> list[tuple[str, Any]]:
    """The single layers beside the blocks in the module that holds them."""
    blocks = model.adapter.component_mapping.get("blocks")
    if blocks is None:
        return []
    holder = model.original_model.get_submodule(str(blocks.name).rpartition(".")[0])
    names = {id(component): name for name, component in model._modules.items()}
    return [
        (names.get(id(module), name), module)
        for name, module in holder._modules.items()
        if module is not None and not getattr(module, "original_component", module)._modules
    ]


def _with_first_cycles(found: WeightSite | UnsupportedWeight) -> WeightSite | UnsupportedWeight:
    """The same of a block of hrm_text, whose first passes run under ``torch.no_grad()``."""
    if isinstance(found, WeightSite) and found.name.startswith("L_blocks."):
        return replace(found, also_without_grad=True)
    return found


def _matrices(model: Any) -> Iterator[WeightSite | UnsupportedWeight]:
    for kind, path in LOOKUPS.items():
        component = model._modules.get(path)
        if _weight(component) is not None:
            yield from _lookup(kind, path, component.original_component, component)
    for owner, layer, block in _blocks(model):
        for part, projections in PROJECTIONS.items():
            for kind, projection in projections.items():
                yield from _projection(kind, owner, layer, block, part, projection)
        if layer is not None:
            yield from expert_sites(block, layer, _linear, _behind_mlp(block))
    component = model._modules.get("unembed")
    if _weight(component) is not None:
        for found in _linear("unembed.W_U", "W_U", None, "unembed", component.original_component):
            yield _apart_from_embedding(found, model._modules.get("embed"))


def _apart_from_embedding(
    found: WeightSite | UnsupportedWeight, embed: Any
) -> WeightSite | UnsupportedWeight:
    """Refuse a site whose parameter is also, under another name, an adapter of the embedding."""
    adapters = adapter_matrices(getattr(embed, "original_component", None), "embed.W_E")
    if isinstance(found, WeightSite):
        storages = {one.weight.untyped_storage().data_ptr() for one in adapters}
        if (
            storages
            and not found.packed
            and found.parameter.untyped_storage().data_ptr() in storages
        ):
            reason = "it shares memory with an adapter of embed.W_E, so edits would change both"
            return UnsupportedWeight(found.name, found.kind, None, reason, found.parameter)
    return found


def _require_adapters_at_work(model: Any) -> None:
    """Refuse models whose forward pass leaves out or would merge adapters."""
    found = adapted(modules(model))
    if not found:
        return
    copied, bypassed = _by_part(_copied(model)), _by_part(_bypassed(model))
    for path, module in found:
        name = path.replace("._original_component", "")
        applied, merged = applied_adapters(module), module.merged_adapters
        if merged and module.disable_adapters:
            raise NotImplementedError(
                f"the adapter {merged[0]!r} of {name} is merged and disabled, so the next forward "
                "pass would change the weight; call peft's unmerge_adapter() first"
            )
        why = copied.get(id(module)) if applied or merged else None
        why = why or (bypassed.get(id(module)) if applied else None)
        if why is not None:
            raise NotImplementedError(
                f"TransformerLens leaves the adapter {(applied + merged)[0]!r} of {name} out of "
                f"the forward pass: the weight is {why}. Merge it into the weight before booting: "
                "boot_transformers(..., hf_model=peft_model.merge_and_unload())"
            )


def _by_part(unused: Iterable[tuple[nn.Module, str]]) -> dict[int, str]:
    """The reasons by the ``id`` of each module and of those inside it."""
    return {id(part): why for module, why in unused for part in module.modules()}


def _copied(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose weights the bridge uses as copies."""
    for block in model._modules.get("blocks") or ():
        for name, part in block._modules.items():
            fused = part._modules.get("qkv") if name == "attn" else None
            if fused is not None:
                yield fused, "split into W_Q, W_K and W_V by the bridge, and no longer used"
            original = getattr(part, "original_component", None)
            fused = getattr(original, getattr(part, "fused_attr", ""), None)
            if fused is not None:
                yield fused, "split into W_gate and W_in by the bridge, and no longer used"
        mlp = block._modules.get("mlp")
        for kind, projection in PROJECTIONS["mlp"].items():
            if hasattr(mlp, f"_processed_{kind}") and projection in mlp._modules:
                yield mlp._modules[projection], f"replaced by a processed {kind} of the bridge"


def _bypassed(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose weights the bridge multiplies by without calling them."""
    for block in model._modules.get("blocks") or ():
        for part, projections in PROJECTIONS.items():
            parent = block._modules.get(part)
            for kind, projection in projections.items():
                component = getattr(parent, "_modules", {}).get(projection)
                setting = _treats_heads_apart(parent, kind)
                if component is not None and setting is not None:
                    yield component, f"used head by head with cfg.{setting}"
                elif component is not None and _multiplies_by_itself(parent):
                    yield component, "used without calling its module in compatibility mode"


def _lookup(
    kind: str, path: str, whole: Any, component: Any
) -> Iterator[WeightSite | UnsupportedWeight]:
    """A look-up of an embedding; ``component`` is None where TransformerLens has none."""
    name, module = f"{path}.{kind}", base_layer(whole)
    reason = not_plain_lora(whole)
    if reason is None and not _lookup_scale(module):
        reason = f"its {type(module).__name__} is not a plain lookup"
    offset = _position_offset(module)
    hook_in, hook_out = _hooks(None if component is None else path)
    if reason is not None:
        yield UnsupportedWeight(name, kind, None, reason, module.weight)
    else:
        yield WeightSite(
            name=name,
            kind=kind,
            layer=None,
            hook_in=hook_in if offset is None else None,
            hook_out=hook_out,
            d_in=module.weight.shape[0],
            d_out=module.weight.shape[1],
            x_tap=lambda: Tap(module, "input", keyword=None if offset is None else "position_ids"),
            y_tap=lambda: Tap(module, "output"),
            holder=(module, "weight"),
            layout=unchanged,
            encode=partial(_one_hot, module, offset or 0),
            padding_row=module.padding_idx,
            hook_out_scale=getattr(component, "_output_contribution_scale", 1.0),
        )
    yield from _adapters(name, kind, None, path if component is not None else None, whole)


def _projection(
    kind: str, owner: str, layer: int | None, block: Any, part: str, projection: str
) -> Iterator[WeightSite | UnsupportedWeight]:
    name = f"{owner}.{part}.{kind}"
    parent = block._modules.get(part)
    if _is_sparse(parent):
        return
    if _is_moe(parent):
        projection = f"dense_{projection}"
    component = None if parent is None else parent._modules.get(projection)
    if getattr(component, "original_component", None) is None:
        component = None
    reason = _obstacle(kind, projection, block, parent, component)
    if reason is not None:
        yield UnsupportedWeight(name, kind, layer, reason, _weight(component))
    elif component is not None:
        path, module = f"{owner}.{part}.{projection}", component.original_component
        for found in _linear(name, kind, layer, path, module):
            if isinstance(found, WeightSite):
                found = _behind_post_norm(_in_compatibility_mode(found, parent, component), block)
            yield _with_first_cycles(found)


def _obstacle(kind: str, projection: str, block: Any, parent: Any, component: Any) -> str | None:
    """Why the block's structure gives this kind of weight no site; None if it does."""
    if parent is None:
        return _in_its_place(block)
    module = type(parent.original_component).__name__
    setting = _treats_heads_apart(parent, kind)
    if setting is not None:
        return f"cfg.{setting} computes every head separately; set it to False"
    if component is None and kind != "W_gate":
        return f"its {module} has no {projection!r} projection of its own"
    return None


def _treats_heads_apart(parent: Any, kind: str) -> str | None:
    """The setting that makes attention use a weight head by head, if any."""
    config = getattr(parent, "config", None)
    return next((one for one in PER_HEAD.get(kind, ()) if getattr(config, one, False)), None)


def _in_its_place(block: Any) -> str | None:
    """The replacement in a block without attention or without an MLP."""
    parts = {
        name: module
        for name, module in block._modules.items()
        if hasattr(module, "original_component") and not hasattr(module, "hook_normalized")
    }
    if not parts:
        return f"TransformerLens names no part of its {type(block.original_component).__name__}"
    others = [f"{type(m).__name__} {n!r}" for n, m in parts.items() if n not in PROJECTIONS]
    return f"the block has {' and '.join(others)} instead" if others else None


def _linear(
    name: str, kind: str, layer: int | None, path: str | None, whole: Any
) -> Iterator[WeightSite | UnsupportedWeight]:
    """A linear layer and its LoRA adapters; ``path`` is the path of its HookPoints."""
    module = base_layer(whole)
    reason = not_plain_lora(whole) or (None if how_packed(module) else _not_affine(module))
    if reason is not None:
        yield UnsupportedWeight(name, kind, layer, reason, getattr(whole, "weight", None))
    else:
        yield _site(name, kind, layer, module, *_hooks(path))
    yield from _adapters(name, kind, layer, path, whole)


def _hooks(path: str | None) -> tuple[str | None, str | None]:
    """The HookPoints of a component, or None without a component."""
    return (None, None) if path is None else (f"{path}.hook_in", f"{path}.hook_out")


def _adapters(
    name: str, kind: str, layer: int | None, path: str | None, whole: Any
) -> Iterator[WeightSite | UnsupportedWeight]:
    """The matrices of a weight's LoRA adapters."""
    shared_reason = not_plain_lora(whole)
    for matrix in adapter_matrices(whole, name):
        full, whole_kind = f"{name}.{matrix.kind}", f"{kind}.{matrix.kind}"
        reason = shared_reason or matrix.unused
        if reason is not None or matrix.module is None:
            yield UnsupportedWeight(full, whole_kind, layer, str(reason), matrix.weight)
        else:
            hook_in = _hooks(path)[0] if matrix.kind.startswith("lora_A") else None
            yield _site(full, whole_kind, layer, matrix.module, hook_in, None)


def _site(
    name: str,
    kind: str,
    layer: int | None,
    module: Any,
    hook_in: str | None,
    hook_out: str | None,
) -> WeightSite:
    """The site of a module that computes ``x W + b``."""
    packed = how_packed(module)
    stored_out_in = packed is not None or isinstance(module, nn.Linear)
    if packed is not None:
        d_in, d_out = module.in_features, module.out_features
    else:
        d_out, d_in = module.weight.shape if stored_out_in else module.weight.shape[::-1]
    return WeightSite(
        name=name,
        kind=kind,
        layer=layer,
        hook_in=hook_in,
        hook_out=hook_out,
        d_in=d_in,
        d_out=d_out,
        x_tap=lambda: Tap(module, "input"),
        y_tap=lambda: Tap(module, "output"),
        holder=(module, "weight"),
        layout=_transposed if stored_out_in else unchanged,
        packed=packed,
    )


def _in_compatibility_mode(site: WeightSite, mlp: Any, component: Any) -> WeightSite:
    """Adapt a site to a processed gated MLP, which uses weights without calling their modules."""
    if not _multiplies_by_itself(mlp):
        return site
    site = replace(site, y_tap=lambda: Tap(component.hook_out, "input"))
    if hasattr(mlp, f"_processed_{site.kind}"):  # TransformerLens 3 keeps them beside the modules
        site = replace(
            site,
            holder=(mlp, f"_processed_{site.kind}"),
            layout=_transposed,
        )
    if site.kind == "W_out":
        return replace(site, x_tap=lambda: Tap(component.hook_in, "output"))
    hook_in = f"blocks.{site.layer}.mlp.hook_in"
    return replace(site, x_tap=lambda: Tap(mlp.hook_in, "output"), hook_in=hook_in)


def _multiplies_by_itself(mlp: Any) -> bool:
    """Whether an MLP is a processed gated MLP, which does not call the modules of its weights."""
    return getattr(mlp, "_use_processed_weights", False) and _is_gated(mlp)


def _behind_post_norm(site: WeightSite, block: Any) -> WeightSite:
    """Add the residual tap if TransformerLens reads the part's output after a post-norm."""
    hook = RESIDUAL_HOOKS[site.kind.partition(".")[0]] if writes_stream(site.kind) else ""
    residual_tap = _behind(block, hook)
    if residual_tap is None:
        return site
    hook_residual = f"blocks.{site.layer}.{hook}"
    return replace(site, hook_residual=hook_residual, residual_tap=residual_tap)


def _behind_mlp(block: Any) -> Callable[[], Tap] | None:
    return _behind(block, RESIDUAL_HOOKS["W_out"])


def _behind(block: Any, hook: str) -> Callable[[], Tap] | None:
    """The tap after a post-norm that feeds a HookPoint of the residual stream, if there is one."""
    norm = block._modules.get(str(block.hook_aliases.get(hook)).partition(".")[0])
    return (lambda: Tap(norm.hook_out, "input")) if hasattr(norm, "hook_normalized") else None


def _transposed(matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_out d_in"]:
    return matrix.mT


def _weight(component: Any) -> Tensor | None:
    """The weight of the module that a component wraps."""
    return getattr(getattr(component, "original_component", None), "weight", None)


def _is_gated(mlp: Any) -> bool:
    from transformer_lens.model_bridge.generalized_components import GatedMLPBridge

    return isinstance(mlp, GatedMLPBridge)


def _is_moe(mlp: Any) -> bool:
    from transformer_lens.model_bridge.generalized_components import MoEBridge

    return isinstance(mlp, MoEBridge)


def _is_sparse(mlp: Any) -> bool:
    """Whether this layer of a mixture-of-experts model has experts."""
    return _is_moe(mlp) and has_experts(mlp)


def _not_affine(module: nn.Module) -> str | None:
    """Why a module does not compute ``x W + b`` with a plain ``W``; None if it does.

    Modules of unknown type are tested on one vector.
    """
    from transformers.pytorch_utils import Conv1D

    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return f"its {kind} holds no weight matrix"
    if not weight.is_floating_point():
        return f"its {kind} stores a quantised weight ({weight.dtype})"
    if type(module) in (nn.Linear, Conv1D):
        return None
    if isinstance(module, nn.Linear | Conv1D):
        with torch.no_grad(), values_of(module):
            W = module.weight.mT if isinstance(module, nn.Linear) else module.weight
            if W.device.type == "meta":
                return None
            x = torch.linspace(-1, 1, W.shape[0], dtype=W.dtype, device=W.device)
            expected = nn.functional.linear(x, W.mT, module.bias)
            with suppress(RuntimeError):  # it takes no single vector
                if torch.allclose(module.forward(x), expected):
                    return None
    return f"its {kind} does not compute x W + b"


def _lookup_scale(module: nn.Module) -> float | None:
    """The factor ``s`` of an embedding that returns ``s`` times a row of its weight, or None."""
    if type(module) is nn.Embedding or _position_offset(module) is not None:
        return 1.0
    first_argument = next(iter(inspect.signature(module.forward).parameters), None)
    if not isinstance(module, nn.Embedding) or first_argument not in ("input", "input_ids"):
        return None
    with torch.no_grad(), values_of(module):
        ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
        if ids.device.type == "meta":
            return 1.0
        rows, looked_up = module.weight[ids], module.forward(ids)
        scale = (rows * looked_up).sum() / (rows * rows).sum()
        return float(scale) if torch.allclose(looked_up, scale * rows) else None


def _position_offset(module: nn.Module) -> int | None:
    """How far OPT's embedding of positions counts from the first row; None for other look-ups."""
    offset = getattr(module, "offset", None)
    forward: Callable[..., Tensor] = module.forward
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    if not isinstance(module, nn.Embedding) or offset is None or not takes_positions:
        return None
    with torch.no_grad(), values_of(module):
        ids = torch.arange(min(4, module.num_embeddings - offset), device=module.weight.device)
        if ids.device.type == "meta":
            return offset
        rows = module.weight[ids + offset]
        looked_up = forward(torch.ones_like(ids[None]), position_ids=ids[None])[0]
    return offset if torch.equal(looked_up, rows) else None


def _one_hot(
    module: nn.Embedding, offset: int, ids: Int[Tensor, "..."]
) -> Float[Tensor, "... d_vocab"]:
    """The rows ``x`` for which the embedding is ``x W``."""
    scale = _lookup_scale(module) or 0.0
    rows = nn.functional.one_hot(ids + offset, module.num_embeddings)
    return rows.to(module.weight.dtype) * scale


def named_parameters(model: Any) -> Iterator[NamedParameter]:
    """Every parameter of the bridge and of the model that it wraps, each once."""
    seen = set()
    for path, module in modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                full = f"{path}.{name}".replace("._original_component", "")
                yield NamedParameter(full, module, parameter)


def reasons(model: Any) -> dict[int, str]:
    """Why parameters have no site, by ``id``: what no text passes, and what has a copy in use."""
    of_vision = {
        id(parameter): f"part of the {name}, through which no text passes"
        for name, module in model._modules.items()
        if name.startswith("vision_")
        for parameter in module.parameters()
    }
    return of_vision | unused_parameters(model)


def unused_parameters(model: Any) -> dict[int, str]:
    """The parameters, by ``id``, of which the forward pass uses copies, and what copies."""
    unused = [*_copied(model)]
    for _, module in modules(model):
        why = "peft has copies of this layer for its adapters, and another copy is in use"
        unused += [(copy, why) for copy in unused_copies(module)]
    return {id(parameter): why for module, why in unused for parameter in module.parameters()}


def attach_hook_points(model: Any, undo: Undo) -> None:
    """Nothing to add: a bridge has every HookPoint that its sites name."""


def lazy_hook_points(model: Any) -> list[str]:
    """HookPoints that are called only if they have hooks, at scaled contributions (Granite)."""
    names = []
    if getattr(model._modules.get("embed"), "_output_contribution_scale", 1.0) != 1.0:
        names.append("hook_embed")
    for layer, block in enumerate(model._modules.get("blocks") or ()):
        if hasattr(block, "residual_contribution_scale") and "hook_mlp_out" in block._modules:
            names.append(f"blocks.{layer}.hook_mlp_out")
    return names


def end_of_stream(model: Any) -> nn.Module | None:
    """The end of the residual stream, if not at the last block's own HookPoint.

    The blocks of openai-gpt return lists, so TransformerLens never calls that HookPoint.
    """
    is_openai_gpt = type(model.original_model).__name__ == "OpenAIGPTLMHeadModel"
    return model.unembed.hook_in if is_openai_gpt else None


def left_padding_obstacle(model: Any) -> str | None:
    """Why left-padded texts get other results than the texts alone; None if they get the same."""
    kind = type(model.original_model).__name__
    blocks = model._modules.get("blocks")
    if kind in SEES_PADDING or not blocks or any("attn" not in b._modules for b in blocks):
        return f"a {kind} does not ignore padding on the left of a text"
    return None


def modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the bridge and the wrapped model, each once, with its path.

    A bridge has thousands; the recursive ``named_modules`` takes three times as long.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model), ("", model.original_model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            prefix = f"{path}." if path else ""
            children = reversed(module._modules.items())
            waiting.extend((prefix + name, child) for name, child in children if child is not None)


def unembedding(model: Any) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding matrix.

    Raises:
        NotImplementedError: If a ``peft`` adapter adds to its output, or it is stored packed.
    """
    applied = applied_adapters(model.unembed.original_component)
    if applied:
        raise NotImplementedError(
            f"unembed.W_U has the adapter {applied[0]!r}, so no single matrix computes the logits; "
            "call peft's merge_adapter()"
        )
    module = base_layer(model.unembed.original_component)
    packed = how_packed(module)
    if packed is not None:
        raise NotImplementedError(
            f"unembed.W_U is stored packed ({packed}), and no matrix can be read from it; load the "
            "model with an unembedding that is not quantised"
        )
    with values_of(module):
        return model.W_U


def unembed(
    model: Any, vectors: Float[Tensor, "rows d_model"], apply_ln: bool
) -> Float[Tensor, "rows d_vocab"]:
    """Apply final norm, unembedding and output transform, as ``logit_readout`` of TL 4.3 does."""
    W_U = unembedding(model)
    vectors = vectors.to(device=W_U.device, dtype=W_U.dtype)
    if apply_ln:
        vectors = final_norm(model, vectors)
    with values_of(base_layer(model.unembed.original_component)):
        b_U = model.b_U
    return model.adapter.apply_output_logits_transform((vectors @ W_U).add_(b_U))
