"""The search for the step, and for the layer, of a forward pass shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward.editing.facts import Facts
from tl_backward.editing.key_statistics import KeyStatistics
from tl_backward.editing.runs import WholeRun
from tl_backward.editing.shift_terms import unit_shift
from tl_backward.editing.step_search import Step, smallest_step
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, WeightSite
from tl_backward.tokens import Prompt, pad_id, padded, prompt_tokens


class Candidate(NamedTuple):
    """A shift in some layers, the step that it is to have, and how much it changes elsewhere."""

    sites: Sequence[WeightSite]
    unit: WeightEdit
    step: Step
    change: float = math.nan


class ShiftSearch:
    """Tries shifts for some facts, from one whole run on their texts.

    Args:
        model: A TransformerLens model.
        facts: Prompts and targets.
        sites: Where shifts may be.
        statistics: For whitened keys; None for plain ones.
        margin: How far above all others the targets' logits have to come, in nats.
        skip_if_predicted: Whether facts that are predicted get no shift.
    """

    def __init__(
        self,
        model: Model,
        facts: Facts,
        sites: Sequence[WeightSite],
        statistics: KeyStatistics | None,
        margin: float,
        skip_if_predicted: bool,
    ) -> None:
        self._model, self._facts, self._sites = model, facts, sites
        self._statistics, self.margin = statistics, margin
        self._run = WholeRun(model, facts.tokens, sites)
        self._runs = [self._run]
        predicted = facts.gaps(self._run.logits[None])[0] > 0
        self.skipped: Bool[Tensor, "batch"] = predicted & skip_if_predicted

    @property
    def n_passes(self) -> int:
        """Passes through all layers so far."""
        return sum(run.n_passes for run in self._runs)

    @property
    def n_upper_passes(self) -> int:
        """Passes through the layers from an edit upwards so far."""
        return sum(run.n_upper_passes for run in self._runs)

    def candidate(self, sites: Sequence[WeightSite], lr: float | Literal["auto"]) -> Candidate:
        """The shift in the layers of some sites, with a given step or the smallest that does."""
        unit = unit_shift(
            self._model, sites, self._facts, self._run.inputs, ~self.skipped, self._statistics
        )
        if lr != "auto":
            return Candidate(sites, unit, Step(lr, *self._gaps(unit, [lr])))
        step = smallest_step(
            lambda sizes: self._gaps(unit, sizes), self._guess(sites, unit), self.margin
        )
        return Candidate(sites, unit, step)

    def layers(
        self,
        lr: float | Literal["auto"],
        texts: Prompt | None,
        prepend_bos: bool | None,
    ) -> list[Candidate]:
        """The shifts in each single layer: those that succeed first, by how little they change.

        Raises:
            ValueError: When there is no position at which changes can be seen.
        """
        run, mask = self._run, self._facts.elsewhere()
        if texts is not None:
            run, mask = self._run_on(texts, prepend_bos)
        if not mask.any():
            raise ValueError(
                'texts: no position of the prompt is left that predicts no target, so layer="auto" '
                "needs other texts to see what an edit changes"
            )
        before = _log_probs(run.logits, mask)
        found = []
        for site in tqdm(self._sites, desc="layers", delay=2, leave=False):
            candidate = self.candidate([site], lr)
            edit = candidate.step.size * candidate.unit
            after = _log_probs(run.edited_logits([edit])[0], mask)
            change = (before.exp() * (before - after)).sum(-1).mean()
            found.append(candidate._replace(change=float(change)))
        return sorted(found, key=self._demerit)

    def succeeds(self, candidate: Candidate) -> bool:
        """Whether the targets come out on top by the margin."""
        return candidate.step.gap >= self.margin

    def _demerit(self, candidate: Candidate) -> tuple[bool, float]:
        if self.succeeds(candidate):
            return False, candidate.change
        return True, -candidate.step.gap

    def _gaps(self, unit: WeightEdit, sizes: Sequence[float]) -> list[float]:
        """For each size of the step, the gap of the worst target.

        What is skipped has to stay on top, but without the margin, which it is therefore given.
        """
        gaps = self._facts.gaps(self._run.edited_logits([size * unit for size in sizes]))
        return (gaps + self.margin * self.skipped).amin(1).tolist()

    def _guess(self, sites: Sequence[WeightSite], unit: WeightEdit) -> float:
        """The step by which a weight's outputs change as much as they are large."""
        outputs, changes = [], []
        terms = (~self.skipped)[self._facts.example]
        at = self._facts.example[terms], self._facts.input_at[terms]
        for site in sites:
            g, x = unit.factors[site.name], self._run.inputs[site.name][at]
            added = (x @ g.inputs.mT) @ g.vjps
            outputs.append(self._run.outputs[site.name][at].norm(dim=-1))
            changes.append(added.norm(dim=-1))
        guess = float(torch.cat(outputs).mean() / torch.cat(changes).mean())
        return guess if 0 < guess < math.inf else 1.0

    def _run_on(
        self, texts: Prompt, prepend_bos: bool | None
    ) -> tuple[WholeRun, Bool[Tensor, "batch pos"]]:
        n_ctx = self._model.cfg.n_ctx
        cut = [ids[:n_ctx] for ids in prompt_tokens(self._model, texts, prepend_bos, "right")]
        tokens, mask = padded(cut, pad_id(self._model), "right")
        self._runs.append(WholeRun(self._model, tokens))
        return self._runs[-1], mask.bool()


def _log_probs(
    logits: Float[Tensor, "batch pos d_vocab"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "chosen d_vocab"]:
    chosen = logits[mask.to(logits.device)]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
