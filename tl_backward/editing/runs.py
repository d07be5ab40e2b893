"""Forward passes that stop early, start late, or run through the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_backward._undo import Undo
from tl_backward.cache.rows import by_text
from tl_backward.capture.batch import Batch
from tl_backward.capture.recorder import Recorder
from tl_backward.capture.run_hooks import Hooks, Run, set_grad_enabled
from tl_backward.editing._expert_outputs import ExpertInputs, ExpertOutputs
from tl_backward.editing.hooks import edit_hooks
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, Tap, WeightSite, all_modules, occupy

Places: TypeAlias = tuple[Int[Tensor, "place"], Int[Tensor, "place"]]
"""Indices of texts, and positions in them."""
Matrix: TypeAlias = WeightSite | ExpertOutputs
"""A weight, or the ``W_out`` of all experts of a layer as one matrix."""
Inputs: TypeAlias = Float[Tensor, "batch pos d_in"] | ExpertInputs
LEAST_TOLERANCE = 1e-4
"""Tolerance between two float64 runs: transformers computes softmax and norms in float32."""


class _Stop(BaseException):
    """Ends a forward pass early."""


def weight_inputs(
    model: Model,
    sites: Sequence[Matrix],
    batch: Batch,
    edit: WeightEdit | None = None,
) -> dict[str, Inputs]:
    """The inputs of some weights, by site name, from a forward pass that stops at the last one.

    Args:
        model: A TransformerLens model.
        sites: Sites in the order of the forward pass.
        batch: Texts, padded on the right.
        edit: An edit to put into effect.
    """
    last = sites[-1]
    with _in_effect(edit) as hooks, Undo() as undo, undo, undo:
        recorder = _recorder(model, sites, batch, hooks, undo)
        recorder.watch(last.end if isinstance(last, ExpertOutputs) else last.x_tap(), _stop)
        try:
            batch.logits(model)
        except _Stop:
            return _inputs(recorder, sites, batch)
    raise RuntimeError(f"the forward pass did not use {sites[-1].name}")


def read_at(
    model: Model,
    points: Sequence[str],
    batch: Batch,
    positions: Int[Tensor, "batch"],
    edit: WeightEdit | None = None,
) -> list[Float[Tensor, "batch _"]]:
    """The tensors at some HookPoints at one position of each text, from a run that stops there.

    Args:
        model: A TransformerLens model.
        points: Names of the HookPoints.
        batch: Texts, padded on the right.
        positions: The position in each text.
        edit: An edit to apply by its hooks.
    """
    seen: dict[str, Tensor] = {}

    def see(point: str, x: Tensor, hook: Any) -> None:
        seen[point] = x[torch.arange(len(x)), positions.to(x.device)]
        if len(seen) == len(points):
            raise _Stop

    with Undo() as undo, undo, undo:
        occupy(model, undo)
        set_grad_enabled(False, undo)
        hooks = [] if edit is None else edit.fwd_hooks()
        hooks += [(point, partial(see, point)) for point in points]
        Run(undo).put_hooks(model, undo, hooks)
        try:
            batch.logits(model)
        except _Stop:
            return [seen[point] for point in points]
    missing = ", ".join(point for point in points if point not in seen)
    raise RuntimeError(f"the forward pass did not reach {missing}")


class WholeRun:
    """A forward pass on some texts whose block outputs let later passes start in the middle.

    Attributes:
        logits: The logits.
        inputs: Inputs of the given weights, by site name.
        outputs: Their outputs.
        n_passes: Number of passes through all layers so far.
        n_upper_passes: Number of passes through the upper layers so far.

    Args:
        model: A TransformerLens model.
        batch: Texts, padded on the right.
        sites: Weights whose inputs and outputs to keep.
        edit: An edit to put into effect, in this pass only.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        sites: Sequence[Matrix] = (),
        edit: WeightEdit | None = None,
    ) -> None:
        self._model, self._batch = model, batch
        self._block_outputs: list[Any] = []
        self._agrees: dict[int, bool] = {}
        with _in_effect(edit) as hooks, Undo() as undo, undo, undo:
            recorder = _recorder(model, sites, batch, hooks, undo)
            for block in model.blocks:
                recorder.watch(Tap(block, "output"), self._block_outputs.append)
            self.logits: Float[Tensor, "batch pos d_vocab"] = batch.logits(model)
        self.inputs = _inputs(recorder, sites, batch)
        self.outputs = {site.name: _first(recorder, (site.name, "y"), batch) for site in sites}
        self.n_passes, self.n_upper_passes = 1, 0

    def edited_logits(
        self, edits: Sequence[WeightEdit], places: Places | None = None
    ) -> Float[Tensor, "edit *batch_and_pos d_vocab"]:
        """The logits of the same texts with each of several edits, in one batch.

        With ``places``, returns ``[edit, place, d_vocab]`` and unembeds only those, unless there
        are hooks at the unembedding.

        The blocks below the lowest edited layer return their outputs of the whole run. The first
        call for each layer checks that the upper blocks need nothing else, with an unedited copy of
        the texts in the batch; if its logits differ, passes run through all layers. Edits
        without hooks are applied one by one, each for a whole pass.
        """
        if not all(edit.is_hookable for edit in edits):
            return torch.stack([self._applied(edit, places) for edit in edits])
        layers = [site.layer or 0 for e in edits for site, _ in e.at_sites().values()]
        first = min(layers, default=0)
        if len(self._block_outputs) != len(self._model.blocks):  # some blocks run several times
            first = 0
        if first == 0 or self._agrees.get(first) is False:
            self.n_passes += 1
            return self._run(edits, 0, places, with_control=False)
        self.n_upper_passes += 1
        if self._agrees.get(first):
            return self._run(edits, first, places, with_control=False)
        control, logits = self._run(edits, first, places, with_control=True).split([1, len(edits)])
        expected = self.logits if places is None else self.logits[places]
        tolerance = max(torch.finfo(expected.dtype).eps ** 0.5, LEAST_TOLERANCE)
        error = (control[0] - expected).norm() / expected.norm()
        self._agrees[first] = bool(error <= tolerance)
        return logits if self._agrees[first] else self.edited_logits(edits, places)

    def _applied(
        self, edit: WeightEdit, places: Places | None
    ) -> Float[Tensor, "*batch_and_pos d_vocab"]:
        self.n_passes += 1
        with edit.applied(), Undo() as undo, undo, undo:
            occupy(self._model, undo)
            set_grad_enabled(False, undo)
            if places is not None:
                return logits_at(self._model, self._batch, places)[0]
            return self._batch.logits(self._model)

    def _run(
        self,
        edits: Sequence[WeightEdit],
        first: int,
        places: Places | None,
        with_control: bool,
    ) -> Float[Tensor, "copies *batch_and_pos d_vocab"]:
        of_copies = torch.arange(-1 if with_control else 0, len(edits))
        rows = of_copies.repeat_interleave(len(self._batch)) if len(of_copies) > 1 else None
        with Undo() as undo, undo, undo:
            occupy(self._model, undo)
            set_grad_enabled(False, undo)
            run = Run(undo)
            hooks = edit_hooks(self._model, edits, rows)
            below = zip(self._model.blocks[:first], self._block_outputs, strict=False)
            for block, output in below:
                _return_at_once(block, _repeated(output, len(of_copies)), run, undo)
            copies = self._batch.repeated(len(of_copies))
            if places is not None:
                return logits_at(self._model, copies, places, hooks, len(of_copies))
            run.put_hooks(self._model, undo, hooks)
            logits = copies.logits(self._model)
            return rearrange(logits, "(copy b) pos token -> copy b pos token", copy=len(of_copies))


def logits_at(
    model: Model,
    batch: Batch,
    places: Places,
    fwd_hooks: Hooks = (),
    copies: int = 1,
) -> Float[Tensor, "copies place d_vocab"]:
    """The logits at some places of each copy of a batch, from one forward pass.

    Unembeds only these places, unless there are hooks at the unembedding.
    """
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        points = [model.hook_dict[f"unembed.hook_{side}"] for side in ("in", "out")]
        gathered = not any(point.fwd_hooks for point in points)
        gather = [("unembed.hook_in", partial(_at_places, places, copies))] * gathered
        Run(undo).put_hooks(model, undo, [*fwd_hooks, *gather])
        logits = batch.logits(model)
    return logits if gathered else _at_places(places, copies, logits)


def _at_places(
    places: Places, copies: int, x: Float[Tensor, "copies_and_batch pos d"], hook: Any = None
) -> Float[Tensor, "copies place d"]:
    texts, positions = places
    return rearrange(x, "(copy b) pos d -> copy b pos d", copy=copies)[:, texts, positions]


def _recorder(
    model: Model,
    sites: Sequence[Matrix],
    batch: Batch,
    hooks: Hooks,
    undo: Undo,
) -> Recorder:
    """A recorder of the inputs and outputs of some weights, in a run with hooks."""
    occupy(model, undo)
    set_grad_enabled(False, undo)
    run = Run(undo)
    run.put_hooks(model, undo, hooks)
    run.step_aside_for_others((module for _, module in all_modules(model)), undo)
    recorder = Recorder(run, len(batch))
    for site in sites:
        if isinstance(site, ExpertOutputs):
            site.watch(recorder)
        else:
            recorder.keep_value(site.x_tap(), (site.name, "x"))
            recorder.keep_value(site.y_tap(), (site.name, "y"))
    return recorder


def _in_effect(edit: WeightEdit | None) -> AbstractContextManager[Hooks]:
    return nullcontext(()) if edit is None else edit.in_effect()


def _inputs(recorder: Recorder, sites: Sequence[Matrix], batch: Batch) -> dict[str, Inputs]:
    return {
        site.name: site.inputs(recorder, len(batch))
        if isinstance(site, ExpertOutputs)
        else _first(recorder, (site.name, "x"), batch)
        for site in sites
    }


def _first(recorder: Recorder, key: tuple[str, str], batch: Batch) -> Float[Tensor, "batch pos _"]:
    """The recorded tensor, from the first use."""
    return by_text(recorder.values(key)[0], len(batch))


def _stop(*_: Any) -> None:
    raise _Stop


@contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Context in which the module's forward pass returns ``output`` without computing."""
    with Undo() as undo, undo, undo:
        _return_at_once(module, output, Run(undo), undo)
        yield


def _return_at_once(module: nn.Module, output: Any, run: Run, undo: Undo) -> None:
    """Make a module's forward pass return ``output`` during a run, without computing."""
    attributes, forward = vars(module), module.forward
    undo.add(_put_back, attributes, {n: attributes[n] for n in ("forward",) if n in attributes})
    attributes["forward"] = lambda *args, **kwargs: (
        output if run.may_own(output) else forward(*args, **kwargs)
    )


def _put_back(attributes: dict[str, Any], forward: dict[str, Any]) -> None:
    attributes.pop("forward", None)
    attributes.update(forward)


def _repeated(output: Any, copies: int) -> Any:
    """A block's output for several copies of the batch."""
    if isinstance(output, Tensor):
        return output.repeat(copies, *[1] * (output.ndim - 1))
    if isinstance(output, tuple):
        return tuple(_repeated(part, copies) for part in output)
    return output
