"""Search for the value a layer should write at the subject's last token to predict the target.

As in ROME and MEMIT, Adam optimises a vector ``d``, added at that token in every context, with the
loss

    mean NLL of the target + kl * KL(edited || original) + decay * |d| / |v0|^2

where the mean is over contexts and the target's tokens, ``v0`` is the layer's output in the first
context, and KL is taken at the subject's last token of "{subject} is a".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward._precision import upcast
from tl_backward._user_warnings import warn_user
from tl_backward.capture.run import require_ready
from tl_backward.capture.run_hooks import frozen
from tl_backward.editing._settings import require_not_negative, require_whole
from tl_backward.editing._subject_facts import (
    SubjectFact,
    SubjectText,
    batch_of_subjects,
    in_batches,
    read_subjects,
)
from tl_backward.editing._upper_layers import UpperLayers
from tl_backward.sites import Model, all_modules, all_parameters

ENOUGH = 0.05
"""A fact's search ends when its loss falls below this, in nats."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the value search.

    Attributes:
        steps: Maximum number of forward passes; Adam makes one update fewer.
        lr: Adam's learning rate.
        decay: Weight of ``|d| / |v0|^2``.
        kl: Weight of the KL divergence.
        clamp: Maximum ``|d|``, in units of ``|v0|``.

    Raises:
        ValueError: If one of them is out of range.
    """

    steps: int
    lr: int | float
    decay: int | float
    kl: int | float
    clamp: int | float

    def __post_init__(self) -> None:
        require_whole(steps=self.steps)
        require_not_negative(lr=self.lr, decay=self.decay, kl=self.kl, clamp=self.clamp)


@dataclass(frozen=True, eq=False)
class Values:
    """The values found for some facts.

    Attributes:
        initial: ``v0``, the layer's output in the first context.
        change: ``d``.
        losses: Loss of every step for each fact, in nats.
        notes: Problems during the search, as text.
    """

    initial: Float[Tensor, "fact d_model"]
    change: Float[Tensor, "fact d_model"]
    losses: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...] = ()


def search_values(
    model: Model, facts: Sequence[SubjectFact], point: str, layer: int, settings: SearchSettings
) -> Values:
    """Search the values of several facts in large batches.

    The layers below run once. Each fact has its own vector and stops on its own. A fact whose loss
    becomes non-finite keeps the vector with the smallest loss so far.

    Args:
        model: A TransformerLens model in eval mode.
        facts: The facts.
        point: The HookPoint that adds the vector, in block ``layer``.
        layer: The lowest block that must run again.
        settings: See :class:`SearchSettings`.

    Raises:
        ValueError: If the loss of a fact is not finite before any change.

    Warns:
        UserWarning: If the loss of a fact is not finite at a later step.
    """
    sizes = [_size(fact) for fact in facts]
    batches = in_batches(range(len(facts)), sizes)
    require_ready(model, list(all_parameters(model)))
    with frozen(module for _, module in all_modules(model)):
        found = [
            _found(model, [facts[i] for i in batch], batch, point, layer, settings)
            for batch in tqdm(list(batches), desc="values", delay=2, leave=False)
        ]
    return Values(
        torch.cat([some.initial for some in found]),
        torch.cat([some.change for some in found]),
        tuple(losses for some in found for losses in some.losses),
        tuple(note for some in found for note in some.notes),
    )


class _Batch:
    """The texts of some facts, and the places of their losses.

    Every fact has one text per context, followed by the target, and then its essence text.
    """

    def __init__(self, model: Model, facts: Sequence[SubjectFact]) -> None:
        texts = [(f, text) for f, fact in enumerate(facts) for text in _texts(fact)]
        self.texts, self.positions = batch_of_subjects(model, [text for _, text in texts])
        self.of_fact = torch.tensor([f for f, _ in texts])
        is_last = torch.tensor([text is facts[f].essence for f, text in texts])
        essence_rows = is_last.nonzero().squeeze(1)
        terms = [
            (row, at, token, f, 1 / (len(facts[f].in_contexts) * len(facts[f].target)))
            for row, (f, text) in enumerate(texts)
            if not is_last[row]
            for at, token in zip(
                range(len(text.ids) - len(facts[f].target), len(text.ids)),
                facts[f].target,
                strict=True,
            )
        ]
        rows, positions, targets, of_term, shares = zip(*terms, strict=True)
        self._targets, self._fact_of_term = torch.tensor(targets), torch.tensor(of_term)
        self._shares = torch.tensor(shares, dtype=torch.float64)
        self.places = (
            torch.cat([torch.tensor(rows), essence_rows]),
            torch.cat([torch.tensor(positions), self.positions[essence_rows]]),
        )
        self.n_facts = len(facts)

    def losses(
        self,
        logits: Float[Tensor, "place d_vocab"],
        original: Float[Tensor, "place d_vocab"],
        kl: float,
    ) -> Float[Tensor, "fact"]:
        """The target's negative log-likelihood plus ``kl`` times the divergence, per fact."""
        of_targets, of_essence = _log_probs(logits).split([len(self._targets), self.n_facts])
        nll = -of_targets.gather(1, self._targets.to(logits.device)[:, None]).squeeze(1)
        each = nll.new_zeros(self.n_facts).index_add(
            0, self._fact_of_term.to(nll.device), nll * self._shares.to(nll)
        )
        before = _log_probs(original)[len(self._targets) :]
        impossible = before == -torch.inf
        ratio = (of_essence - before).masked_fill(impossible, 0)
        divergence = (of_essence.exp() * ratio).sum(-1)
        return each + kl * divergence


def _found(
    model: Model,
    facts: Sequence[SubjectFact],
    numbers: Sequence[int],
    point: str,
    layer: int,
    settings: SearchSettings,
) -> Values:
    """The values of one batch of facts; messages refer to facts by ``numbers``."""
    batch = _Batch(model, facts)
    upper = UpperLayers(model, batch.texts, batch.places, layer)
    (seen,) = read_subjects(model, [point], [fact.in_contexts[0] for fact in facts])
    v0 = upcast(seen)
    largest = settings.clamp * v0.norm(dim=-1, keepdim=True)
    d = torch.zeros_like(v0, requires_grad=True)
    adam = torch.optim.Adam([d], lr=settings.lr)
    best, least = torch.zeros_like(v0), v0.new_full((len(facts),), torch.inf)
    searching = torch.ones_like(least, dtype=torch.bool)
    history: list[list[float]] = [[] for _ in facts]
    notes = []
    for step in range(settings.steps):
        logits = upper.run([(point, _adding(point, d, batch))])
        losses = batch.losses(logits, upper.logits, settings.kl).to(v0.device)
        losses = losses + settings.decay * d.norm(dim=-1) / v0.norm(dim=-1) ** 2
        for f in searching.nonzero().flatten().tolist():
            history[f].append(losses[f].item())
        is_number = losses.isfinite()
        for f in (searching & ~is_number).nonzero().flatten().tolist():
            if step == 0:
                raise ValueError(
                    f"prompt {numbers[f]}: the loss is {losses[f].item()} before any edit; the "
                    "model's logits for this text are not finite"
                )
            notes.append(
                f"prompt {numbers[f]}: the loss is {losses[f].item()} at step {step}; keeping the "
                f"value with the smallest loss so far, {least[f].item():.4g}"
            )
        with torch.no_grad():
            better = searching & (losses < least)
            best[better], least[better] = d[better], losses[better]
            kept = torch.where(is_number[:, None], d, best)
        searching = searching & is_number & (losses >= ENOUGH)
        if not searching.any() or step == settings.steps - 1:
            break
        (d.grad,) = torch.autograd.grad(losses[searching].sum(), d)
        adam.step()
        with torch.no_grad():
            sizes = d.norm(dim=-1, keepdim=True)
            clamped = torch.where(sizes > largest, d * largest / sizes, d)
            d.copy_(torch.where(searching[:, None], clamped, kept))
    for note in notes:
        warn_user(note)
    return Values(v0, kept, tuple(map(tuple, history)), tuple(notes))


def _adding(point: str, d: Float[Tensor, "fact d_model"], batch: _Batch) -> Callable[..., Any]:
    """A hook for a single run that adds each fact's vector at the subject's last token."""
    n_calls = 0

    def add(y: Tensor, hook: Any) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise NotImplementedError(
                f"{point} is called several times in one forward pass; the value search does not "
                "support layers that run more than once"
            )
        at = torch.arange(len(y)), batch.positions.to(y.device)
        added = y.clone()
        added[at] = (y[at].to(d.dtype) + d[batch.of_fact].to(y.device)).to(y.dtype)
        return added

    return add


def _texts(fact: SubjectFact) -> list[SubjectText]:
    return [*fact.with_target(), fact.essence]


def _size(fact: SubjectFact) -> int:
    texts = _texts(fact)
    return len(texts) * max(len(text.ids) for text in texts)


def _log_probs(logits: Float[Tensor, "place d_vocab"]) -> Float[Tensor, "place d_vocab"]:
    return upcast(logits).log_softmax(-1)
