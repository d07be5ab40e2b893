"""What one forward and one backward pass leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.factors import GradientFactors


@dataclass(frozen=True, eq=False)
class BackwardCache(Mapping[str, GradientFactors]):
    """The gradient factors of every captured weight matrix, by site name.

    ``cache["blocks.5.mlp.W_out"]`` and ``cache["W_out", 5]`` are the same
    :class:`~tl_backward.GradientFactors`. It keeps no reference to the model and no autograd graph.

    Attributes:
        factors: The factors by site name, in the order of the model.
        tokens: The tokens of the prompt.
        str_tokens: The same as strings.
        positions: The positions that the rows of the factors belong to.
        target_ids: The target of the loss.
        loss: The loss that was differentiated, in nats.
        weights_processing: What TransformerLens has done to the weights that the gradients are
            with respect to, as far as they show it: ``"raw"``, or the steps by the names of its
            arguments, such as ``"fold_ln, center_writing_weights"``.
        behind_norms: By site name, the VJPs behind the post-norm of a weight that has one.
    """

    factors: dict[str, GradientFactors]
    tokens: Int[Tensor, "pos"]
    str_tokens: list[str]
    positions: Int[Tensor, "n"]
    target_ids: Int[Tensor, ""]
    loss: Float[Tensor, ""]
    weights_processing: str
    behind_norms: dict[str, Float[Tensor, "n d_model"]]

    def __getitem__(self, key: str | tuple[str, int | None]) -> GradientFactors:
        return self.factors[self._name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __repr__(self) -> str:
        return (
            f"BackwardCache({len(self)} weights, {len(self.positions)} of {len(self.tokens)} "
            f"positions, loss={self.loss.item():.4f})"
        )

    def residual_vjps(self, key: str | tuple[str, int | None]) -> Float[Tensor, "n d_model"]:
        """VJPs of what a weight writes, where it enters the residual stream.

        Behind a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) they are those at the norm's output,
        which read well in the vocabulary; the factors keep the VJPs at the weight's own output,
        which make up its gradient. Without such a norm the two are the same.

        Raises:
            KeyError: When the weight was not captured.
        """
        name = self._name(key)
        return self.behind_norms.get(name, self.factors[name].vjps)

    def bias_gradient(self, key: str | tuple[str, int | None]) -> Float[Tensor, "d_out"]:
        """Gradient of the bias beside a weight: the sum of the VJPs over the captured positions.

        Raises:
            KeyError: When the weight was not captured.
        """
        return self[key].vjps.flatten(0, -2).sum(0)

    def _name(self, key: str | tuple[str, int | None]) -> str:
        """The site name behind a name or ``(kind, layer)``."""
        if isinstance(key, str):
            names = [key] if key in self.factors else []
        else:
            kind, layer = key
            prefix = "" if layer is None else f"blocks.{layer}."
            names = [n for n in self.factors if n.startswith(prefix) and n.endswith(f".{kind}")]
        if len(names) != 1:
            problem = "is in several layers" if names else "was not captured"
            raise KeyError(f"{key!r} {problem}; there is {', '.join(names or self.factors)}")
        return names[0]
