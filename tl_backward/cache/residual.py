"""The residual stream of the backward pass: its VJPs, and what each part of the model adds to them.

Forward, every block reads the residual stream and adds to it. Backward, the VJP comes down the
same stream from the unembedding, and every attention and MLP adds what came through it. The
functions mirror ``ActivationCache``, with its labels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.cache.rows import of_example, plain_index

SliceInput: TypeAlias = int | slice | tuple[int, ...] | list[int] | Tensor | None
Stack: TypeAlias = Float[Tensor, "component *batch_and_pos d_model"]
NODES = ("hook_embed", "hook_mlp_out", "hook_z")
"""The HookPoints of what is added to the stream; at ``hook_z`` attention is kept by head."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What was seen at the residual stream, by the names of TransformerLens's HookPoints.

    Attributes:
        n_layers: Number of layers of the model.
        n_heads: Number of attention heads of a layer.
        lengths: Rows of each example of a batch whose examples differ in it; else None.
        vjps: VJPs at ``hook_embed``, at the residual stream before, in the middle of and after
            blocks, at ``hook_mlp_out`` and at ``attn.hook_z`` (heads side by side).
        activations: Activations at the same places, but for the middle of blocks.
        attention: By layer, what attention adds to the VJP in a block where the MLP is parallel
            to it.
        heads: By layer, what each attention head adds to the VJP.
    """

    n_layers: int
    n_heads: int
    lengths: tuple[int, ...] | None
    vjps: dict[str, Float[Tensor, "*batch n _"]] = field(default_factory=dict)
    activations: dict[str, Float[Tensor, "*batch n _"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "*batch n d_model"]] = field(default_factory=dict)
    heads: dict[int, Float[Tensor, "head *batch n d_model"]] = field(default_factory=dict)

    def example(self, b: int) -> Residual:
        """What was seen of one example of a batch."""

        def of(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
            return {name: of_example(tensor, b, self.lengths) for name, tensor in tensors.items()}

        seen = (of(self.vjps), of(self.activations), of(self.attention), of(self.heads))
        return Residual(self.n_layers, self.n_heads, None, *seen)

    def accumulated(
        self,
        layer: int | None,
        incl_mid: bool,
        mlp_input: bool,
        layers: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """The VJPs at the points of ``accumulated_resid``, by label; if wanted, in some layers."""
        layer = self._layer(layer, default=self.n_layers)
        points = {}
        for block in self._wanted(range(layer + 1), layers):
            points[f"{block}_pre" if block < self.n_layers else "final_post"] = self._before(block)
            if (incl_mid and block < layer) or (mlp_input and block == layer):
                points[f"{block}_mid"] = self._at(f"blocks.{block}.hook_resid_mid")
        return points

    def require_all_layers(self) -> None:
        """Refuse what has only the end of the stream.

        Raises:
            ValueError: When the VJP before a layer is not there.
        """
        for block in range(self.n_layers + 1):
            self._before(block)

    def forward_stream(self, layers: Collection[int] | None = None) -> dict[str, Tensor]:
        """The activations at the points of ``accumulated_resid`` in some layers, by label.

        Default: those that were captured.
        """
        points = {}
        for block in self._wanted(range(self.n_layers + 1), layers):
            name = self._name_before(block)
            if layers is not None or name in self.activations:
                self._require(name)
                label = f"{block}_pre" if block < self.n_layers else "final_post"
                points[label] = self.activations[name]
        return points

    def decomposed(
        self,
        layer: int | None,
        mlp_input: bool,
        mode: str,
        incl_embeds: bool,
        layers: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """What the unembedding, attention and MLPs add to the VJP before ``layer``, by label."""
        layer = self._layer(layer, default=0)
        parts = {"unembed": self._before(self.n_layers)} if incl_embeds else {}
        for block in self._wanted(range(layer, self.n_layers), layers):
            attention, mlp = self._of_block(block)
            if mode != "mlp" and not (mlp_input and block == layer):
                parts[f"{block}_attn_out"] = attention
            if mode != "attn" and mlp is not None:
                parts[f"{block}_mlp_out"] = mlp
        return parts

    def by_head(
        self, layer: int | None, incl_remainder: bool, layers: Collection[int] | None = None
    ) -> dict[str, Tensor]:
        """What each attention head from ``layer`` on adds to the VJP before it, by label."""
        layer = self._layer(layer, default=0)
        blocks = self._wanted(range(layer, self.n_layers), layers)
        missing = [block for block in blocks if block not in self.heads]
        if missing:
            raise ValueError(
                f"the heads of layer {missing[0]} were not captured; run with per_head=True, and "
                "with all layers (a layer without attention, or without a site of W_O, has none)"
            )
        parts = {
            f"L{block}H{h}": head for block in blocks for h, head in enumerate(self.heads[block])
        }
        if incl_remainder:
            whole = self._before(layer)
            parts["remainder"] = whole - sum(parts.values(), torch.zeros_like(whole))
        return parts

    def _of_block(self, block: int) -> tuple[Tensor, Tensor | None]:
        before, after = self._before(block), self._before(block + 1)
        middle = self.vjps.get(f"blocks.{block}.hook_resid_mid")
        if middle is not None:
            return before - middle, middle - after
        if block not in self.attention:
            raise NotImplementedError(
                f"block {block} has neither attention with a site of W_O nor a hook_resid_mid (or "
                "is parallel, with a backward hook inside its attention), so its parts are not "
                "told apart; accumulated_vjps has their sum"
            )
        if f"blocks.{block}.hook_mlp_out" not in self.vjps:
            return before - after, None
        return self.attention[block], before - after - self.attention[block]

    def _before(self, block: int) -> Tensor:
        """The VJP where layer ``block`` begins; behind the last one, where the stream ends."""
        return self._at(self._name_before(block))

    def _name_before(self, block: int) -> str:
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        return last if block == self.n_layers else f"blocks.{block}.hook_resid_pre"

    def _at(self, name: str) -> Tensor:
        self._require(name)
        return self.vjps[name]

    def _require(self, name: str) -> None:
        if name not in self.vjps:
            raise ValueError(
                f"the VJP at {name} was not captured; run with all layers (the capture stops at "
                "the first that is asked for; parallel blocks have no middle, and of blocks that "
                "run several times nothing is kept)"
            )

    def _wanted(self, blocks: range, layers: Collection[int] | None) -> list[int]:
        """The blocks in the layers that are asked for, and the end of the stream."""
        return [b for b in blocks if layers is None or b in layers or b == self.n_layers]

    def _layer(self, layer: int | None, default: int) -> int:
        if layer is None or layer == -1:
            return default
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.n_layers:
            raise ValueError(
                f"layer={layer!r}: it must be in [0, {self.n_layers}], or -1 or None for all layers"
            )
        return layer


def stacked(
    parts: dict[str, Tensor], pos_slice: SliceInput, return_labels: bool, lengths: Any
) -> Stack | tuple[Stack, list[str]]:
    """Parts as one tensor, sliced along the positions as TransformerLens's ``Slice`` does it."""
    if not parts:
        raise ValueError("nothing is left to stack; choose other arguments")
    if pos_slice is not None and lengths is not None:
        raise ValueError(
            "pos_slice: the prompts of this batch differ in length; take cache.example(b) first"
        )
    index = plain_index(pos_slice)
    tensors = [part if index is None else part[..., index, :] for part in parts.values()]
    stack = torch.stack(tensors)
    return (stack, list(parts)) if return_labels else stack
