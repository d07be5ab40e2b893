"""One forward and one backward pass, and from them the two factors of every weight gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.cache import BackwardCache
from tl_backward.cache.rows import Positions, Rows, kept_positions
from tl_backward.capture._backward_hooks import GuardedHooks
from tl_backward.capture._residual_stream import needs_graph, residual_from, watch_residual
from tl_backward.capture.objectives import (
    Loss,
    Objective,
    losses_of_examples,
    require_loss,
    target_nll,
)
from tl_backward.capture.recorder import Recorder, depends_on
from tl_backward.capture.tokens import (
    Prompt,
    Target,
    decode_each,
    is_single,
    pad_id,
    padded,
    padding_side_of,
    prompt_tokens,
    single_token_ids,
    target_tokens,
)
from tl_backward.factors import GradientFactors
from tl_backward.sites import (
    Model,
    WeightSite,
    all_parameters,
    attached_hook_points,
    left_padding_obstacle,
    passed_if_hooked,
    require_eval_mode,
    weight_sites,
    weights_processing,
)

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class CaptureOptions(TypedDict, total=False):
    """Arguments of :func:`run_with_backward_cache` that other functions pass on to it."""

    loss_fn: Loss | None
    prepend_bos: bool | None
    padding_side: Literal["left", "right"] | None
    fwd_hooks: Hooks
    bwd_hooks: Hooks


def run_with_backward_cache(
    model: Model,
    prompt: Prompt,
    target: Target | None = None,
    *,
    loss_fn: Loss | None = None,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    per_head: bool = False,
    device: str | torch.device | None = None,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
) -> tuple[Float[Tensor, "*batch"], BackwardCache]:
    """Run the model forward and backward once and keep the factors of its weight gradients.

    The backward pass computes vector-Jacobian products only: no weight gradient is formed, none is
    stored in ``.grad``, and it stops at the first weight that was asked for. Parameters may be
    frozen. Hooks that are on the model take part and stay. What a backward hook returns takes the
    VJP's place, and the factors of all weights upstream of the hook follow from it.

    Of several prompts, each has a loss of its own, and gets what it would get alone; padding has no
    rows in the factors.

    Args:
        model: A TransformerLens model in eval mode.
        prompt: Text or token ids (to which nothing is prepended), of one prompt or, in a list, of
            several; or all that a tokenizer returned, whose ``attention_mask`` tells text from
            padding. A tensor alone may be padded with the tokenizer's pad token, the rows of a list
            are not. A pad token with another role, as in GPT-2, is padding on ``padding_side``,
            with a warning; one that is nothing else is padding at both ends.
        target: What to differentiate towards: the loss is the negative log-likelihood of these
            tokens after the prompt, mean over them. Text or token ids, one for all prompts, or one
            for each in a list. Of a target of several tokens all but the last are appended to the
            prompt (teacher forcing); ``cache.target_positions`` says which positions predict it.
        loss_fn: Instead of a target: ``loss_fn(logits, tokens)`` with ``[batch, pos, d_vocab]``
            logits and the ``[batch, pos]`` tokens, both without padding, that returns one loss for
            each text, shape ``[batch]``. It sees all prompts at once where they are of one length,
            and each alone otherwise. Made for it: :func:`logit_diff`, :func:`kl_divergence` and
            :func:`lm_cross_entropy_loss`.
        weights: Kinds of weights to capture, such as ``"W_out"``. Default: all.
        layers: Layers to capture; negative ones count from the last. Default: all.
        positions: Positions of every prompt to keep in the factors: an index, a slice or a list of
            indices, and a tuple for a slice, as in TransformerLens. The factors then stand for
            these tokens' part of the gradient. Default: all.
        per_head: Keep what each attention head contributes to the VJP at the residual stream, for
            ``cache.stack_head_vjps``. Costs a backward pass through attention for every head, in
            which no backward hook may be.
        device: Where the cache is kept, as in ``model.run_with_cache``. Inputs are moved there as
            the forward pass goes on and VJPs as the backward pass does, layer by layer, so that the
            model's device never holds all of them. Default: where they arise.
        prepend_bos: As in ``model.to_tokens``. Default: the model's own setting. Of a tensor that
            is padded on the left with a pad token that is BOS, too, it says whether each row begins
            with BOS.
        padding_side: On which side a tensor of prompts is padded, and shorter prompts are for the
            run. Default: the tokenizer's setting.
        fwd_hooks: Pairs of a HookPoint's name (or a function that selects names) and a hook, as in
            ``model.run_with_hooks``: on the model for this run only. On a ``HookedTransformer``,
            names that :func:`add_hook_points` adds work without it.
        bwd_hooks: The same for the backward pass. ``hook(vjp, hook=...)`` returns a tensor shaped
            like ``vjp``, or None to leave it; it may edit ``vjp`` in place. At padding the VJP
            stays 0, whatever it returns, wherever there is an axis of positions.

    Returns:
        The loss, detached (a scalar, or one for each prompt of a list), and the cache of factors.

    Raises:
        TypeError: When the model is no TransformerLens model, or prompt, target or loss is
            malformed.
        ValueError: For an empty or too long prompt, targets that are not as many as the prompts, a
            weight, layer or position that does not exist, training mode where it changes something
            (an active dropout, say), a loss that has the wrong shape or is detached or not finite,
            VJPs that are not finite, and a backward hook that returns something else than such a
            VJP.
        NotImplementedError: As :func:`weight_sites`, and for ``per_head=True`` with a backward hook
            between the beginning of a block and the outputs of its heads.
        RuntimeError: Under ``torch.inference_mode()``.

    Warns:
        UserWarning: When every VJP of an example is zero: a ``loss_fn`` may be flat there, as a
            saturated probability is, or may have detached the loss of this example. When pad tokens
            of a tensor may as well be text. When a target seems to lack its leading space.

    Example:
        >>> loss, cache = run_with_backward_cache(model, "Lionel Messi plays for", " Paris")
        >>> cache["W_out", 5].norm()
        >>> losses, cache = run_with_backward_cache(model, [one, another], [" Paris", " Rome"])
        >>> cache["W_out", 5].example(1).norm()
    """
    sites = weight_sites(model, weights, layers)
    parameters = list(all_parameters(model))
    require_ready(model, parameters)
    if (target is None) == (loss_fn is None):
        raise ValueError("pass either target= or loss_fn=, what to differentiate")
    if loss_fn is not None:
        require_loss(loss_fn)
    side = padding_side_of(model, padding_side)
    single = is_single(prompt)
    texts = prompt_tokens(model, prompt, prepend_bos, side)
    n_prompts = None if single else len(texts)
    if target is None:
        targets: list[list[int]] = [[]] * len(texts)
    else:
        targets = target_tokens(model, target, n_prompts, after=texts)
    target_positions = [
        torch.arange(len(text) - 1, len(text) - 1 + len(ids))
        for text, ids in zip(texts, targets, strict=True)
    ]
    texts = [
        torch.cat([text, text.new_tensor(ids[:-1])])
        for text, ids in zip(texts, targets, strict=True)
    ]
    _require_room(model, texts, targets, single)
    if isinstance(loss_fn, Objective):
        loss_fn = loss_fn.resolved(
            lambda argument, value: single_token_ids(model, argument, value, n_prompts, texts),
            [len(text) for text in texts],
        )
    tokens, mask = padded(texts, pad_id(model), side)
    if side == "left" and not mask.all():
        _require_left_padding(model)
    starts = [0 if side == "right" else tokens.shape[1] - len(text) for text in texts]
    kept = [
        kept_positions(positions, len(text), None if single else b) for b, text in enumerate(texts)
    ]
    rows = Rows(single, tokens.shape[1], starts, kept)

    with frozen(parameters), torch.enable_grad():
        with ExitStack() as of_this_run:
            of_this_run.enter_context(attached_hook_points(model))
            fwd_hooks = [*fwd_hooks, *((name, _look_on) for name in passed_if_hooked(model))]
            of_this_run.enter_context(model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=list(bwd_hooks)))
            guarded = of_this_run.enter_context(GuardedHooks(model, mask))
            recorder = Recorder(len(texts), None if device is None else torch.device(device))
            of_this_run.enter_context(recorder)
            _watch_weights(recorder, sites)
            after = None if layers is None else min(site.layer or 0 for site in sites)
            if all(site.kind == "W_U" for site in sites):
                after = model.cfg.n_layers
            watched = watch_residual(recorder, model, after, per_head)
            tokens = tokens.to(model.cfg.device)
            logits = model(tokens, return_type="logits", **_padding(model, mask, side))
        losses = losses_of_examples(
            target_nll(targets) if loss_fn is None else loss_fn,
            logits,
            [slice(start, start + len(text)) for start, text in zip(starts, texts, strict=True)],
            tokens,
        )
        _require_used(recorder, sites)
        vjps = recorder.backward(losses.sum(), retain_graph=needs_graph(recorder, watched))
        guarded.are_done = True
        _require_finite(sites, vjps, side)
        if logits.requires_grad and loss_fn is not None and not isinstance(loss_fn, Objective):
            _notice_flat(losses, logits, vjps)
        residual = residual_from(recorder, watched, vjps, rows)
        factors = {site.name: _factors_of(recorder, site, vjps, rows) for site in sites}
        behind_norms = {
            site.name: rows.of(vjps[site.name, "residual"])
            for site in sites
            if site.residual_tap is not None
        }

    losses = losses.detach() if device is None else losses.detach().to(device)
    whole = partial(_single_or_batch, single=single)
    cache = BackwardCache(
        factors=factors,
        behind_norms=behind_norms,
        residual=residual,
        weights_processing=weights_processing(model),
        tokens=whole(texts),
        str_tokens=whole([decode_each(model, text.tolist()) for text in texts]),
        positions=whole(kept),
        target_ids=_target_ids(targets, single),
        target_positions=whole(target_positions),
        loss=whole(losses),
    )
    return cache.loss, cache


def _look_on(tensor: Tensor, hook: Any) -> None:
    """A hook that has a HookPoint passed, and does nothing."""


def _watch_weights(recorder: Recorder, sites: Sequence[WeightSite]) -> None:
    for site in sites:
        recorder.keep_value(site.x_tap(), site.name)
        recorder.keep_place(site.y_tap(), (site.name, "y"))
        if site.residual_tap is not None:
            recorder.keep_place(site.residual_tap(), (site.name, "residual"))


def _factors_of(
    recorder: Recorder, site: WeightSite, vjps: Mapping[Any, list[Tensor]], rows: Rows
) -> GradientFactors:
    x, y = [site.encode(one) for one in recorder.values(site.name)], vjps[site.name, "y"]
    if site.padding_row is not None:
        for one in x:
            one[..., site.padding_row] = 0
    return GradientFactors(rows.of(x), rows.of(y), rows.lengths(len(x)))


def _require_used(recorder: Recorder, sites: Sequence[WeightSite]) -> None:
    for site in sites:
        if not recorder.places[site.name, "y"]:
            raise RuntimeError(f"{site.name} took no part in the forward pass")


def _require_finite(
    sites: Sequence[WeightSite], vjps: Mapping[Any, list[Tensor]], side: str
) -> None:
    places = [(site.name, vjp) for site in sites for vjp in vjps[site.name, "y"]]
    device = places[0][1].device
    sums = torch.stack(
        [
            vjp.sum(dtype=torch.promote_types(vjp.dtype, torch.float32)).to(device)
            for _, vjp in places
        ]
    )
    if not sums.isfinite().all():
        name = places[int(sums.isfinite().logical_not().nonzero()[-1])][0]
        advice = "padding_side='right', or " if side == "left" else ""
        raise ValueError(
            f"the VJPs at {name} are not finite, though the loss is; try {advice}a higher "
            "precision, and check loss_fn and the hooks on the model"
        )


def _notice_flat(losses: Tensor, logits: Tensor, vjps: Mapping[Any, list[Tensor]]) -> None:
    """A zero gradient is right for a saturated loss, and wrong for one that was detached."""
    flat = torch.ones(len(losses), dtype=torch.bool)
    for vjp in chain.from_iterable(vjps.values()):
        flat &= vjp.reshape(len(losses), -1).eq(0).all(1).cpu()
        if not flat.any():
            return
    if not depends_on(losses, logits):
        raise ValueError(
            "loss_fn returned a tensor that does not depend on the logits; compute it from them"
        )
    examples = ", ".join(str(b) for b in flat.nonzero().flatten().tolist())
    warnings.warn(
        f"all VJPs of example {examples} are zero: loss_fn is flat at its logits, or has detached "
        "the loss from them",
        stacklevel=3,
    )


def _require_room(
    model: Model, texts: Sequence[Tensor], targets: Sequence[Sequence[int]], single: bool
) -> None:
    n_ctx = model.cfg.n_ctx
    for b, (text, ids) in enumerate(zip(texts, targets, strict=True)):
        if n_ctx is not None and len(text) > n_ctx:
            which = "" if single else f" (example {b})"
            appended = len(ids[:-1])
            and_target = f" and {appended} of its target" if appended else ""
            raise ValueError(
                f"prompt{which} has {len(text) - appended} tokens{and_target}, more than the "
                f"model's context of {n_ctx}; shorten it"
            )


def _require_left_padding(model: Model) -> None:
    reason = left_padding_obstacle(model)
    if reason is not None:
        raise NotImplementedError(
            f"prompts of different lengths, padding_side='left': {reason}; pass "
            "padding_side='right', which gives every text what it gets alone"
        )


def _padding(model: Model, mask: Int[Tensor, "batch pos"], side: str) -> dict[str, Any]:
    """How to tell the model which positions are padding.

    A causal model does not see what is to the right of a text.
    """
    if mask.all():
        return {}
    arguments: dict[str, Any] = {} if model.tokenizer is None else {"padding_side": side}
    if side == "left":
        arguments["attention_mask"] = mask.to(model.cfg.device)
    return arguments


def _single_or_batch(each: Any, single: bool) -> Any:
    return each[0] if single else each


def _target_ids(targets: Sequence[Sequence[int]], single: bool) -> Int[Tensor, "..."]:
    """The targets in one tensor; -1 fills up those with fewer tokens than others."""
    longest = max(map(len, targets))
    ids = torch.tensor([[*of, *[-1] * (longest - len(of))] for of in targets], dtype=torch.long)
    ids = ids.squeeze(1) if longest == 1 else ids
    return ids[0] if single else ids


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Freeze the parameters, so that the graph holds no path to a weight gradient."""
    thawed = []
    try:
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                thawed.append(parameter)
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def require_ready(model: Model, parameters: Sequence[Tensor]) -> None:
    """Make sure that a backward pass is possible and that dropout is off.

    Raises:
        RuntimeError: Under ``torch.inference_mode``.
        ValueError: In training mode.
    """
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in parameters):
        raise RuntimeError(
            "there is no backward pass under torch.inference_mode(), nor through weights made "
            "under it; leave that block (torch.no_grad() is fine), or load the model outside it"
        )
    require_eval_mode(model)
