"""The lens as a callback of ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tl_backward._integers import is_integer
from tl_backward._user_warnings import warn_user
from tl_backward.capture.tokens import Target
from tl_backward.lens import EditReadout
from tl_backward.plotting import visible
from tl_backward.training.watch import Observation, TrainingWatch

PREFIX = "backward_lens"


class BackwardLensCallback(TrainerCallback):
    """Every so many steps, what was written since the last look and what a step would write.

    Norms and the loss of the probes go to the trainer's loggers as scalars, and the tokens as a
    Markdown table, by ``trainer.log``: to TensorBoard, Weights & Biases, trackio and whatever else
    reports, and into ``trainer.state.log_history``. At the end there is one page with a slider over
    the looks. The training run is the same to the bit with the callback and without it; what it
    needs is the time of a forward and a backward pass over the probes at each look.

    Where a look fails because weights or gradients are no longer finite, there is a warning and
    training goes on.

    Args:
        trainer: The trainer, to which the callback is added with ``trainer.add_callback``.
        prompts: Probes, as for :class:`TrainingWatch`.
        targets: What the gradient of a step goes towards.
        every: Steps between two looks; there is one before the first step and one after the last.
        tokenizer: Default: the trainer's ``processing_class``.
        html: Where to write the page at the end. Default: nowhere.
        weights, layers, k, top_k, prepend_bos: As for :class:`TrainingWatch`.

    Attributes:
        watch: The :class:`TrainingWatch` of the current run, with all that was seen; None before.

    Raises:
        TypeError: When neither the trainer nor the caller has a tokenizer.
        ValueError: When ``every`` is no positive integer.
        NotImplementedError: Under DeepSpeed and FSDP, which shard the weights.

    Example:
        >>> callback = BackwardLensCallback(trainer, "Lionel Messi plays for", " Paris", every=2)
        >>> trainer.add_callback(callback)
        >>> trainer.train()
        >>> callback.watch.to_dataframe()
    """

    def __init__(
        self,
        trainer: Any,
        prompts: str | Sequence[str],
        targets: Target,
        *,
        every: int = 100,
        tokenizer: Any = None,
        html: str | Path | None = None,
        weights: str | Iterable[str] = "W_out",
        layers: int | Iterable[int] | None = None,
        k: int = 1,
        top_k: int = 5,
        prepend_bos: bool | None = None,
    ) -> None:
        if not is_integer(every) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}")
        for name in ("deepspeed", "fsdp"):
            if getattr(trainer, f"is_{name}_enabled", False) or getattr(trainer.args, name, None):
                raise NotImplementedError(
                    f"trainer: it trains with {name}, which shards the weights, so no process has "
                    "them to read; train without it, or compare the checkpoints afterwards by "
                    "WeightEdit.from_difference"
                )
        self.tokenizer = tokenizer or getattr(trainer, "processing_class", None)
        if self.tokenizer is None:
            raise TypeError(
                "the trainer has no tokenizer; pass tokenizer=, or processing_class= to the trainer"
            )
        self.every, self.html = every, None if html is None else Path(html)
        self.watch: TrainingWatch | None = None
        self._trainer = trainer
        self._probes = prompts, targets
        self._options: dict[str, Any] = {
            "weights": weights if isinstance(weights, str) else list(weights),
            "layers": list(layers) if isinstance(layers, Iterable) else layers,
            "k": k,
            "top_k": top_k,
            "prepend_bos": prepend_bos,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look before the first step."""
        if state.is_world_process_zero:
            model = kwargs["model"]
            self.watch = TrainingWatch(model, self.tokenizer, *self._probes, **self._options)
            self._log(self.watch.observe(state.global_step), control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look every so many steps."""
        if state.global_step % self.every == 0:
            self._look(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look after the last step, and write the page."""
        if self.watch is not None and self.watch.observations[-1].step != state.global_step:
            self._look(state.global_step, control)
        if self.watch is not None and self.html is not None:
            self.watch.to_html(self.html)

    def _look(self, step: int, control: Any) -> None:
        if self.watch is None:
            return
        try:
            self._log(self.watch.observe(step), control)
        except ValueError as error:
            warn_user(f"the backward lens does not see step {step}: {error}")

    def _log(self, seen: Observation, control: Any) -> None:
        """Log, and leave to the trainer when it logs itself."""
        should_log = control.should_log
        self._trainer.log(logs_of(seen))
        control.should_log = should_log


def logs_of(seen: Observation) -> dict[str, Any]:
    """What goes to loggers of one look: scalars, and the tokens as a Markdown table."""
    step = {} if seen.would_write is None else seen.would_write.norms
    return {
        f"{PREFIX}/loss": sum(seen.losses) / len(seen.losses),
        **{f"{PREFIX}/written/{site}": norm for site, norm in seen.written_norms.items()},
        **{f"{PREFIX}/would_write/{site}": norm for site, norm in step.items()},
        f"{PREFIX}/tokens": _markdown(seen),
    }


def _markdown(seen: Observation) -> str:
    written, step = (_tokens_by_site(read) for read in (seen.written, seen.would_write))
    lines = ["| weight | written since the last look | a step would write |", "|---|---|---|"]
    for site in dict.fromkeys((*written, *step)):
        lines.append(f"| {site} | {written.get(site, '')} | {step.get(site, '')} |")
    return "\n".join(lines)


def _tokens_by_site(read: EditReadout | None) -> dict[str, str]:
    """Both ends of the leading direction of each weight."""
    if read is None:
        return {}
    found: dict[str, str] = {}
    top, bottom = read.readout.top_tokens(), read.readout.bottom_tokens()
    for i, direction in enumerate(read.directions):
        ends = (f"{sign} {_cell(end[i])}" for sign, end in (("+", top), ("-", bottom)))
        found.setdefault(direction.site, "<br>".join(ends))
    return found


def _cell(tokens: list[str]) -> str:
    return " ".join(visible(token).replace("|", "\\|") for token in tokens)
