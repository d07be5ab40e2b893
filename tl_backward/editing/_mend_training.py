"""Training MEND's networks on the edited model, without a copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from tl_backward._precision import upcast
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.run import require_ready
from tl_backward.capture.run_hooks import frozen
from tl_backward.capture.tokens import prompt_tokens, target_tokens
from tl_backward.editing._low_rank_hooks import ForwardHooks, low_rank_hooks
from tl_backward.editing._settings import require_not_negative, require_positive, require_whole
from tl_backward.editing._upper_layers import UpperLayers
from tl_backward.editing.mend import MendEditor, MendReport, mlp_sites
from tl_backward.sites import Model, all_modules, all_parameters


@runtime_checkable
class TrainingRecord(Protocol):
    """The attributes that training needs, as in :func:`tl_backward.evaluation.load_records`."""

    @property
    def prompt(self) -> str:
        """The prompt of the new target."""

    @property
    def target_new(self) -> str:
        """The new target, without a leading space."""

    @property
    def target_true(self) -> str:
        """The target of the neighbourhood prompts."""

    @property
    def paraphrase_prompts(self) -> Sequence[str]:
        """Paraphrases of the prompt."""

    @property
    def neighborhood_prompts(self) -> Sequence[str]:
        """Prompts about other subjects, whose continuations should not change."""


class _Text(NamedTuple):
    """A prompt and the target to score after it."""

    prompt: list[int]
    target: list[int]


class _Example(NamedTuple):
    """A tokenized record: the fact to edit, texts that should change, and texts to preserve."""

    edit: _Text
    outer: list[_Text]
    local: list[_Text]


def train_mend(
    model: Model,
    records: Iterable[TrainingRecord],
    *,
    layers: int | Iterable[int] | None = None,
    weights: str | Iterable[str] | None = None,
    rank: int = 1920,
    steps: int = 1000,
    batch_size: int = 10,
    lr: float = 1e-6,
    step_size_lr: float = 1e-4,
    edit_weight: float = 0.1,
    locality_weight: float = 1.0,
    clip: float = 100.0,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> MendEditor:
    """Train an editor that turns the gradient of any fact into an edit (Mitchell et al. 2022).

    Each step edits every record of a batch separately, and trains the networks for two goals: the
    new target follows the record's prompt or one of its paraphrases, and little changes after a
    neighbourhood prompt. The loss is ``edit_weight * NLL + locality_weight * KL(original ||
    edited)``. The edited outputs are ``y + (x x~^T) delta~``, so training needs neither a copy of
    the model nor second derivatives, and the layers below the edited ones run without gradient.
    Shows a progress bar after two seconds.

    The defaults are those of the published code, except ``steps``: that code trains for days. Short
    training needs a larger ``lr``, and on a CPU a smaller ``rank``.

    Args:
        model: A TransformerLens model in eval mode. It is left unchanged.
        records: CounterFact records, or others with the same attributes; not the ones used for
            evaluation.
        layers: Layers to edit; negative ones count from the last. Default: the last three.
        weights: Kinds of weights to edit. Default: those of the MLPs.
        rank: Inner width of the networks' layers.
        steps: Number of updates of the networks.
        batch_size: Number of records per update.
        lr: Adam's learning rate for the networks.
        step_size_lr: Adam's learning rate for the step sizes of the edits.
        edit_weight: Weight of the NLL in the loss.
        locality_weight: Weight of the KL divergence in the loss.
        clip: Maximum norm of the gradient of all networks together.
        seed: Seed of the initial parameters and of the record order.
        prepend_bos: As in ``model.to_tokens``.

    Returns:
        The editor, with the losses in ``editor.report``.

    Raises:
        TypeError: If the model or the records are malformed.
        ValueError: For no record, weights or layers that do not exist, settings out of range, a
            record longer than the model's context, a model in training mode, or a loss that is not
            finite.
        NotImplementedError: If a weight has no site.
        RuntimeError: Under ``torch.inference_mode``.

    Example:
        >>> records = load_records("counterfact.json")
        >>> editor = train_mend(model, records[1000:], rank=64, lr=1e-4, steps=500)
        >>> edit = editor("Lionel Messi plays for", " Paris")
    """
    require_whole(rank=rank, steps=steps, batch_size=batch_size)
    require_positive(lr=lr, step_size_lr=step_size_lr, clip=clip)
    require_not_negative(edit_weight=edit_weight, locality_weight=locality_weight)
    sites = mlp_sites(model, weights, layers)
    require_ready(model, list(all_parameters(model)))
    examples = [_example(model, record, prepend_bos) for record in records]
    if not examples:
        raise ValueError("records is empty; pass at least one record")
    editor = MendEditor(model, sites, rank, prepend_bos, seed)
    editor.networks.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [
            {"params": list(editor.networks.transforms.parameters()), "lr": lr},
            {"params": [editor.networks.step_sizes], "lr": step_size_lr},
        ]
    )
    generator, start = torch.Generator().manual_seed(seed), perf_counter()
    edit_losses, locality_losses = [], []
    for step in tqdm(range(steps), desc="MEND", delay=2, leave=False):
        chosen = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
        batch = [_drawn(examples[i], generator) for i in chosen]
        with frozen(module for _, module in all_modules(model)):
            edit_loss, locality_loss = _losses(editor, batch)
            loss = edit_weight * edit_loss + locality_weight * locality_loss
            if not loss.isfinite():
                raise ValueError(
                    f"the loss is {loss.item()} at step {step}; use a smaller lr or step_size_lr"
                )
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(editor.networks.parameters(), clip)
        optimizer.step()
        edit_losses.append(edit_loss.item())
        locality_losses.append(locality_loss.item())
    editor.networks.requires_grad_(False)
    editor.report = MendReport(
        tuple(edit_losses), tuple(locality_losses), len(examples), perf_counter() - start
    )
    return editor


def _losses(
    editor: MendEditor, batch: Sequence[_Example]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The edit loss and the locality loss of a batch, each example under its own edit."""
    model = editor.model
    texts = [example.outer[0] for example in batch] + [example.local[0] for example in batch]
    whole = batch_of_tokens(
        model, [torch.tensor(text.prompt) for text in texts], [text.target for text in texts]
    )
    rows, positions, targets, shares = _terms(texts)
    first = min(site.layer or 0 for site in editor.sites)
    n_edit = sum(len(text.target) for text in texts[: len(batch)])
    upper = UpperLayers(model, whole, (rows, positions), first)
    logits = upper.run(_edit_hooks(editor, batch))
    after, before = _log_probs(logits), _log_probs(upper.logits)
    shares = shares.to(after) / len(batch)
    nll = -after.gather(1, targets.to(after.device)[:, None]).squeeze(1)[:n_edit]
    probabilities = before[n_edit:].exp()
    ratio = (before - after)[n_edit:].masked_fill(probabilities == 0, 0)
    divergence = (probabilities * ratio).sum(-1)
    return nll @ shares[:n_edit], divergence @ shares[n_edit:]


def _edit_hooks(editor: MendEditor, batch: Sequence[_Example]) -> ForwardHooks:
    """Hooks that apply each example's edit in its two rows, one in each half of the batch."""
    edits = [example.edit for example in batch]
    each = editor.gradients([edit.prompt for edit in edits], [edit.target for edit in edits])
    hooks: ForwardHooks = []
    for i, site in enumerate(editor.sites):
        xs, deltas = zip(*(gradient[site.name] for gradient in each), strict=True)
        lengths = [len(x) for x in xs]
        editor.networks.observe(i, torch.cat(xs), torch.cat(deltas))
        new_xs, new_deltas = editor.networks(i, torch.cat(xs), torch.cat(deltas))
        u, v = (pad_sequence(new.split(lengths), batch_first=True) for new in (new_xs, new_deltas))
        hooks += low_rank_hooks(site, u.repeat(2, 1, 1), v.repeat(2, 1, 1))
    return hooks


def _terms(
    texts: Sequence[_Text],
) -> tuple[Int[Tensor, "term"], Int[Tensor, "term"], Int[Tensor, "term"], Float[Tensor, "term"]]:
    """Row, predicting position, token id and weight of each target token."""
    terms = [
        (row, len(prompt) - 1 + j, token, 1 / len(target))
        for row, (prompt, target) in enumerate(texts)
        for j, token in enumerate(target)
    ]
    rows, positions, targets, shares = zip(*terms, strict=True)
    return (
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(shares, dtype=torch.float64),
    )


def _example(model: Model, record: TrainingRecord, prepend_bos: bool | None) -> _Example:
    if not isinstance(record, TrainingRecord):
        raise TypeError(
            "records must be a list of records, as tl_backward.evaluation.load_records gives them, "
            f"got {record!r} in it"
        )
    new, true = (
        target_tokens(model, f" {target}", None)[0]
        for target in (record.target_new, record.target_true)
    )

    def after(prompts: Sequence[str], target: list[int]) -> list[_Text]:
        tokens = prompt_tokens(model, list(prompts), prepend_bos, "right")
        return [_Text(ids.tolist(), target) for ids in tokens]

    outer = after([record.prompt, *record.paraphrase_prompts], new)
    example = _Example(outer[0], outer, after(record.neighborhood_prompts, true))
    longest = max(len(text.prompt) + len(text.target) - 1 for text in [*outer, *example.local])
    if model.cfg.n_ctx is not None and longest > model.cfg.n_ctx:
        raise ValueError(
            f"records: {record.prompt!r} has a text of {longest} tokens, more than the model's "
            f"context of {model.cfg.n_ctx}; leave this record out"
        )
    return example


def _drawn(example: _Example, generator: torch.Generator) -> _Example:
    """The example with one random text of each kind."""

    def one(texts: list[_Text]) -> list[_Text]:
        return [texts[int(torch.randint(len(texts), (), generator=generator))]]

    return _Example(example.edit, one(example.outer), one(example.local))


def _log_probs(logits: Float[Tensor, "place d_vocab"]) -> Float[Tensor, "place d_vocab"]:
    return upcast(logits).log_softmax(-1)
