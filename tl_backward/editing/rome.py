"""ROME: one fact, written into one layer at the subject's last token (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tl_backward.capture.tokens import Target
from tl_backward.editing._kernel import kernel, update
from tl_backward.editing._mlp_outputs import w_out_sites
from tl_backward.editing._subject_facts import read_subjects, subject_facts
from tl_backward.editing._value_search import SearchSettings, search_values
from tl_backward.editing.contexts import checked_templates, rome_contexts
from tl_backward.editing.editor_report import report_of
from tl_backward.editing.key_statistics import KeyStatistics, require_statistics
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, require_eval_mode


def rome(
    model: Model,
    prompt: str,
    target: Target,
    *,
    subject: str,
    layer: int,
    statistics: KeyStatistics | None,
    contexts: Sequence[str] | None = None,
    steps: int = 20,
    lr: int | float = 0.5,
    decay: int | float = 0.5,
    kl: int | float = 0.0625,
    clamp: int | float = 4.0,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Make a target follow a prompt with ROME's rank-one update of one W_out.

    At the subject's last token of the plain prompt, W_out then outputs the value ``v* = v0 + d``
    that makes the target probable. The update is ``dW = outer(C^-1 k, v* - v) / (x . C^-1 k)``,
    with the input ``x`` and output ``v`` at that token, and the mean ``k`` of its inputs in all
    contexts. The defaults are those of the published code for GPT-2 XL (layer 17 there).

    Args:
        model: A TransformerLens model in eval mode. It is left unchanged: see :class:`WeightEdit`.
        prompt: Text that contains the subject, or ``{}`` in its place.
        target: Text (mind the leading space) or token ids.
        subject: The subject of the fact. If the prompt contains it several times, the last one
            counts.
        layer: The layer of W_out; negative ones count from the last.
        statistics: ``C``, from :func:`key_statistics`, with ``ridge=0`` as in the published code.
            None for no whitening.
        contexts: Templates with ``{}`` for the prompt; the first one gives ``v0``. Default: the
            plain prompt, and the prompt after twenty short texts that the model generates, always
            the same ones. For many edits of one model, generate them once with
            :func:`rome_contexts`.
        steps: Maximum number of forward passes of the search, from the edited layer upwards; Adam
            makes one update fewer. The search ends when the loss is below 0.05.
        lr: Adam's learning rate.
        decay: Weight of ``|d| / |v0|^2`` in the loss.
        kl: Weight of the KL divergence from the unedited model after "{subject} is a".
        clamp: Maximum ``|d|``, in units of ``|v0|``.
        prepend_bos: As in ``model.to_tokens``; the published code uses none for GPT-2. Default: the
            model's setting.

    Returns:
        The edit, not applied, with an :class:`EditorReport` in ``edit.report``.

    Raises:
        TypeError: If model, prompt, target, subject or contexts are malformed.
        ValueError: For a subject that is not in the prompt, an empty target, a layer that does not
            exist, settings out of range, statistics of another layer or model, a singular ``C``,
            texts that are too long, a model in training mode or without tokenizer, or a loss that
            is not finite from the start.
        NotImplementedError: If the layer has no W_out, or several (mixtures of experts).
        RuntimeError: Under ``torch.inference_mode``.

    Warns:
        UserWarning: If the prompt contains the subject several times; if the loss of a later step
            is not finite (the search keeps the value with the smallest loss so far).

    Example:
        >>> statistics = key_statistics(model, texts, 5, ridge=0)
        >>> edit = rome(model, "Lionel Messi plays for", " Paris", subject="Lionel Messi", layer=5,
        ...             statistics=statistics)
        >>> edit.report.losses, edit.report.change_norms
    """
    settings = SearchSettings(steps, lr, decay, kl, clamp)
    (site,) = w_out_sites(model, [layer])
    require_eval_mode(model)
    if statistics is not None:
        require_statistics(statistics, model, [site])
    templates = checked_templates(rome_contexts(model) if contexts is None else contexts)
    facts = subject_facts(model, [prompt], [target], [subject], templates, prepend_bos)
    hook_in, hook_out = site.hook_points
    values = search_values(model, facts, hook_out, site.layer or 0, settings)
    x, v = read_subjects(model, [hook_in, hook_out], [facts[0].plain])
    (each,) = read_subjects(model, [hook_in], facts[0].in_contexts)
    key = each.mean(0, keepdim=True)
    metric = None if statistics is None else partial(statistics.solve, site.name)
    rows = kernel(key, metric, probes=x)
    factors = update(rows, values.initial + values.change - v)
    report = report_of([site], facts, values, {site.name: key})
    return WeightEdit(model, {site.name: factors}, report)
