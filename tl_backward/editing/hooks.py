"""Edits as forward hooks: no weight changes, and every row of a batch may have its own edit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_backward.editing._low_rank_hooks import (
    ForwardHooks,
    low_rank_hooks,
    require_finite,
    with_hook_points,
)
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model


def edit_hooks(
    model: Model,
    edits: Sequence[WeightEdit],
    rows: Int[Tensor, "batch"] | Sequence[int] | None = None,
) -> ForwardHooks:
    """Hooks that give each row of a batch its own edit.

    ``y = x W`` becomes ``y + (x u^T) v`` with the edit's left vectors ``u`` and right vectors
    ``v``, the same as with the applied edit. The hooks for ``x`` and ``y`` are at the ``hook_in``
    and ``hook_out`` of the site, and of sites with the same (tied) weight.

    Hooks at one HookPoint run in the order of registration. Put hooks that patch the input of an
    edited weight before these hooks, and hooks that patch its output after them.

    Args:
        model: The model that all edits are bound to. Missing HookPoints are added to a
            ``HookedTransformer``, as by :func:`tl_backward.add_hook_points`.
        edits: The edits.
        rows: Index of each row's edit, or -1 for none. Default: all rows get the sum of the edits,
            in batches of any size.

    Returns:
        Pairs of a HookPoint's name and a function, for ``model.run_with_hooks(tokens,
        fwd_hooks=...)``, ``model.hooks(fwd_hooks=...)`` and :func:`run_with_backward_cache`.

    Raises:
        ValueError: If an edit is not finite or not bound to this model, or ``rows`` refers to edits
            that do not exist; and in the forward pass, if the batch has another number of rows.
        NotImplementedError: If another weight shares part of the memory of an edited one; and for
            the matrices of LoRA adapters and of experts, which have no HookPoints.

    Example:
        >>> with model.hooks(fwd_hooks=edit_hooks(model, [paris, rome], rows=[0, 0, 1, -1])):
        ...     logits = model(four_prompts)
    """
    for edit in edits:
        if edit.model is not model:
            raise ValueError("edits: one is bound to another model or to none; use edit.bind()")
    index = None if rows is None else torch.as_tensor(rows, dtype=torch.long).cpu()
    if index is not None and not (
        index.ndim == 1 and len(index) and -1 <= int(index.min()) <= int(index.max()) < len(edits)
    ):
        raise ValueError(
            f"rows must hold the index of one of the {len(edits)} edits, or -1, for every row of "
            f"the batch, got {rows!r}"
        )
    at_sites = [edit.at_sites() for edit in edits]
    sites = {name: site for updates in at_sites for name, (site, _) in updates.items()}
    with_hook_points(model, sites.values())
    hooks: ForwardHooks = []
    for name, site in sites.items():
        empty = torch.zeros(0, site.d_in), torch.zeros(0, site.d_out)
        each = [
            (updates[name][1].inputs, updates[name][1].vjps) if name in updates else empty
            for updates in at_sites
        ]
        u, v = (_by_row(vectors, index) for vectors in zip(*each, strict=True))
        require_finite(site, u, v)
        hooks += low_rank_hooks(site, u, v)
    return hooks


def _by_row(
    vectors: Sequence[Float[Tensor, "_ d"]], rows: Int[Tensor, "batch"] | None
) -> Float[Tensor, "batch n d"]:
    """The vectors of each row's edit, padded with zeros; without rows, of all edits together."""
    filled = [some for some in vectors if len(some)] or vectors[:1]
    dtype = reduce(torch.promote_types, (some.dtype for some in filled))
    alike = [some.to(filled[0].device, dtype) for some in vectors]
    if rows is None:
        return torch.cat(alike).unsqueeze(0)
    padded = pad_sequence([*alike, alike[0].new_zeros(0, alike[0].shape[-1])], batch_first=True)
    return padded[rows.to(padded.device)]
