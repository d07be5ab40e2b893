"""The search for the step and the layer of a forward pass shift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward._precision import upcast
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.tokens import Prompt, prompt_tokens
from tl_backward.editing._expert_outputs import ExpertOutputs
from tl_backward.editing._joint_steps import smallest_steps
from tl_backward.editing._shift_terms import ShiftRule, unit_shift
from tl_backward.editing._step_search import Step, smallest_step
from tl_backward.editing.runs import Matrix, WholeRun
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model

N_TURNS = 6
"""Maximum number of rounds in which each target token's step is searched again."""


class Candidate(NamedTuple):
    """A shift in some layers, its step, and its change of other predictions.

    If terms have separate steps, ``step`` is the largest, ``unit`` holds the terms scaled relative
    to it, and ``of_each`` lists the steps.
    """

    sites: Sequence[Matrix]
    unit: WeightEdit
    step: Step
    of_each: tuple[float, ...] = ()
    change: float = math.nan


class ShiftSearch:
    """Tries shifts for some facts, starting from one whole run on their texts.

    Args:
        model: A TransformerLens model.
        terms: Prompts and targets.
        sites: Candidate sites of a shift.
        rule: How the shift's terms are built.
        margin: Required distance of the targets' logits above all others, in nats.
        skip_if_predicted: Whether to skip prompts whose targets are already predicted.
    """

    def __init__(
        self,
        model: Model,
        terms: TargetTerms,
        sites: Sequence[Matrix],
        rule: ShiftRule,
        margin: float,
        skip_if_predicted: bool,
    ) -> None:
        self._model, self._terms, self._sites = model, terms, sites
        self._rule, self.margin = rule, margin
        self._run = WholeRun(model, terms.batch, sites)
        self._runs = [self._run]
        predicted = terms.gaps(self._run.logits[terms.places][None])[0] > 0
        self.skipped: Bool[Tensor, "batch"] = predicted & skip_if_predicted

    @property
    def n_passes(self) -> int:
        """Number of passes through all layers so far."""
        return sum(run.n_passes for run in self._runs)

    @property
    def n_upper_passes(self) -> int:
        """Number of passes through the layers from an edit upwards so far."""
        return sum(run.n_upper_passes for run in self._runs)

    def candidate(self, sites: Sequence[Matrix], lr: float | Literal["auto"]) -> Candidate:
        """The shift at some sites, with a given step or the smallest one that succeeds.

        With a joint rule every term has its own step. Otherwise, the tokens of a single prompt's
        target have their own steps if that makes a smaller update than a common step.
        """
        unit = unit_shift(
            self._model, sites, self._terms, self._run.inputs, ~self.skipped, self._rule
        )
        if lr != "auto":
            return Candidate(sites, unit, Step(lr, *self._gaps(unit, [lr])))
        if self._rule.joint and len(self._terms.ids) > 1:
            return self._with_joint_steps(sites, unit)
        step = smallest_step(
            lambda sizes: self._gaps(unit, sizes), self._guess(sites, unit), self.margin
        )
        common = Candidate(sites, unit, step)
        if len(self._terms.batch) > 1 or len(self._terms.ids) == 1:
            return common
        return min(common, self._with_own_steps(common), key=self._size)

    def layers(
        self,
        lr: float | Literal["auto"],
        texts: Prompt | None,
        prepend_bos: bool | None,
    ) -> list[Candidate]:
        """The shifts in each single layer: successful ones first, smallest change first.

        Raises:
            ValueError: If there is no position at which to measure changes.
        """
        run, mask = self._run, self._terms.elsewhere()
        if texts is not None:
            run, mask = self._run_on(texts, prepend_bos)
        if not mask.any():
            raise ValueError(
                'texts: every position of the prompt predicts a target, so layer="auto" needs '
                "other texts to measure an edit's changes"
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
        """Whether the targets exceed all other tokens by the margin."""
        return candidate.step.gap >= self.margin

    def _demerit(self, candidate: Candidate) -> tuple[bool, float]:
        if self.succeeds(candidate):
            return False, candidate.change
        return True, -candidate.step.gap

    def _gaps(self, unit: WeightEdit, sizes: Sequence[float]) -> list[float]:
        """For each step size, the gap of the worst target.

        Skipped targets must stay on top, but need no margin, so the margin is added to their gaps.
        """
        edits = [size * unit for size in sizes]
        gaps = self._terms.gaps(self._run.edited_logits(edits, self._terms.places))
        return (gaps + self.margin * self.skipped).amin(1).tolist()

    def _with_own_steps(self, common: Candidate) -> Candidate:
        """In turn, set each token's step to the smallest that succeeds with the others in place."""
        sizes = [0.0] * len(self._terms.ids)

        def gaps(term: int, candidates: Sequence[float]) -> list[float]:
            edits = [
                _scaled(common.unit, [*sizes[:term], size, *sizes[term + 1 :]])
                for size in candidates
            ]
            logits = self._run.edited_logits(edits, self._terms.places)
            return self._terms.term_gaps(logits)[:, term].tolist()

        worst = -math.inf
        for _ in range(N_TURNS):
            for term in range(len(sizes)):
                sizes[term] = self._smallest(partial(gaps, term), common.step.size)
            worst = min(gaps(term, [size])[0] for term, size in enumerate(sizes))
            if worst >= self.margin:
                break
        largest = max(sizes)
        unit = _scaled(common.unit, [size / (largest or 1.0) for size in sizes])
        return Candidate(common.sites, unit, Step(largest, worst), tuple(sizes))

    def _with_joint_steps(self, sites: Sequence[Matrix], unit: WeightEdit) -> Candidate:
        """Give each term approximately the smallest step that succeeds with the others in place."""
        wanted = (~self.skipped)[self._terms.example]

        def all_gaps(sizes: Float[Tensor, "term"]) -> Float[Tensor, "every_term"]:
            edit = _scaled(unit, sizes.tolist())
            logits = self._run.edited_logits([edit], self._terms.places)
            return self._terms.term_gaps(logits)[0]

        def gaps(copies: Float[Tensor, "copy term"]) -> Float[Tensor, "copy term"]:
            return torch.stack([all_gaps(sizes)[wanted] for sizes in copies])

        guess = self._guess(sites, unit)
        steps = smallest_steps(gaps, int(wanted.sum()), guess, self.margin)
        worst = float((all_gaps(steps.sizes) + self.margin * ~wanted).min())
        largest = float(steps.sizes.max())
        scaled = _scaled(unit, (steps.sizes / largest).tolist())
        return Candidate(sites, scaled, Step(largest, worst), tuple(steps.sizes.tolist()))

    def _smallest(self, gaps: Callable[[Sequence[float]], list[float]], guess: float) -> float:
        """The size of the smallest step that succeeds, possibly 0."""
        if gaps([0.0])[0] >= self.margin:
            return 0.0
        return smallest_step(gaps, guess, self.margin).size

    def _size(self, candidate: Candidate) -> tuple[bool, float]:
        """Sort key: success first, then the norm of the update or, without success, the gap."""
        if self.succeeds(candidate):
            return False, candidate.step.size * float(candidate.unit.norm())
        return True, -candidate.step.gap

    def _guess(self, sites: Sequence[Matrix], unit: WeightEdit) -> float:
        """The step whose change of the outputs is as large as the outputs."""
        outputs, changes = [], []
        wanted = (~self.skipped)[self._terms.example]
        at = self._terms.example[wanted], self._terms.input_at[wanted]
        for site in sites:
            x = self._run.inputs[site.name][at]
            each = site.split(x) if isinstance(site, ExpertOutputs) else [(site, x)]
            added = [
                (of_one @ g.inputs.mT) @ g.vjps
                for one, of_one in each
                if (g := unit.factors.get(one.name)) is not None
            ]
            outputs.append(self._run.outputs[site.name][at].norm(dim=-1))
            changes.append(torch.stack(added).sum(0).norm(dim=-1))
        guess = float(torch.cat(outputs).mean() / torch.cat(changes).mean())
        return guess if 0 < guess < math.inf else 1.0

    def _run_on(
        self, texts: Prompt, prepend_bos: bool | None
    ) -> tuple[WholeRun, Bool[Tensor, "batch pos"]]:
        n_ctx = self._model.cfg.n_ctx
        cut = [ids[:n_ctx] for ids in prompt_tokens(self._model, texts, prepend_bos, "right")]
        batch = batch_of_tokens(self._model, cut)
        self._runs.append(WholeRun(self._model, batch))
        return self._runs[-1], batch.mask


def _scaled(edit: WeightEdit, sizes: Sequence[float]) -> WeightEdit:
    """The edit with each term scaled by a number."""
    factors = {
        name: GradientFactors(g.inputs * g.inputs.new_tensor(sizes).unsqueeze(1), g.vjps)
        for name, g in edit.factors.items()
    }
    return WeightEdit(edit.model, factors)


def _log_probs(
    logits: Float[Tensor, "batch pos d_vocab"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "chosen d_vocab"]:
    chosen = logits[mask.to(logits.device)]
    return upcast(chosen).log_softmax(-1)
