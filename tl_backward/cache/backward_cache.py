"""What one forward and one backward pass leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward import tensor_files
from tl_backward._integers import as_ranges
from tl_backward.cache._attribution import attribution
from tl_backward.cache.residual import Residual, SliceInput, Stack, stacked
from tl_backward.cache.rows import of_example
from tl_backward.factors import GradientFactors
from tl_backward.sites.names import parse_site_name

if TYPE_CHECKING:
    import pandas as pd


ON_CPU = ("tokens", "positions", "target_ids", "target_positions")
"""The fields that stay on the CPU, wherever the cache is."""


@dataclass(frozen=True, eq=False)
class BackwardCache(Mapping[str, GradientFactors]):
    """The gradient factors of every captured weight matrix, by site name.

    ``cache["blocks.5.mlp.W_out"]`` and ``cache["W_out", 5]`` are the same
    :class:`~tl_backward.GradientFactors`. It keeps no reference to the model and no autograd graph.
    Of several prompts, the factors stand for the sum over them, and :meth:`example` gives each.

    Attributes:
        factors: The factors by site name, in the order of the model.
        residual: What was seen at the residual stream.
        tokens: The tokens of the text that was run: the prompt, and of a target of several tokens
            all but the last. A list of them for several prompts.
        str_tokens: The same as strings.
        positions: The positions that the rows of the factors belong to, or a list of them.
        target_ids: The target's tokens: a scalar if there is one, a vector if there are more, with
            a batch axis before them for several prompts (shorter targets end with -1).
        target_positions: The positions whose logits predict the target's tokens, or a list of
            them. Empty for a ``loss_fn``.
        loss: The loss that was differentiated, of every prompt; a target's is in nats.
        weights_processing: What TransformerLens has done to the weights that the gradients are
            with respect to, as far as they show it: ``"raw"``, or the steps by the names of its
            arguments, such as ``"fold_ln, center_writing_weights"``.
        post_norm_vjps: By site name, the VJPs behind the post-norm of a weight that has one.
    """

    factors: dict[str, GradientFactors]
    post_norm_vjps: dict[str, Float[Tensor, "... rows d_model"]]
    residual: Residual
    tokens: Int[Tensor, "pos"] | list[Int[Tensor, "_"]]
    str_tokens: list[Any]
    positions: Int[Tensor, "n"] | list[Int[Tensor, "_"]]
    target_ids: Int[Tensor, "..."]
    target_positions: Int[Tensor, "k"] | list[Int[Tensor, "_"]]
    loss: Float[Tensor, "*batch"]
    weights_processing: str

    @property
    def is_batch(self) -> bool:
        """Whether it is of several prompts, also of a list of one."""
        return isinstance(self.tokens, list)

    def __getitem__(self, key: str | tuple[str, int | None]) -> GradientFactors:
        return self.factors[self._name(key)]

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
        """The cache of one prompt of several, as if it had been run alone.

        Raises:
            ValueError: When there is a single prompt.
            IndexError: When there are fewer prompts.
        """
        if not self.is_batch:
            raise ValueError("this cache is of a single prompt")
        if not -len(self.tokens) <= b < len(self.tokens):
            raise IndexError(f"example {b}: this cache has {len(self.tokens)} prompts")
        ids = self.target_ids[b].reshape(-1)
        ids = ids[ids >= 0]
        return replace(
            self,
            factors={name: g.example(b) for name, g in self.factors.items()},
            post_norm_vjps={
                name: of_example(vjps, b, self.factors[name].lengths)
                for name, vjps in self.post_norm_vjps.items()
            },
            residual=self.residual.example(b),
            tokens=self.tokens[b],
            str_tokens=self.str_tokens[b],
            positions=self.positions[b],
            target_ids=ids[0] if len(ids) == 1 else ids,
            target_positions=self.target_positions[b],
            loss=self.loss[b],
        )

    def residual_vjps(self, key: str | tuple[str, int | None]) -> Float[Tensor, "*batch n d_model"]:
        """VJPs of what a weight writes, where it enters the residual stream.

        Behind a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) they are those at the norm's output,
        which read well in the vocabulary; the factors keep the VJPs at the weight's own output,
        which make up its gradient. Without such a norm the two are the same.

        Raises:
            KeyError: When the weight was not captured.
        """
        name = self._name(key)
        return self.post_norm_vjps.get(name, self.factors[name].vjps)

    def bias_gradient(self, key: str | tuple[str, int | None]) -> Float[Tensor, "d_out"]:
        """Gradient of the bias beside a weight: the sum of the VJPs over the captured positions.

        Raises:
            KeyError: When the weight was not captured.
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
            layer: The last layer whose input is included; None or -1 for all, and the end of the
                stream (``final_post``).
            incl_mid: Whether to include the middle of blocks, between attention and MLP.
            pos_slice: Positions, as TransformerLens's ``Slice`` takes them.
            mlp_input: Whether to include the middle of ``layer`` itself.
            return_labels: Whether to return the labels, too: ``0_pre, 0_mid, 1_pre, ...``.

        Returns:
            ``dL/dresid``, raw sign, ``[component, *batch, n, d_model]``. Texts of different lengths
            have their rows in one axis.

        Raises:
            ValueError: When a point was not captured (the capture stops at the first layer that was
                asked for), is not there (parallel blocks have no middle), or ``layer`` is out of
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
        """What each part of the model adds to the VJP before ``layer``, as it comes down to it.

        The mirror of ``ActivationCache.decompose_resid``: there the embedding and every attention
        and MLP *below* a layer add up to the residual stream that enters it, here the unembedding
        and every attention and MLP *from that layer on* add up to the VJP there. What comes through
        a norm on the stream itself (BERT, openai-gpt), or through a mixer beside attention
        (falcon_h1), is in ``attn_out``.

        Args:
            layer: The layer; None or -1 for 0, where all parts are included.
            mlp_input: Whether to decompose the VJP in the middle of ``layer`` instead, which leaves
                its attention out.
            mode: ``"all"``, or only the parts of ``"mlp"`` or ``"attn"``.
            pos_slice: Positions, as TransformerLens's ``Slice`` takes them.
            incl_embeds: Whether to include the unembedding: the VJP at the end of the stream.
            return_labels: Whether to return the labels, too: ``unembed, 0_attn_out, 0_mlp_out``.

        Returns:
            ``[component, *batch, n, d_model]``, raw sign.

        Raises:
            ValueError: As :meth:`accumulated_vjps`, and for another ``mode``.
            NotImplementedError: When a block has neither attention with a site of W_O nor a middle,
                or is parallel and had a backward hook inside its attention.
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
        """What each attention head from ``layer`` on adds to the VJP before ``layer``.

        The mirror of ``ActivationCache.stack_head_results``. The heads of a layer add up to its
        ``attn_out`` of :meth:`decompose_vjps`, also where they share keys and values. (Not where
        later layers use this layer's keys and values, as in Gemma 3n: these come in addition. Nor
        where ``attn_out`` has more than attention in it.)

        Args:
            layer: The layer; None or -1 for 0, where all heads are included.
            return_labels: Whether to return the labels, too: ``L0H0, L0H1, ...``.
            incl_remainder: Whether to add the rest of the VJP, label ``remainder``.
            pos_slice: Positions, as TransformerLens's ``Slice`` takes them.

        Returns:
            ``[component, *batch, n, d_model]``, raw sign.

        Raises:
            ValueError: When the cache was captured without ``per_head=True``, and as
                :meth:`accumulated_vjps`.
        """
        parts = self.residual.by_head(layer, incl_remainder)
        return stacked(parts, pos_slice, return_labels, self.residual.lengths)

    def attribute(self, other: BackwardCache) -> pd.DataFrame:
        """First-order effect on ``other``'s loss of patching this run's activations into it.

        ``(activation - other's activation) . other's VJP`` of every node, the node scores of
        ``transformer_lens.tools.analysis.attribution_patch(model, clean, corrupt)`` (4.3): this
        cache is the clean run, ``other`` the corrupt one, whose VJPs are used.

        Returns:
            One row per node with the columns ``example, kind`` (``embed``, ``attn_head_out`` or
            ``mlp_out``), ``layer, head, position, score``.

        Raises:
            ValueError: When the two are not of equally long texts and the same positions, or one
                was not captured in all layers.

        Example:
            >>> clean.attribute(corrupt).nlargest(10, "score")
        """
        mine, others = self._positions(), other._positions()
        if mine != others:
            raise ValueError(
                "other: activations are compared position by position, so both runs must have "
                f"texts of the same lengths and the same positions, got {mine} and {others}"
            )
        return attribution(self.residual, other.residual, others)

    def save(self, path: str | Path) -> Path:
        """Write the cache to one safetensors file, from which :meth:`load` restores it exactly.

        A tensor that several weights share, such as the input of ``W_in`` and ``W_gate``, is
        written once. The file appears under its name only when it is whole: a save that fails
        leaves an older file as it was.

        Args:
            path: The file to write. Its folder must exist.

        Returns:
            The same path.

        Raises:
            OSError: When the file cannot be written.

        Example:
            >>> cache.save("messi.safetensors")
            >>> BackwardCache.load("messi.safetensors")["W_out", 5].norm()
        """
        tree = _fields_of(self) | {
            "factors": {name: _fields_of(g) for name, g in self.factors.items()},
            "residual": _fields_of(self.residual),
        }
        return tensor_files.write(Path(path), type(self).__name__, tree)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> BackwardCache:
        """Read a cache that :meth:`save` has written.

        Args:
            path: The file.
            device: Where the factors and the loss go. Tokens, positions and target stay on the
                CPU, as in a cache that was just captured.

        Returns:
            The cache with the same values, dtypes and order of weights. What was shared is shared.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file is truncated or damaged, is not a saved cache, or is in the
                format of a newer version of the package.

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
            factors = {name: GradientFactors(**g) for name, g in tree["factors"].items()}
            return cls(**tree | {"factors": factors, "residual": Residual(**tree["residual"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise tensor_files.damaged(Path(path), kind, error) from error

    def _positions(self) -> list[list[int]]:
        each: Any = self.positions if self.is_batch else [self.positions]
        return [positions.tolist() for positions in each]

    def _name(self, key: str | tuple[str, int | None]) -> str:
        """The site name behind a name or ``(kind, layer)``."""
        if isinstance(key, str):
            names = [key] if key in self.factors else []
        else:
            kind, layer = key
            prefix = "" if layer is None else f"blocks.{layer}."
            names = [n for n in self.factors if n.startswith(prefix) and n.endswith(f".{kind}")]
        if len(names) != 1:
            raise KeyError(f"{key!r} {self._no_single_weight(key, names)}")
        return names[0]

    def _no_single_weight(self, key: str | tuple[str, int | None], names: list[str]) -> str:
        """What is wrong with a key that names no weight, or several, and what to ask for."""
        kind, layer = (key, None) if isinstance(key, str) else key
        if isinstance(key, str) and "." in key:
            with suppress(ValueError):
                layer, kind = parse_site_name(key)
        layers: dict[str, list[int | None]] = {}
        for name in map(parse_site_name, self.factors):
            layers.setdefault(name.kind, []).append(name.layer)
        if kind not in layers:
            kinds: dict[str, list[str]] = {}
            for one, of_one in layers.items():
                kinds.setdefault(_where(of_one), []).append(one)
            every = "; ".join(f"{', '.join(some)} {where}" for where, some in kinds.items())
            return f"was not captured; there is {every}"
        if names and layer is not None:
            return f"is the key of several weights: {', '.join(names)}"
        of_kind = layers[kind]
        wrong = "was not captured" if layer is not None else "names no layer"
        if layer is None and len(of_kind) > 1:
            wrong = "is in several layers"
        return (
            f"{wrong}; {kind} was captured {_where(of_kind)}: take cache[{kind!r}, {of_kind[-1]}], "
            "say"
        )


def _where(layers: list[int | None]) -> str:
    inside = [layer for layer in layers if layer is not None]
    if not inside:
        return "outside the blocks"
    return f"in layer{'s' * (len(inside) > 1)} {as_ranges(inside)}"


def _fields_of(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, as they are (``asdict`` would copy its tensors)."""
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
