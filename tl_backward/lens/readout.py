"""Vectors of one kind, as the lens read them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward.sites.kinds import reads_stream, writes_stream

VALUE_COLUMNS = {"logits": "logit", "log_probs": "log_prob", "probs": "probability"}


def is_weight_kind(kind: str) -> bool:
    """Whether the lens reads a weight by this name, and not the residual stream."""
    return reads_stream(kind) or writes_stream(kind)


def is_forward(kind: str) -> bool:
    """Whether it is of the forward pass, whose most probable tokens are what counts."""
    return reads_stream(kind) or kind == "forward"


@dataclass(frozen=True, eq=False)
class Readout:
    """Vectors of one kind, read in the vocabulary at every layer and position.

    Matrices that read the residual stream (W_in, W_gate, W_Q, W_K, W_V) are read by their inputs
    ``x_i``, of which the *most* probable tokens are what the update imprints (Eq 9). Those that
    write to it (W_out, W_O) are read by their VJPs ``delta_i``, of which the *least* probable
    tokens are what a descent step shifts the output towards, and the most probable ones what it
    takes away (Eq 10). Signs are raw; no vector is ever negated.

    Rows whose vector is zero are not read: their ids and ranks are -1 and their values nan. So are
    the places behind the end of the shorter ones of several texts.

    Attributes:
        kind: ``"W_out"``, say.
        labels: What each entry of the first axis is: the name of a weight's site, or of a point of
            the residual stream.
        layers: The layer that each entry belongs to; None outside the blocks.
        top_ids: The most probable tokens, most probable first.
        top_values: Their values: log-probabilities in nats, or what ``return_type`` says.
        bottom_ids: The least probable tokens, least probable first.
        bottom_values: Their values.
        target_ranks: Rank of the target: 0 is the most probable token, ``d_vocab - 1`` the least.
            Of several targets for every row, there is an axis of them at the end.
        target_values: Their values.
        vocab_ids: The tokens in ``vocab``, if some were asked for.
        vocab_values: Their values.
        entropy: Entropy of the distribution over the vocabulary, in nats.
        norms: Norm of each vector that was read, before any normalisation.
        vjp_norms: Norm of ``delta_i`` at the weight's own output; of another vector, its own.
        zero_mask: Where the vector that was to be read is zero, or where there is none.
        vocabulary: The strings of all token ids above, and of the targets.
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
        """Whether ``target_ranks`` has an axis of several targets for every row."""
        return self.target_ranks.ndim > self.entropy.ndim

    def top_tokens(self) -> list[Any]:
        """The most probable tokens as strings, ``[layer]([batch])[position][k]``.

        There are none for a zero row.
        """
        return self._strings(self.top_ids.tolist())

    def bottom_tokens(self) -> list[Any]:
        """The least probable tokens as strings, ``[layer]([batch])[position][k]``."""
        return self._strings(self.bottom_ids.tolist())

    def example(self, b: int, n: int) -> Readout:
        """One prompt of several, of which ``n`` positions were read."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        of_prompt: dict[str, Any] = {
            name: tensor[:, b, :n] for name, tensor in tensors.items() if isinstance(tensor, Tensor)
        }
        return replace(self, **of_prompt)

    def _strings(self, ids: list[Any]) -> list[Any]:
        if ids and isinstance(ids[0], int):
            return [self.vocabulary[i] for i in ids if i >= 0]
        return [self._strings(inner) for inner in ids]
