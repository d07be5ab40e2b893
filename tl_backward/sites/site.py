"""Weight sites: the places of weight matrices in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from tl_backward._integers import is_integer
from tl_backward.sites.mixture import Mixture
from tl_backward.sites.offloading import stored
from tl_backward.sites.protocols import Model
from tl_backward.sites.recomputed import Recomputation, recomputation
from tl_backward.sites.tap import Tap

FORKED_INPUT = ("use_split_qkv_input", "use_attn_in")
PER_HEAD = {**dict.fromkeys(("W_Q", "W_K", "W_V"), FORKED_INPUT), "W_O": ("use_attn_result",)}
"""TransformerLens settings under which a weight is not used as a single ``y = x W``."""

RESIDUAL_HOOKS = {"W_O": "hook_attn_out", "W_out": "hook_mlp_out"}
"""HookPoint in the block where a weight's output enters the residual stream."""


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor itself."""
    return tensor


@dataclass(frozen=True, eq=False)
class WeightSite:
    """One weight matrix ``W`` of a model, used as ``y = x W``, and the places of ``x`` and ``y``.

    Attributes:
        name: Unique name, e.g. ``"blocks.5.mlp.W_out"``.
        kind: Kind of weight, e.g. ``"W_out"``.
        layer: Layer, e.g. ``5``, or ``None`` outside the blocks.
        expert: Expert of a mixture, e.g. ``3``; ``None`` elsewhere. ``x`` and ``y`` are then of the
            tokens routed to it.
        hook_in: Name of the HookPoint of ``x``; ``None`` if there is none, inside a LoRA layer or
            an expert.
        hook_out: Name of the HookPoint of ``y``, including the output of LoRA adapters; ``None`` if
            there is none.
        d_in: Width of ``x``.
        d_out: Width of ``y``.
        hook_residual: Name of the HookPoint of ``y`` after a post-norm, where it enters the
            residual stream; ``None`` if ``y`` enters it unchanged, or not at all.
        tied_to: Names of other sites with the same parameter (tied embeddings). Each site has its
            own factors; the gradient of the parameter is the sum over all of them, each in the
            layout of its own site.
        feeds: Names of other sites whose weights are recomputed from this parameter or its memory,
            so that an in-place change also changes them.
    """

    name: str
    kind: str
    layer: int | None
    hook_in: str | None
    hook_out: str | None
    d_in: int
    d_out: int
    x_tap: Callable[[], Tap] = field(repr=False)
    """Where ``x`` is read, after the hooks of ``hook_in``."""
    y_tap: Callable[[], Tap] = field(repr=False)
    """Where ``y`` is read, before the hooks of ``hook_out``."""
    holder: tuple[nn.Module, str] = field(repr=False)
    """The module that uses the weight, and the weight's name there."""
    layout: Callable[[Tensor], Tensor] = field(repr=False)
    """Views a ``[d_in, d_out]`` matrix in the shape of the parameter."""
    encode: Callable[[Tensor], Tensor] = field(repr=False, default=unchanged)
    """Converts the tensor that is read to ``x``, e.g. token ids to one-hot rows."""
    padding_row: int | None = field(repr=False, default=None)
    """The row of ``W``, for a padding token, that PyTorch excludes from the gradient."""
    hook_residual: str | None = None
    residual_tap: Callable[[], Tap] | None = field(repr=False, default=None)
    """Where ``y`` is read after the post-norm."""
    hook_out_scale: float = field(repr=False, default=1.0)
    """Hooks of ``hook_out`` see ``y`` times this factor (not 1 for Granite's W_E)."""
    also_without_grad: bool = field(repr=False, default=False)
    """Whether some passes run under ``torch.no_grad()``; these have no part in the gradient."""
    packed: str | None = field(repr=False, default=None)
    """How the weight is stored if not as a matrix: quantised to 4 or 8 bits, with scales."""
    tied_to: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    in_storage_with: tuple[str, ...] = field(repr=False, default=())
    """Names of other sites whose parameters may share memory with this one, tied or not."""
    expert: int | None = None
    index: Any = field(repr=False, default=...)
    """Index of this weight in the parameter of ``holder``; ``...`` for the whole parameter."""
    mixture: Mixture | None = field(repr=False, default=None)
    """The mixture of experts that this weight belongs to."""
    has_inner_output: bool = field(repr=False, default=False)
    """Whether the module itself continues computing with ``y``, like a router with its logits."""

    @property
    def hook_points(self) -> tuple[str, str]:
        """``hook_in`` and ``hook_out``.

        Raises:
            NotImplementedError: If one of them does not exist.
        """
        if self.hook_in is None or self.hook_out is None:
            why = (
                "has no HookPoint on both sides of it"
                if self.expert is None
                else "is a matrix of one expert, whose input and output have no HookPoints"
            )
            raise NotImplementedError(
                f"{self.name} {why}, so hooks cannot change it; apply() the edit to the weight"
            )
        return self.hook_in, self.hook_out

    @property
    def parameter(self) -> Tensor:
        """The live tensor that the forward pass multiplies by, in its own layout.

        If a library stores it quantised as a tensor subclass (torchao), the gradient is with
        respect to the dequantised value. If it is :attr:`recomputed`, this is its current value and
        not a parameter; with pruning and other hooks it dates from the last forward pass. If the
        weights of several experts are stacked in one parameter, it is a view of this expert's part.
        If ``accelerate`` offloads it, this is the tensor in CPU memory or in the file on disk, and
        an in-place change takes effect from the next forward pass. A weight that is offloaded to a
        checkpoint is on ``meta``.

        Raises:
            NotImplementedError: If the weight is stored packed, so that there is no such tensor.
        """
        stack, index = self.stored_in
        return stack if index is ... else stack[index]

    @property
    def stored_in(self) -> tuple[Tensor, Any]:
        """The parameter that holds the weight, and the weight's index in it.

        ``parameter[index]`` is :attr:`parameter`; the index is ``...`` for a whole parameter.

        Raises:
            NotImplementedError: As :attr:`parameter`.
        """
        if self.packed is not None:
            raise NotImplementedError(
                f"{self.name} is stored packed ({self.packed}), and no matrix can be read from it "
                "or added to it; use fwd_hooks() of an edit, which touch no weight"
            )
        return stored(*self.holder), self.index

    @property
    def recomputed(self) -> Recomputation | None:
        """How the weight is recomputed in each forward pass; None if it is stored."""
        return recomputation(*self.holder)

    def to_parameter_layout(self, matrix: Float[Tensor, "d_in d_out"]) -> Tensor:
        """View a ``[d_in, d_out]`` matrix in the shape of ``parameter``.

        Raises:
            ValueError: If the matrix is not ``[d_in, d_out]``.
        """
        if tuple(matrix.shape) != (self.d_in, self.d_out):
            raise ValueError(
                f"{self.name} takes a [{self.d_in}, {self.d_out}] matrix, got {tuple(matrix.shape)}"
            )
        return self.layout(matrix)


class UnsupportedWeight(NamedTuple):
    """A weight matrix, or the place of one, without a site, and the reason."""

    name: str
    kind: str
    layer: int | None
    reason: str
    parameter: Tensor | None = None


def final_norm(
    model: Model, vectors: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_model"]:
    """Apply the final norm, with the vectors' own statistics; the identity if there is none."""
    if model.cfg.normalization_type is None:
        return vectors
    return model.ln_final(vectors.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True, eq=False)
class FoundSites:
    """The weight matrices of a model.

    Attributes:
        sites: The weights with a site, in model order.
        unsupported: The weights without a site.
        n_layers: Number of layers of the model.
    """

    sites: list[WeightSite]
    unsupported: list[UnsupportedWeight]
    n_layers: int

    def select(
        self,
        weights: str | Iterable[str] | None = None,
        layers: int | Iterable[int] | None = None,
    ) -> list[WeightSite]:
        """The sites of some kinds and layers, in model order.

        Raises:
            ValueError, NotImplementedError: As :func:`tl_backward.weight_sites`.
        """
        kinds = _kinds(self.sites, self.unsupported, weights)
        wanted = layer_numbers(self.n_layers, layers)

        def is_wanted(one: WeightSite | UnsupportedWeight) -> bool:
            return one.kind in kinds and (wanted is None or one.layer in wanted)

        selected = [site for site in self.sites if is_wanted(site)]
        missing = [one for one in self.unsupported if is_wanted(one)]
        is_explicit = weights is not None and (wanted is not None or not selected)
        if is_explicit and missing:
            name, *_, reason, _ = missing[0]
            raise NotImplementedError(f"{name} has no site: {reason}")
        if not selected:
            raise ValueError(f"layers={layers!r} have none of the weights {', '.join(kinds)}")
        return selected


def _kinds(
    sites: Sequence[WeightSite],
    unsupported: Sequence[UnsupportedWeight],
    weights: str | Iterable[str] | None,
) -> list[str]:
    available = list(dict.fromkeys(site.kind for site in sites))
    asked_for = [weights] if isinstance(weights, str) else weights
    kinds = available if asked_for is None else list(asked_for)
    known = {*available, *(one.kind for one in unsupported)}
    if not kinds or not known.issuperset(kinds):
        raise ValueError(f"weights={weights!r}: this model has {', '.join(available)}")
    return kinds


def layer_numbers(n_layers: int, layers: int | Iterable[int] | None) -> set[int] | None:
    """The requested layers as nonnegative indices; None for all.

    Raises:
        ValueError: If a layer does not exist.
    """
    if layers is None:
        return None
    indices = list(layers) if isinstance(layers, Iterable) else [layers]
    if not indices or not all(is_integer(i) and -n_layers <= i < n_layers for i in indices):
        raise ValueError(
            f"layers={layers!r}: this model has layers 0 to {n_layers - 1} "
            f"(or -{n_layers} to -1, counted from the last)"
        )
    return {int(i) % n_layers for i in indices}
