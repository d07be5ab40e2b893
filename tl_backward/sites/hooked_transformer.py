"""``HookedTransformer``: bare parameters between added HookPoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_backward.sites.hook_points import attach_hook_points as attach_hook_points
from tl_backward.sites.hook_points import (
    has_matrix,
    is_dense,
    reads_positions,
    refuse_quantized,
)
from tl_backward.sites.hooked_experts import hooked_expert_sites
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

UNGROUPED = "ungroup_grouped_query_attention"

ATTENTION_PROJECTIONS = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
MLP_PROJECTIONS = {"W_gate": "gate", "W_in": "in", "W_out": "out"}


def accepts(model: object) -> bool:
    """Whether the model is a ``HookedTransformer``, which TransformerLens 4 no longer has."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return False
    return isinstance(model, HookedTransformer)


def survey(model: Any) -> Iterator[WeightSite | UnsupportedWeight]:
    """Every weight matrix of the model: its site, or why it has none."""
    refuse_quantized(model)
    return told_apart(_matrices(model))


def _matrices(model: Any) -> Iterator[WeightSite | UnsupportedWeight]:
    yield _lookup_site(model, "embed", "W_E")
    if reads_positions(model):
        yield _lookup_site(model, "pos_embed", "W_pos")
    for layer, block in enumerate(model.blocks):
        for kind in ATTENTION_PROJECTIONS:
            yield _attention_site(model, layer, kind)
        mlp = block._modules.get("mlp")
        for kind, projection in MLP_PROJECTIONS.items():
            if mlp is not None and is_dense(mlp) and has_matrix(mlp, kind):
                yield _behind_post_norm(
                    _matrix_site(model, f"blocks.{layer}.mlp", kind, layer, f".{projection}"), block
                )
        if mlp is not None and not is_dense(mlp):
            yield from hooked_expert_sites(mlp, layer)
    yield _matrix_site(model, "unembed", "W_U", None, "")


def _behind_post_norm(site: WeightSite, block: Any) -> WeightSite:
    hook = RESIDUAL_HOOKS.get(site.kind)
    if hook is None or not ("ln1_post" in block._modules or _norms_afterwards(block)):
        return site
    return replace(
        site,
        hook_residual=f"blocks.{site.layer}.{hook}",
        residual_tap=lambda: Tap(block.get_submodule(hook), "input"),
    )


def _norms_afterwards(block: Any) -> bool:
    """Whether ``ln1`` and ``ln2`` follow attention and MLP (OLMo 2 and 3)."""
    try:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
    except ImportError:
        return False
    return block.cfg.original_architecture in POST_NORM_ARCHITECTURES


def named_parameters(model: Any) -> Iterator[NamedParameter]:
    """Every parameter of the model."""
    for name, parameter in model.named_parameters():
        yield NamedParameter(name, model.get_submodule(name.rpartition(".")[0]), parameter)


def reasons(model: Any) -> dict[int, str]:
    """Why parameters have no site, by ``id``: biases, and positions that nothing reads."""
    found = {}
    names = {one.name for one in survey(model) if isinstance(one, WeightSite)}
    for name, module, parameter in named_parameters(model):
        path, _, end = name.rpartition(".")
        weight = f"{path}.W_{end.removeprefix('_').removeprefix('b_')}"
        if end == "b_in" and has_matrix(module, "W_gate"):
            point = f"{path}.out.hook_in"
            found[id(parameter)] = (
                f"bias after the gate: its gradient is the sum of the VJPs at {point}"
            )
        elif end.removeprefix("_").startswith("b_") and weight in names:
            found[id(parameter)] = f"bias: its gradient is cache.bias_gradient({weight!r})"
        elif end == "W_pos":
            found[id(parameter)] = "the model has other positions and does not read it"
        elif "Norm" in type(module).__name__:
            found[id(parameter)] = f"gain or bias of a norm ({type(module).__name__})"
    return found


def unused_parameters(model: Any) -> dict[int, str]:
    """None: the forward pass uses the parameters themselves."""
    return {}


def lazy_hook_points(model: Any) -> list[str]:
    """None: the model calls every HookPoint."""
    return []


def end_of_stream(model: Any) -> nn.Module | None:
    """None: the residual stream ends at the last block's own HookPoint."""
    return None


def left_padding_obstacle(model: Any) -> str | None:
    """None: positions and attention ignore padding."""
    return None


def modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model, with its name."""
    return model.named_modules()


def unembedding(model: Any) -> Float[Tensor, "d_model d_vocab"]:
    """The unembedding matrix."""
    return model.W_U


def unembed(
    model: Any, vectors: Float[Tensor, "rows d_model"], apply_ln: bool
) -> Float[Tensor, "rows d_vocab"]:
    """Final norm, unembedding and the soft cap of the logits, if the model has one."""
    W_U, cap = model.unembed.W_U, model.cfg.output_logits_soft_cap
    vectors = vectors.to(device=W_U.device, dtype=W_U.dtype)
    if apply_ln:
        vectors = final_norm(model, vectors)
    logits = (vectors @ W_U).add_(model.unembed.b_U)
    return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits


def _lookup_site(model: Any, path: str, kind: str) -> WeightSite:
    """An embedding table; its input is the one-hot row of each index."""
    module = model.get_submodule(path)

    def one_hot(indices: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_in"]:
        table = getattr(module, kind)
        rows = torch.arange(len(table), device=indices.device)
        return (indices.unsqueeze(-1) == rows).to(table.dtype)

    return _matrix_site(model, path, kind, None, "", encode=one_hot)


def _matrix_site(
    model: Any, path: str, kind: str, layer: int | None, projection: str, **fields: Any
) -> WeightSite:
    """A weight stored as ``[d_in, d_out]``."""
    d_in, d_out = getattr(model.get_submodule(path), kind).shape
    return _site(model, path, kind, kind, layer, projection, d_in, d_out, **fields)


def _attention_site(model: Any, layer: int, kind: str) -> WeightSite | UnsupportedWeight:
    """A weight with a head axis; with grouped queries, keys and values have fewer heads."""
    path = f"blocks.{layer}.attn"
    attention = model.get_submodule(path)
    stored = f"_{kind}" if has_matrix(attention, f"_{kind}") else kind
    heads, rows, columns = getattr(attention, stored).shape
    if kind == "W_O":
        d_in, d_out, pattern = heads * rows, columns, "(h d) m -> h d m"
    else:
        d_in, d_out, pattern = rows, heads * columns, "m (h d) -> h m d"
    name = f"{path}.{kind}"
    for setting in PER_HEAD[kind] if stored == kind else (*PER_HEAD[kind], UNGROUPED):
        if getattr(attention.cfg, setting):
            reason = f"cfg.{setting} computes every head separately; set it to False"
            return UnsupportedWeight(name, kind, layer, reason, getattr(attention, stored))
    projection = f".{ATTENTION_PROJECTIONS[kind]}"
    layout = partial(rearrange, pattern=pattern, h=heads)
    site = _site(model, path, kind, stored, layer, projection, d_in, d_out, layout=layout)
    return _behind_post_norm(site, model.blocks[layer])


def _site(
    model: Any,
    path: str,
    kind: str,
    stored: str,
    layer: int | None,
    projection: str,
    d_in: int,
    d_out: int,
    layout: Callable[[Tensor], Tensor] = unchanged,
    **fields: Any,
) -> WeightSite:
    module = model.get_submodule(path)
    hook_in, hook_out = (f"{path}{projection}.{end}" for end in ("hook_in", "hook_out"))
    return WeightSite(
        name=f"{path}.{kind}",
        kind=kind,
        layer=layer,
        hook_in=hook_in,
        hook_out=hook_out,
        d_in=d_in,
        d_out=d_out,
        x_tap=lambda: Tap(model.get_submodule(hook_in), "output"),
        y_tap=lambda: Tap(model.get_submodule(hook_out), "input"),
        holder=(module, stored),
        layout=layout,
        **fields,
    )
