"""The backward pass along the residual stream: VJPs, and what each part of the model adds to them.

Forward, every block reads the residual stream and adds to it. Backward, the VJP comes down the
same stream from the unembedding, and every attention and MLP adds what came through it. The
functions mirror ``ActivationCache``, with its labels.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.backward_hooks import CalledAgain
from tl_backward.recording import Recorder, vjp_between
from tl_backward.rows import Rows, of_example, plain_index
from tl_backward.sites import Model, Tap, attention_outputs, residual_points

if TYPE_CHECKING:
    import pandas as pd

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


def attribution(clean: Residual, corrupt: Residual, positions: list[list[int]]) -> pd.DataFrame:
    """``(clean activation - corrupt activation) . corrupt VJP`` of every node."""
    import pandas as pd

    clean.require_all_layers()
    corrupt.require_all_layers()
    nodes = [(b, position) for b, of_text in enumerate(positions) for position in of_text]
    lines = []
    for name in corrupt.activations.keys() & corrupt.vjps.keys() & clean.activations.keys():
        if not name.endswith(NODES):
            continue
        kind, n_heads = _node(name, corrupt.n_heads)
        product = (clean.activations[name] - corrupt.activations[name]) * corrupt.vjps[name]
        scores = product.unflatten(-1, (n_heads or 1, -1)).sum(-1).reshape(len(nodes), -1)
        for (example, position), of_heads in zip(nodes, scores.tolist(), strict=True):
            for head, score in enumerate(of_heads):
                place = (_layer_of(name), head if n_heads else None, position)
                lines.append((example, kind, *place, score))
    columns = ["example", "kind", "layer", "head", "position", "score"]
    table = pd.DataFrame(lines, columns=columns).astype({"layer": "Int64", "head": "Int64"})
    return table.sort_values(
        columns[:1] + columns[2:5] + ["kind"], na_position="first", ignore_index=True
    )


@dataclass(frozen=True)
class Watched:
    """The attention outputs of the layers that :func:`watch_residual` has put a watch on."""

    z_of_layer: dict[int, str]
    n_layers: int
    n_heads: int
    per_head: bool


def watch_residual(recorder: Recorder, model: Model, after: int | None, per_head: bool) -> Watched:
    """Record the residual stream: all of it, or only what is behind the layer ``after``."""
    first = -1 if after is None else after + 1
    n_layers = model.cfg.n_layers
    for name, point in residual_points(model).items():
        layer = _layer_of(name)
        behind = n_layers if name.endswith("hook_resid_post") else -1 if layer is None else layer
        if behind < first:
            continue
        middle = name.endswith("hook_resid_mid")
        shared = name == "blocks.0.hook_resid_pre"  # later blocks of Gemma 4 and Zamba 2 read it
        recorder.keep_place(Tap(point, "input"), name, on_a_branch=middle, own_branch=shared)
        if not middle:
            recorder.keep_value(Tap(point, "output"), name, copy=not name.endswith(NODES))
    z_of_layer = {}
    for site in attention_outputs(model):
        if site.layer is not None and site.layer >= first:
            z_of_layer[site.layer] = name = f"blocks.{site.layer}.attn.hook_z"
            recorder.keep_place(site.x_tap(), name, on_a_branch=True)
            recorder.keep_value(site.x_tap(), name)
    return Watched(z_of_layer, n_layers, model.cfg.n_heads, per_head)


def needs_graph(recorder: Recorder, watched: Watched) -> bool:
    """Whether :func:`residual_from` has more to ask of the graph than the VJPs."""
    return watched.per_head or bool(_parallel(recorder, watched))


def residual_from(
    recorder: Recorder, watched: Watched, vjps: dict[Any, list[Tensor]], rows: Rows
) -> Residual:
    """What was seen at the residual stream. Blocks that run several times are left out.

    Raises:
        CalledAgain: When a backward hook is between an attention output and its block's beginning.
    """
    once = {
        name: vjps[name]
        for name, places in recorder.places.items()
        if isinstance(name, str) and len(places) == 1
    }
    heads = {}
    if watched.per_head:
        for block, z in watched.z_of_layer.items():
            if {z, f"blocks.{block}.hook_resid_pre"} <= once.keys():
                parts = _each_head(once[z][0], watched.n_heads, rows)
                heads[block] = torch.stack(
                    [rows.of([_through(recorder, block, z, p)]) for p in parts]
                )
    attention = {}
    for block, z in _parallel(recorder, watched).items():
        with suppress(CalledAgain):
            attention[block] = rows.of([_through(recorder, block, z, once[z][0])])
    return Residual(
        n_layers=watched.n_layers,
        n_heads=watched.n_heads,
        lengths=rows.lengths(),
        vjps={name: rows.of(vjp) for name, vjp in once.items()},
        activations={
            name: rows.of(recorder.values(name))
            for name in once
            if not name.endswith("hook_resid_mid")
        },
        attention=attention,
        heads=heads,
    )


def _parallel(recorder: Recorder, watched: Watched) -> dict[int, str]:
    """The attention outputs of the blocks, run once, that have no middle."""

    def runs_once(name: str) -> bool:
        return len(recorder.places[name]) == 1

    return {
        block: z
        for block, z in watched.z_of_layer.items()
        if runs_once(z)
        and runs_once(f"blocks.{block}.hook_resid_pre")
        and not recorder.places[f"blocks.{block}.hook_resid_mid"]
    }


def _through(recorder: Recorder, block: int, z: str, vjp: Tensor) -> Tensor:
    """The part of the VJP before block ``block`` that comes through its attention."""
    (later,), (earlier,) = recorder.places[z], recorder.places[f"blocks.{block}.hook_resid_pre"]
    return vjp_between(later, vjp, earlier)


def _each_head(vjp: Tensor, n_heads: int, rows: Rows) -> list[Tensor]:
    """The VJP at ``hook_z`` with all heads but one set to zero, for each head."""
    by_head = vjp.reshape(len(rows.starts), rows.width, n_heads, -1)
    of_each = torch.eye(n_heads, dtype=vjp.dtype, device=vjp.device).unsqueeze(-1)
    return [(by_head * one).reshape(vjp.shape) for one in of_each]


def _node(name: str, n_heads: int) -> tuple[str, int | None]:
    """Kind and number of heads of the node at a HookPoint, as TransformerLens 4.3 calls it."""
    if name.endswith("hook_z"):
        return "attn_head_out", n_heads
    return ("mlp_out" if name.endswith("hook_mlp_out") else "embed"), None


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None
