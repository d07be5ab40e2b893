"""The lens's readout of vectors of one kind."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward.sites.kinds import reads_stream, writes_stream

VALUE_COLUMNS = {"logits": "logit", "log_probs": "log_prob", "probs": "probability"}


def is_weight_kind(kind: str) -> bool:
    """Whether ``kind`` names a weight that the lens reads, not the residual stream."""
    return reads_stream(kind) or writes_stream(kind)


def is_forward(kind: str) -> bool:
    """Whether ``kind`` is read from the forward pass, where the most probable tokens matter."""
    return reads_stream(kind) or kind == "forward"


@dataclass(frozen=True, eq=False)
class Readout:
    """Vectors of one kind, read in the vocabulary at every layer and position.

    Matrices that read the residual stream (W_in, W_gate, W_Q, W_K, W_V) are read by their inputs
    ``x_i``: the update imprints the *most* probable tokens (Eq 9). Those that write to it (W_out,
    W_O) are read by their VJPs ``delta_i``: a descent step shifts the output towards the *least*
    probable tokens and away from the most probable ones (Eq 10). Signs are raw; no vector is ever
    negated.

    Zero vectors are not read: their ids and ranks are -1 and their values nan. The same holds for
    padding after the shorter of several texts.

    Attributes:
        kind: The kind that was read, e.g. ``"W_out"``.
        labels: Names of the entries of the first axis: weight sites, or points of the residual
            stream.
        layers: Layer of each entry; None outside the blocks.
        top_ids: The most probable tokens, most probable first.
        top_values: Their values: log-probabilities in nats, or as ``return_type`` says.
        bottom_ids: The least probable tokens, least probable first.
        bottom_values: Their values.
        target_ranks: Rank of the target: 0 is the most probable token, ``d_vocab - 1`` the least.
            Several targets per row add a last axis.
        target_values: Their values.
        vocab_ids: The tokens in ``vocab``, if given.
        vocab_values: Their values.
        entropy: Entropy of the distribution over the vocabulary, in nats.
        norms: Norm of each vector, before any normalisation.
        vjp_norms: Norm of ``delta_i`` at the weight's own output; for other vectors, ``norms``.
        zero_mask: Where the vector is zero or absent.
        vocabulary: Strings of all token ids above and of the targets.
    """

    kind: str
    labels: list[str]
    layers: list[int | None]
    top_ids: Int[Tensor, "entry *batch_and_pos top_k"]
    top_values: Float[Tensor, "entry *batch_and_pos top_k"]
    bottom_ids: Int[Tensor, "entry *batch_and_pos bottom_k"]
    bottom_values: Float[Tensor, "entry *batch_and_pos bottom_k"]
    target_ranks: Int[Tensor, "entry *batch_pos_and_target"]
    target_values: Float[Tensor, "entry *batch_pos_and_target"]
    vocab_ids: Int[Tensor, "entry *batch_and_pos v"]
    vocab_values: Float[Tensor, "entry *batch_and_pos v"]
    entropy: Float[Tensor, "entry *batch_and_pos"]
    norms: Float[Tensor, "entry *batch_and_pos"]
    vjp_norms: Float[Tensor, "entry *batch_and_pos"]
    zero_mask: Bool[Tensor, "entry *batch_and_pos"]
    vocabulary: dict[int, str]

    def __repr__(self) -> str:
        shape = [*self.norms.shape]
        entries = self.labels if len(self.labels) < 4 else [self.labels[0], "...", self.labels[-1]]
        ends = {"top": self.top_ids, "bottom": self.bottom_ids, "vocab": self.vocab_ids}
        kept = ", ".join(f"{ids.shape[-1]} {end}" for end, ids in ends.items() if ids.shape[-1])
        return f"Readout({self.kind} {shape}: {', '.join(entries)}; {kept} tokens)"

    @property
    def has_several_targets(self) -> bool:
        """Whether ``target_ranks`` has a last axis of several targets."""
        return self.target_ranks.ndim > self.entropy.ndim

    def top_tokens(self) -> list[Any]:
        """The most probable tokens as strings, ``[layer]([batch])[position][k]``.

        A zero row has none.
        """
        return self._strings(self.top_ids.tolist())

    def bottom_tokens(self) -> list[Any]:
        """The least probable tokens as strings, ``[layer]([batch])[position][k]``."""
        return self._strings(self.bottom_ids.tolist())

    def example(self, b: int, n: int) -> Readout:
        """The readout of one prompt of a batch, with its ``n`` positions."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        of_prompt: dict[str, Any] = {
            name: tensor[:, b, :n] for name, tensor in tensors.items() if isinstance(tensor, Tensor)
        }
        return replace(self, **of_prompt)

    def _strings(self, ids: list[Any]) -> list[Any]:
        if ids and isinstance(ids[0], int):
            return [self.vocabulary[i] for i in ids if i >= 0]
        return [self._strings(inner) for inner in ids]
