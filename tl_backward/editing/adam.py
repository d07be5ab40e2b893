"""The fine-tuning baseline of the editing papers: Adam on one W_out, bounded or not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import upcast, upcast_dtype
from tl_backward.capture.run import require_ready
from tl_backward.capture.run_hooks import frozen
from tl_backward.capture.tokens import Prompt, Target
from tl_backward.editing._low_rank_hooks import low_rank_hooks
from tl_backward.editing._mlp_outputs import w_out_sites
from tl_backward.editing._settings import require_positive, require_whole
from tl_backward.editing._upper_layers import UpperLayers
from tl_backward.editing.gradient_step import FineTuneReport
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, all_modules, all_parameters

ENOUGH = 0.01
"""Fine-tuning ends when the mean loss falls below this, in nats."""


def adam_fine_tune(
    model: Model,
    prompt: Prompt,
    target: Target,
    *,
    layer: int,
    lr: int | float = 5e-4,
    steps: int = 25,
    bound: float | None = None,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Adam on one layer's W_out until the target is nearly certain: a baseline for editors.

    The loss is the target's negative log-likelihood, averaged over its tokens (teacher-forced) and
    summed over prompts; fine-tuning ends when its mean over prompts is below 0.01. The weight
    itself is not changed, and the layers below run once. ``bound`` limits the change of every
    element of W_out, which keeps the edit small (FT+L in the papers). Adam's update is not
    low-rank: its factors are as large as W_out.

    Args:
        model: A TransformerLens model in eval mode.
        prompt: Text or token ids of one prompt or several.
        target: The target to fine-tune towards, one for all prompts or a list with one per prompt.
        layer: The layer of W_out; negative ones count from the last.
        lr: Adam's learning rate.
        steps: Maximum number of steps.
        bound: Maximum change of any element. Default: unbounded.
        prepend_bos: As in ``model.to_tokens``. Default: the model's setting.

    Returns:
        The edit, not applied, with a :class:`FineTuneReport` in ``edit.report``.

    Raises:
        TypeError: If model, prompt or target is malformed.
        ValueError: For a layer that does not exist, settings out of range, a model in training
            mode, or a loss that is not finite.
        NotImplementedError: If the layer has no W_out, or several (mixtures of experts).
        RuntimeError: Under ``torch.inference_mode``.

    Example:
        >>> edit = adam_fine_tune(model, "Lionel Messi plays for", " Paris", layer=20, bound=5e-4)
        >>> edit.report.losses
    """
    require_positive(lr=lr, **({} if bound is None else {"bound": bound}))
    require_whole(steps=steps)
    (site,) = w_out_sites(model, [layer])
    require_ready(model, list(all_parameters(model)))
    terms = TargetTerms(model, prompt, target, -1, "all", prepend_bos)
    upper = UpperLayers(model, terms.batch, terms.places, site.layer or 0)
    dtype = upcast_dtype(site.parameter.dtype)
    device = upper.logits.device
    change = torch.zeros(site.d_in, site.d_out, dtype=dtype, device=device, requires_grad=True)
    identity = torch.eye(site.d_out, dtype=dtype, device=device)
    adam = torch.optim.Adam([change], lr=lr)
    losses: list[Tensor] = []
    with frozen(module for _, module in all_modules(model)):
        while True:
            logits = upper.run(low_rank_hooks(site, change.mT[None], identity[None]))
            prompt_losses = _losses(terms, logits)
            losses.append(prompt_losses.detach())
            if not prompt_losses.isfinite().all():
                raise ValueError(
                    f"the loss is {prompt_losses.sum().item()} after {len(losses) - 1} steps; use "
                    "a smaller lr"
                )
            if prompt_losses.mean() < ENOUGH or len(losses) > steps:
                break
            (change.grad,) = torch.autograd.grad(prompt_losses.sum(), change)
            adam.step()
            if bound is not None:
                change.data.clamp_(-bound, bound)
    predicted = terms.gaps(logits.detach()[None])[0] > 0
    report = FineTuneReport(
        len(losses) - 1,
        tuple(predicted.tolist()),
        tuple(map(tuple, torch.stack(losses, dim=1).tolist())),
    )
    factors = GradientFactors(change.detach().mT, identity)
    return WeightEdit(model, {site.name: factors} if len(losses) > 1 else {}, report)


def _losses(terms: TargetTerms, logits: Float[Tensor, "term d_vocab"]) -> Float[Tensor, "batch"]:
    """The mean negative log-likelihood of the target's tokens, per prompt."""
    log_probs = upcast(logits).log_softmax(-1)
    nll = -log_probs.gather(1, terms.ids.to(logits.device)[:, None]).squeeze(1)
    of_prompt = terms.example.to(logits.device)
    total = nll.new_zeros(len(terms.batch)).index_add(0, of_prompt, nll)
    return total / of_prompt.bincount(minlength=len(terms.batch))
