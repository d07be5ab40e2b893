"""The residual stream of the backward pass: its VJPs and the contributions of components.

Forward, every block reads the residual stream and adds to it. Backward, the VJP flows down the
same stream from the unembedding, and every attention and MLP adds the VJP that flowed through it.
The functions mirror ``ActivationCache`` and use its labels.
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
"""HookPoints of the components that write to the stream; ``hook_z`` keeps attention by head."""


@dataclass(frozen=True, eq=False)
class Residual:
    """Activations and VJPs of the residual stream, by the names of TransformerLens's HookPoints.

    Attributes:
        n_layers: Number of layers of the model.
        n_heads: Number of attention heads per layer.
        lengths: Rows per example if the examples of a batch differ in length; otherwise None.
        vjps: VJPs at ``hook_embed``, at the residual stream before, in the middle of and after
            blocks, at ``hook_mlp_out`` and at ``attn.hook_z`` (heads concatenated).
        activations: Activations at the same places, except the middle of blocks.
        attention: Contribution of attention to the VJP, by layer, in blocks with a parallel MLP.
        heads: Contribution of each attention head to the VJP, by layer.
    """

    n_layers: int
    n_heads: int
    lengths: tuple[int, ...] | None
    vjps: dict[str, Float[Tensor, "*batch n _"]] = field(default_factory=dict)
    activations: dict[str, Float[Tensor, "*batch n _"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "*batch n d_model"]] = field(default_factory=dict)
    heads: dict[int, Float[Tensor, "head *batch n d_model"]] = field(default_factory=dict)

    def example(self, b: int) -> Residual:
        """The residual stream of one example of a batch."""

        def select(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
            return {name: of_example(tensor, b, self.lengths) for name, tensor in tensors.items()}

        parts = (self.vjps, self.activations, self.attention, self.heads)
        return Residual(self.n_layers, self.n_heads, None, *(select(part) for part in parts))

    def accumulated(
        self,
        layer: int | None,
        incl_mid: bool,
        mlp_input: bool,
        layers: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """The VJPs at the points of ``accumulated_resid``, by label, optionally in some layers."""
        layer = self._layer(layer, default=self.n_layers)
        points = {}
        for block in self._wanted(range(layer + 1), layers):
            points[f"{block}_pre" if block < self.n_layers else "final_post"] = self._before(block)
            if (incl_mid and block < layer) or (mlp_input and block == layer):
                points[f"{block}_mid"] = self._at(f"blocks.{block}.hook_resid_mid")
        return points

    def require_all_layers(self) -> None:
        """Raise unless every layer's VJP was captured.

        Raises:
            ValueError: If the VJP before a layer is missing.
        """
        for block in range(self.n_layers + 1):
            self._before(block)

    def forward_stream(self, layers: Collection[int] | None = None) -> dict[str, Tensor]:
        """The activations at the points of ``accumulated_resid``, by label.

        By default, all captured layers.
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
        """Contributions of unembedding, attention and MLPs to the VJP before ``layer``."""
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
        """Contributions of the heads from ``layer`` on to the VJP before it."""
        layer = self._layer(layer, default=0)
        blocks = self._wanted(range(layer, self.n_layers), layers)
        missing = [block for block in blocks if block not in self.heads]
        if missing:
            raise ValueError(
                f"the heads of layer {missing[0]} were not captured; run with per_head=True and "
                "all layers (a layer without attention or without a W_O site has no heads)"
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
                f"block {block} has neither a W_O site nor a hook_resid_mid (or is parallel, with "
                "a backward hook inside its attention), so its VJP cannot be decomposed; "
                "accumulated_vjps has the sum"
            )
        if f"blocks.{block}.hook_mlp_out" not in self.vjps:
            return before - after, None
        return self.attention[block], before - after - self.attention[block]

    def _before(self, block: int) -> Tensor:
        """The VJP before layer ``block``; for ``n_layers``, at the end of the stream."""
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
                "the first requested layer, parallel blocks have no middle, and blocks that run "
                "several times are not kept)"
            )

    def _wanted(self, blocks: range, layers: Collection[int] | None) -> list[int]:
        """The requested blocks, and the end of the stream."""
        return [b for b in blocks if layers is None or b in layers or b == self.n_layers]

    def _layer(self, layer: int | None, default: int) -> int:
        if layer is None or layer == -1:
            return default
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.n_layers:
            raise ValueError(
                f"layer must be in [0, {self.n_layers}], or -1 or None for all, got {layer!r}"
            )
        return layer


def stacked(
    parts: dict[str, Tensor], pos_slice: SliceInput, return_labels: bool, lengths: Any
) -> Stack | tuple[Stack, list[str]]:
    """Stack parts into one tensor, sliced by position as TransformerLens's ``Slice`` does."""
    if not parts:
        raise ValueError("nothing to stack: the arguments leave out every component")
    if pos_slice is not None and lengths is not None:
        raise ValueError(
            "pos_slice: the prompts of this batch differ in length; use cache.example(b) first"
        )
    index = plain_index(pos_slice)
    tensors = [part if index is None else part[..., index, :] for part in parts.values()]
    stack = torch.stack(tensors)
    return (stack, list(parts)) if return_labels else stack
