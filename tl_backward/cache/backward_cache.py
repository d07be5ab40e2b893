"""The cache of one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward import tensor_files
from tl_backward._integers import as_ranges
from tl_backward.cache._attribution import attribution
from tl_backward.cache.residual import Residual, SliceInput, Stack, stacked
from tl_backward.cache.routing import ExpertFactors, Routing
from tl_backward.cache.rows import of_example
from tl_backward.factors import GradientFactors
from tl_backward.sites.names import parse_site_name

if TYPE_CHECKING:
    import pandas as pd


Key: TypeAlias = str | tuple[str, int | None] | tuple[str, int | None, int]
"""A site's name, a kind and a layer, or a kind, a layer and an expert."""
ON_CPU = ("tokens", "positions", "target_ids", "target_positions")
"""Fields that stay on the CPU, whatever the cache's device."""


@dataclass(frozen=True, eq=False)
class BackwardCache(Mapping[str, GradientFactors]):
    """The gradient factors of every captured weight matrix, by site name.

    ``cache["blocks.5.mlp.W_out"]`` and ``cache["W_out", 5]`` are the same
    :class:`~tl_backward.GradientFactors`; ``cache["W_out", 5, 3]`` are those of expert 3. The cache
    keeps no reference to the model and no autograd graph. The factors of experts are computed on
    access, from the cached boundary of the experts and the model's weights, which must not have
    changed since the run (``RuntimeError``). With several prompts, the factors stand for the sum
    over prompts, and :meth:`example` selects one prompt.

    Attributes:
        factors: Factors by site name, in model order.
        residual: Activations and VJPs of the residual stream.
        tokens: Tokens of the text that was run: the prompt, followed by all but the last token of
            the target. A list per prompt for several prompts.
        str_tokens: The same as strings.
        positions: Positions of the factors' rows, or a list per prompt.
        target_ids: The target's tokens: a scalar for one token, a vector for more, with a leading
            batch axis for several prompts (shorter targets are padded with -1).
        target_positions: Positions whose logits predict the target's tokens, or a list per prompt.
            Empty for a ``loss_fn``.
        loss: The differentiated loss of every prompt; in nats for a target.
        weights_processing: How TransformerLens processed the weights, as far as they show it:
            ``"raw"``, or the names of its arguments, such as ``"fold_ln, center_writing_weights"``.
            Gradients are with respect to these processed weights.
        post_norm_vjps: VJPs after the post-norm, by site name, for weights that have one; those of
            the sum of all experts by ``"blocks.5.mlp.experts"``.
        routings: Routes and boundary of each mixture of experts, by ``"blocks.5.mlp.experts"``.
    """

    factors: dict[str, GradientFactors | ExpertFactors]
    post_norm_vjps: dict[str, Float[Tensor, "... rows d_model"]]
    residual: Residual
    tokens: Int[Tensor, "pos"] | list[Int[Tensor, "_"]]
    str_tokens: list[Any]
    positions: Int[Tensor, "n"] | list[Int[Tensor, "_"]]
    target_ids: Int[Tensor, "..."]
    target_positions: Int[Tensor, "k"] | list[Int[Tensor, "_"]]
    loss: Float[Tensor, "*batch"]
    weights_processing: str
    routings: dict[str, Routing] = field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """Whether the prompts were a batch, possibly a list of one."""
        return isinstance(self.tokens, list)

    def __getitem__(self, key: Key) -> GradientFactors:
        found = self.factors[self._name(key)]
        return found if isinstance(found, GradientFactors) else found.made()

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __repr__(self) -> str:
        if self.is_batch:
            of = f"{len(self.tokens)} prompts, mean loss={self.loss.mean().item():.4f}"
        else:
            of = f"{len(self.positions)} of {len(self.tokens)} positions, loss={self.loss:.4f}"
        return f"BackwardCache({len(self)} weights, {of})"

    def example(self, b: int) -> BackwardCache:
        """The cache of one prompt of a batch, as if that prompt had been run alone.

        Raises:
            ValueError: If the cache has a single prompt and no batch axis.
            IndexError: If the batch has fewer prompts.
        """
        if not self.is_batch:
            raise ValueError("this cache has a single prompt and no batch axis")
        if not -len(self.tokens) <= b < len(self.tokens):
            raise IndexError(f"example {b}: this cache has {len(self.tokens)} prompts")
        ids = self.target_ids[b].reshape(-1)
        ids = ids[ids >= 0]
        return replace(
            self,
            factors={name: g.example(b) for name, g in self.factors.items()},
            post_norm_vjps={
                name: of_example(vjps, b, self._lengths(name))
                for name, vjps in self.post_norm_vjps.items()
            },
            routings={name: routing.example(b) for name, routing in self.routings.items()},
            residual=self.residual.example(b),
            tokens=self.tokens[b],
            str_tokens=self.str_tokens[b],
            positions=self.positions[b],
            target_ids=ids[0] if len(ids) == 1 else ids,
            target_positions=self.target_positions[b],
            loss=self.loss[b],
        )

    def residual_vjps(self, key: Key) -> Float[Tensor, "*batch n d_model"]:
        """VJPs where a weight's output enters the residual stream.

        With a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) these are the VJPs at the norm's output,
        which read well in the vocabulary; the factors hold the VJPs at the weight's own output,
        which make up its gradient. Without a post-norm the two are equal.

        Raises:
            KeyError: If the weight was not captured.
        """
        name = self._name(key)
        return self.post_norm_vjps[name] if name in self.post_norm_vjps else self[name].vjps

    def bias_gradient(self, key: Key) -> Float[Tensor, "d_out"]:
        """Gradient of a weight's bias: the sum of the VJPs over the captured positions.

        Raises:
            KeyError: If the weight was not captured.
        """
        return reduce(self[key].vjps, "... d_out -> d_out", "sum")

    def accumulated_vjps(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """VJPs of the residual stream, at the points of ``ActivationCache.accumulated_resid``.

        Args:
            layer: The last layer whose input is included; None or -1 for all layers and the end of
                the stream (``final_post``).
            incl_mid: Whether to include the middle of blocks, between attention and MLP.
            pos_slice: Positions, as for TransformerLens's ``Slice``.
            mlp_input: Whether to include the middle of ``layer`` itself.
            return_labels: Whether to return the labels ``0_pre, 0_mid, 1_pre, ...`` as well.

        Returns:
            ``dL/dresid``, raw sign, ``[component, *batch, n, d_model]``. For texts of different
            lengths, one axis holds the rows of all texts.

        Raises:
            ValueError: If a point was not captured (the capture stops at the first requested
                layer), does not exist (parallel blocks have no middle), or ``layer`` is out of
                range.
        """
        points = self.residual.accumulated(layer, incl_mid, mlp_input)
        return stacked(points, pos_slice, return_labels, self.residual.lengths)

    def decompose_vjps(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """Decompose the VJP before ``layer`` into the contributions of later components.

        This mirrors ``ActivationCache.decompose_resid``: forward, the embedding and every attention
        and MLP *below* a layer add up to the residual stream that enters it; backward, the
        unembedding and every attention and MLP *from that layer on* add up to the VJP there. The
        part through a norm on the stream itself (BERT, openai-gpt), or through a mixer beside
        attention (falcon_h1), is in ``attn_out``.

        Args:
            layer: The layer; None or -1 for 0, which includes all components.
            mlp_input: Whether to decompose the VJP in the middle of ``layer`` instead, without its
                attention.
            mode: ``"all"``, or only ``"mlp"`` or ``"attn"``.
            pos_slice: Positions, as for TransformerLens's ``Slice``.
            incl_embeds: Whether to include the unembedding: the VJP at the end of the stream.
            return_labels: Whether to return the labels ``unembed, 0_attn_out, 0_mlp_out`` as well.

        Returns:
            ``[component, *batch, n, d_model]``, raw sign.

        Raises:
            ValueError: As :meth:`accumulated_vjps`, and for another ``mode``.
            NotImplementedError: If a block has neither a W_O site nor a middle, or is parallel and
                had a backward hook inside its attention.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode must be 'all', 'mlp' or 'attn', got {mode!r}")
        parts = self.residual.decomposed(layer, mlp_input, mode, incl_embeds)
        return stacked(parts, pos_slice, return_labels, self.residual.lengths)

    def stack_head_vjps(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
    ) -> Stack | tuple[Stack, list[str]]:
        """The contribution of each attention head from ``layer`` on to the VJP before ``layer``.

        This mirrors ``ActivationCache.stack_head_results``. The heads of a layer add up to its
        ``attn_out`` in :meth:`decompose_vjps`, also when they share keys and values. They do not
        add up if later layers reuse this layer's keys and values (Gemma 3n), or if ``attn_out``
        contains more than attention.

        Args:
            layer: The layer; None or -1 for 0, which includes all heads.
            return_labels: Whether to return the labels ``L0H0, L0H1, ...`` as well.
            incl_remainder: Whether to add the rest of the VJP, labelled ``remainder``.
            pos_slice: Positions, as for TransformerLens's ``Slice``.

        Returns:
            ``[component, *batch, n, d_model]``, raw sign.

        Raises:
            ValueError: If the cache was captured without ``per_head=True``, and as
                :meth:`accumulated_vjps`.
        """
        parts = self.residual.by_head(layer, incl_remainder)
        return stacked(parts, pos_slice, return_labels, self.residual.lengths)

    def attribute(self, other: BackwardCache) -> pd.DataFrame:
        """First-order effect on ``other``'s loss of patching this run's activations into it.

        Computes ``(activation - other's activation) . other's VJP`` for every node, the node scores
        of ``transformer_lens.tools.analysis.attribution_patch(model, clean, corrupt)`` (4.3). This
        cache is the clean run; ``other`` is the corrupt run and supplies the VJPs.

        Returns:
            One row per node with the columns ``example, kind`` (``embed``, ``attn_head_out`` or
            ``mlp_out``), ``layer, head, position, score``.

        Raises:
            ValueError: If the text lengths or positions of the two differ, or one was not captured
                in all layers.

        Example:
            >>> clean.attribute(corrupt).nlargest(10, "score")
        """
        mine, others = self._positions(), other._positions()
        if mine != others:
            raise ValueError(
                "other: activations are compared by position, so both runs need texts of the same "
                f"lengths and the same positions, got {mine} and {others}"
            )
        return attribution(self.residual, other.residual, others)

    def save(self, path: str | Path) -> Path:
        """Write the cache to one safetensors file; :meth:`load` restores it exactly.

        A tensor that several weights share, such as the input of ``W_in`` and ``W_gate``, is
        written once. Writing is atomic: a failed save leaves an existing file unchanged.

        Args:
            path: The file to write. Its folder must exist.

        Returns:
            The same path.

        Raises:
            OSError: If the file cannot be written.

        Example:
            >>> cache.save("messi.safetensors")
            >>> BackwardCache.load("messi.safetensors")["W_out", 5].norm()
        """
        tree = _fields_of(self) | {
            "factors": {name: _fields_of(g) for name, g in self.items()},
            "routings": {name: _fields_of(routing) for name, routing in self.routings.items()},
            "residual": _fields_of(self.residual),
        }
        return tensor_files.write(Path(path), type(self).__name__, tree)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> BackwardCache:
        """Read a cache written by :meth:`save`.

        Args:
            path: The file.
            device: Device for the factors and the loss. Tokens, positions and target stay on the
                CPU, as in a fresh capture.

        Returns:
            The cache with the same values, dtypes, weight order and shared tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or damaged, is not a saved cache, or was written in
                the format of a newer version of the package.

        Example:
            >>> BackwardCache.load("messi.safetensors", device="cuda")
        """
        kind = cls.__name__
        tree = tensor_files.read(Path(path), kind)
        try:
            tree |= tensor_files.map_tensors(
                {name: value for name, value in tree.items() if name not in ON_CPU},
                lambda tensor: tensor.to(device),
            )
            made = {
                "factors": {name: GradientFactors(**g) for name, g in tree["factors"].items()},
                "routings": {
                    name: Routing(**one) for name, one in tree.get("routings", {}).items()
                },
                "residual": Residual(**tree["residual"]),
            }
            return cls(**tree | made)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise tensor_files.damaged(Path(path), kind, error) from error

    def _positions(self) -> list[list[int]]:
        each: Any = self.positions if self.is_batch else [self.positions]
        return [positions.tolist() for positions in each]

    def _lengths(self, name: str) -> tuple[int, ...] | None:
        """Number of rows of each example, for a site or a mixture."""
        if name in self.routings:
            return self.routings[name].lengths
        return self[name].lengths

    def _name(self, key: Key) -> str:
        """The site name for a name, ``(kind, layer)`` or ``(kind, layer, expert)``."""
        if isinstance(key, str):
            names = [key] if key in self.factors else []
        else:
            kind, layer, *expert = key
            prefix = "" if layer is None else f"blocks.{layer}."
            end = "".join(f".experts.{one}" for one in expert) + f".{kind}"
            names = [n for n in self.factors if n.startswith(prefix) and n.endswith(end)]
        if len(names) != 1:
            raise KeyError(f"{key!r} {self._no_single_weight(key, names)}")
        return names[0]

    def _no_single_weight(self, key: Key, names: list[str]) -> str:
        """Explain why a key does not select exactly one weight, and suggest one that does."""
        kind, layer = (key, None) if isinstance(key, str) else key[:2]
        if isinstance(key, str) and "." in key:
            with suppress(ValueError):
                layer, kind, _ = parse_site_name(key)
        layers: dict[str, list[int | None]] = {}
        for name in map(parse_site_name, self.factors):
            layers.setdefault(name.kind, []).append(name.layer)
        if kind not in layers:
            kinds: dict[str, list[str]] = {}
            for one, its_layers in layers.items():
                kinds.setdefault(_where(its_layers), []).append(one)
            captured = "; ".join(f"{', '.join(some)} {where}" for where, some in kinds.items())
            return f"was not captured; the cache has {captured}"
        experts = [
            one.expert
            for one in map(parse_site_name, self.factors)
            if one.expert is not None and (one.kind, one.layer) == (kind, layer)
        ]
        if experts:
            others = [name for name in names if parse_site_name(name).expert is None]
            alternative = f", or cache[{others[0]!r}]" if others else ""
            wrong = "is a matrix of each expert" if names else "was not captured"
            return (
                f"{wrong}; choose one of the experts {as_ranges(experts)}, e.g. "
                f"cache[{kind!r}, {layer}, {experts[0]}]{alternative}"
            )
        if names and layer is not None:
            return f"matches several weights: {', '.join(names)}"
        of_kind = layers[kind]
        wrong = "was not captured" if layer is not None else "names no layer"
        if layer is None and len(of_kind) > 1:
            wrong = "is in several layers"
        return (
            f"{wrong}; {kind} was captured {_where(of_kind)}: use e.g. "
            f"cache[{kind!r}, {of_kind[-1]}]"
        )


def _where(layers: list[int | None]) -> str:
    inside = [layer for layer in layers if layer is not None]
    if not inside:
        return "outside the blocks"
    return f"in layer{'s' * (len(inside) > 1)} {as_ranges(inside)}"


def _fields_of(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, without copying tensors as ``asdict`` would."""
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
