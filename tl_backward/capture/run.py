"""One forward and one backward pass give the two factors of every weight gradient."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import upcast_dtype
from tl_backward._undo import Undo
from tl_backward.cache import BackwardCache
from tl_backward.cache.rows import Positions, Rows, kept_positions
from tl_backward.capture._backward_hooks import GuardedHooks
from tl_backward.capture._experts import (
    factors_by_expert,
    mixtures_of,
    routing_of,
    watch_mixture,
)
from tl_backward.capture._residual_stream import needs_graph, residual_from, watch_residual
from tl_backward.capture._unembedding import last_positions
from tl_backward.capture.batch import Batch, batch_of
from tl_backward.capture.objectives import (
    Loss,
    Objective,
    losses_of_examples,
    require_loss,
    target_nll,
)
from tl_backward.capture.recorder import Recorder, depends_on
from tl_backward.capture.run_hooks import Hooks, Run, freeze, run_uncompiled, set_grad_enabled
from tl_backward.capture.tokens import Prompt, Target, decode_each, single_token_ids
from tl_backward.factors import GradientFactors
from tl_backward.sites import (
    FoundSites,
    Mixture,
    Model,
    WeightSite,
    all_modules,
    find_sites,
    layer_numbers,
    lazy_hook_points,
    occupy,
    require_eval_mode,
    weights_processing,
)


class CaptureOptions(TypedDict, total=False):
    """Arguments that other functions pass on to :func:`run_with_backward_cache`."""

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

    The backward pass computes vector-Jacobian products only: it forms no weight gradient, stores
    nothing in ``.grad``, and stops at the first requested weight. Parameters may be frozen. Hooks
    already on the model take part and stay. The return value of a backward hook replaces the VJP,
    and the factors of all weights upstream of the hook follow from it.

    With several prompts, each has its own loss and gets the same result as alone; the factors have
    no rows for padding.

    Args:
        model: A TransformerLens model in eval mode.
        prompt: Text or token ids (taken as they are) of one prompt, a list of several, or a
            tokenizer's output, whose ``attention_mask`` marks padding. A tensor may be padded with
            the tokenizer's pad token; rows of a list may not. A dedicated pad token is padding at
            both ends. A pad token with another role, as in GPT-2, is padding on ``padding_side``
            only, with a warning.
        target: Text or token ids, one for all prompts or a list with one per prompt. The loss is
            the negative log-likelihood of these tokens after the prompt, averaged over the tokens.
            All but the last token of a target are appended to the prompt (teacher forcing);
            ``cache.target_positions`` holds the positions that predict the target.
        loss_fn: Instead of a target: ``loss_fn(logits, tokens)`` takes ``[batch, pos, d_vocab]``
            logits and ``[batch, pos]`` tokens, both without padding, and returns one loss per text,
            shape ``[batch]``. Called once per batch if all prompts have equal length, otherwise
            once per prompt. See :func:`logit_diff`, :func:`kl_divergence` and
            :func:`lm_cross_entropy_loss`.
        weights: Kinds of weights to capture, such as ``"W_out"``, or ``()`` for none. Default: all.
        layers: Layers to capture; negative ones count from the last. Default: all.
        positions: Positions of every prompt to keep in the factors: an index, a slice, a list of
            indices, or a tuple for a slice, as in TransformerLens. The factors then stand for the
            part of the gradient from these tokens. Default: all.
        per_head: Keep the contribution of each attention head to the VJP at the residual stream,
            for ``cache.stack_head_vjps``. Costs a backward pass through attention per head, which
            must not meet a backward hook.
        device: Device of the cache, as in ``model.run_with_cache``. Inputs move there during the
            forward pass and VJPs during the backward pass, layer by layer, so the model's device
            never holds all of them. Default: tensors stay where they are computed.
        prepend_bos: As in ``model.to_tokens``. Default: the model's own setting. For a tensor
            padded on the left with a pad token that is also BOS, says whether each row begins with
            BOS.
        padding_side: Side on which a tensor of prompts is padded, and on which shorter prompts are
            padded for the run. Default: the tokenizer's setting.
        fwd_hooks: Pairs of a HookPoint's name (or a function that selects names) and a hook, as in
            ``model.run_with_hooks``, active during this run only. On a ``HookedTransformer``, the
            names that :func:`add_hook_points` adds work without calling it.
        bwd_hooks: The same for the backward pass. ``hook(vjp, hook=...)`` returns a tensor shaped
            like ``vjp``, or None to leave it; it may edit ``vjp`` in place. At padding the VJP
            stays 0 whatever the hook returns, wherever there is a position axis.

    Returns:
        The detached loss (a scalar, or one per prompt for a list), and the cache of factors.

    Raises:
        TypeError: If ``model`` is not a TransformerLens model, or prompt, target or loss is
            malformed.
        ValueError: For an empty or too long prompt; a number of targets that differs from the
            number of prompts; a weight, layer or position that does not exist; training mode that
            changes the result (e.g. active dropout); a loss that has the wrong shape, is detached
            or not finite; VJPs that are not finite; and a backward hook whose return value does not
            match its VJP.
        NotImplementedError: As :func:`weight_sites`, and for ``per_head=True`` with a backward hook
            between the beginning of a block and the outputs of its heads.
        RuntimeError: Under ``torch.inference_mode()``.

    Warns:
        UserWarning: If every VJP of an example is zero, because ``loss_fn`` is flat there (e.g. a
            saturated probability) or detached the loss of this example; if pad tokens of a tensor
            might be text; if a target seems to lack its leading space.

    Example:
        >>> loss, cache = run_with_backward_cache(model, "Lionel Messi plays for", " Paris")
        >>> cache["W_out", 5].norm()
        >>> losses, cache = run_with_backward_cache(model, [one, another], [" Paris", " Rome"])
        >>> cache["W_out", 5].example(1).norm()
    """
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        found = find_sites(model)
        sites = _captured_sites(found, weights, layers)
        modules = [module for _, module in all_modules(model)]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        require_ready(model, parameters)
        _require_one_loss(target, loss_fn)
        batch = batch_of(model, prompt, target, prepend_bos=prepend_bos, padding_side=padding_side)
        objective = _objective(model, batch, loss_fn)
        kept = [
            kept_positions(positions, len(text), None if batch.single else b)
            for b, text in enumerate(batch.texts)
        ]
        rows = Rows(batch.single, batch.width, batch.starts, kept)

        freeze(modules, undo)
        set_grad_enabled(True, undo)
        run = Run(undo)
        lazy_hooks = [(name, _no_op) for name in lazy_hook_points(model)]
        run.put_hooks(model, undo, [*fwd_hooks, *lazy_hooks], bwd_hooks)
        run.step_aside_for_others(modules, undo)
        run_uncompiled(modules, undo)
        guarded = GuardedHooks(run, model, batch.mask)
        last = last_positions(run, model, modules, batch, sites, objective)
        recorder = Recorder(run, len(batch), None if device is None else torch.device(device))
        plain, mixtures = [s for s in sites if s.mixture is None], mixtures_of(sites)
        measured: list[WeightSite | Mixture] = [*plain, *mixtures.values()]
        _watch_weights(recorder, sites if last is None else last.watched(sites))
        for mixture in mixtures.values():
            watch_mixture(recorder, mixture)
        watched = watch_residual(recorder, model, found, _lowest(found, sites, layers), per_head)
        if last is not None:
            run.hook_forward_pre(model.unembed, last.narrow)
        logits = batch.logits(model)

        run.stage = "loss"
        read = batch if last is None or not last.were_taken else last
        losses = losses_of_examples(objective, logits, read.spans, read.tokens.to(logits.device))
        _require_used(recorder, measured)

        run.stage = "backward"
        vjps = recorder.backward(losses.sum(), retain_graph=needs_graph(recorder, watched))
        guarded.are_done = True
        _require_finite(vjps, batch.padding_side)
        if last is not None and last.were_taken:
            last.widen(vjps)
        if logits.requires_grad and loss_fn is not None and not isinstance(loss_fn, Objective):
            _warn_if_flat(losses, logits, vjps)
        losses = losses.detach() if device is None else losses.detach().to(device)
        routings = {name: routing_of(recorder, one, vjps, rows) for name, one in mixtures.items()}
        factors = {
            **{site.name: _factors_of(recorder, site, vjps, rows) for site in plain},
            **factors_by_expert(recorder, sites, routings, vjps, rows),
        }
        cache = BackwardCache(
            factors={site.name: factors[site.name] for site in sites},
            post_norm_vjps={
                one.name: rows.of(vjps[one.name, "residual"])
                for one in measured
                if one.residual_tap is not None
            },
            routings=routings,
            residual=residual_from(recorder, watched, vjps, rows),
            weights_processing=weights_processing(model),
            tokens=batch.whole(batch.texts),
            str_tokens=batch.whole([decode_each(model, text.tolist()) for text in batch.texts]),
            positions=batch.whole(kept),
            target_ids=batch.target_ids,
            target_positions=batch.whole(batch.predicting),
            loss=batch.whole(losses),
        )
        return cache.loss, cache


def require_ready(model: Model, parameters: Sequence[Tensor]) -> None:
    """Raise unless a backward pass is possible and the model is deterministic.

    Raises:
        RuntimeError: Under ``torch.inference_mode``.
        ValueError: If training mode changes the model's output.
    """
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in parameters):
        raise RuntimeError(
            "torch.inference_mode() allows no backward pass, nor do weights created under it; "
            "leave that block (torch.no_grad() is fine), or load the model outside it"
        )
    require_eval_mode(model)


def _captured_sites(
    found: FoundSites, weights: str | Iterable[str] | None, layers: int | Iterable[int] | None
) -> list[WeightSite]:
    """The requested sites; none if no kinds are requested."""
    kinds = weights if weights is None or isinstance(weights, str) else list(weights)
    return found.select(kinds, layers) if kinds != [] else []


def _lowest(
    found: FoundSites, sites: Sequence[WeightSite], layers: int | Iterable[int] | None
) -> int | None:
    """The lowest layer that the backward pass must reach; None for the whole model."""
    if sites and all(site.kind == "W_U" for site in sites):
        return found.n_layers
    wanted = layer_numbers(found.n_layers, layers)
    if wanted is None:
        return None
    return min((site.layer or 0 for site in sites), default=min(wanted))


def _require_one_loss(target: Target | None, loss_fn: Loss | None) -> None:
    if (target is None) == (loss_fn is None):
        raise ValueError("pass either target= or loss_fn= to define the loss")
    if loss_fn is not None:
        require_loss(loss_fn)


def _objective(model: Model, batch: Batch, loss_fn: Loss | None) -> Loss:
    """The loss of a batch: the target's, or ``loss_fn`` with its tokens resolved to ids."""
    if loss_fn is None:
        return target_nll(batch.targets)
    if not isinstance(loss_fn, Objective):
        return loss_fn
    n_prompts = None if batch.single else len(batch)
    return loss_fn.resolved(
        lambda argument, value: single_token_ids(model, argument, value, n_prompts, batch.texts),
        [len(text) for text in batch.texts],
    )


def _no_op(tensor: Tensor, hook: Any) -> None:
    """No-op hook: its presence makes TransformerLens call the HookPoint."""


def _watch_weights(recorder: Recorder, sites: Sequence[WeightSite]) -> None:
    for site in sites:
        if site.mixture is not None and site.mixture.stacked is not None:
            continue  # read at the experts' boundary
        of_tokens, only = site.mixture is not None, site.also_without_grad
        if site.has_inner_output:
            recorder.begin_graph(site.x_tap())
        recorder.keep_value(site.x_tap(), site.name, of_tokens=of_tokens, only_with_grad=only)
        recorder.keep_place(
            site.y_tap(),
            (site.name, "y"),
            on_a_branch=site.has_inner_output,
            alone=True,
            of_tokens=of_tokens,
            only_with_grad=only,
        )
        if site.residual_tap is not None:
            recorder.keep_place(site.residual_tap(), (site.name, "residual"))
        if site.packed is not None:
            _watch_for_a_backward(recorder, site)


def _watch_for_a_backward(recorder: Recorder, site: WeightSite) -> None:
    """Refuse a layer whose output does not lead back to its input, as kernels without a backward.

    Of the hooks on its output, the last one that is put there sees what the layer itself gives.
    """
    requires_grad: list[bool] = []

    def check(y: Tensor) -> None:
        if requires_grad.pop() and not y.requires_grad:
            raise NotImplementedError(
                f"the layer of {site.name} ({site.packed}) has no backward pass, so no VJP comes "
                "through it; capture weights above it only, with layers=..."
            )

    recorder.watch(site.x_tap(), lambda x: requires_grad.append(x.requires_grad))
    recorder.watch(site.y_tap(), check)


def _factors_of(
    recorder: Recorder, site: WeightSite, vjps: Mapping[Any, list[Tensor]], rows: Rows
) -> GradientFactors:
    x, y = [site.encode(one) for one in recorder.values(site.name)], vjps[site.name, "y"]
    if site.padding_row is not None:
        for one in x:
            one[..., site.padding_row] = 0
    if site.mixture is None:
        _require_row_per_position(site, x, y, rows)
    return GradientFactors(rows.of(x), rows.of(y), rows.lengths(len(x)))


def _require_row_per_position(
    site: WeightSite, x: Sequence[Tensor], y: Sequence[Tensor], rows: Rows
) -> None:
    n = len(rows.starts) * rows.width
    for tensors, width in ((x, site.d_in), (y, site.d_out)):
        for one in tensors:
            by_head = one.shape[-2:].numel() == width
            if one.numel() != n * width or not (by_head or one.shape[-1] == width):
                raise NotImplementedError(
                    f"the model gives {site.name} {list(one.shape)} and not one row for each of "
                    f"{n} positions; leave it out with weights=..."
                )


def _require_used(recorder: Recorder, read: Sequence[WeightSite | Mixture]) -> None:
    for one in read:
        if not recorder.places[one.name, "y"]:
            raise RuntimeError(f"the forward pass did not use {one.name}")


def _require_finite(vjps: Mapping[Hashable, list[Tensor]], side: str) -> None:
    places = [(name, vjp) for name, each in vjps.items() for vjp in each]
    sums = [vjp.sum(dtype=upcast_dtype(vjp.dtype)) for _, vjp in places]
    is_finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite()
    if is_finite.all():
        return
    last = places[int(is_finite.logical_not().nonzero()[-1])][0]
    name = last[0] if isinstance(last, tuple) else last
    advice = "padding_side='right', or " if side == "left" else ""
    raise ValueError(
        f"the VJPs at {name} are not finite, though the loss is; try {advice}a higher precision, "
        "and check loss_fn and the model's hooks"
    )


def _warn_if_flat(losses: Tensor, logits: Tensor, vjps: Mapping[Any, list[Tensor]]) -> None:
    """Warn about zero gradients: right for a saturated loss, wrong for a detached one."""
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
        f"all VJPs of example {examples} are zero: loss_fn is flat at these logits, or detached "
        "the loss from them",
        stacklevel=3,
    )
