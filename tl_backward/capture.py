"""One forward and one backward pass, and from them the two factors of every weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tl_backward.cache import BackwardCache
from tl_backward.factors import GradientFactors
from tl_backward.objectives import next_token_nll
from tl_backward.sites import (
    Model,
    Tap,
    WeightSite,
    all_modules,
    all_parameters,
    attached_hook_points,
    weight_sites,
    weights_processing,
)
from tl_backward.tokens import decode_each, prompt_tokens, target_id

Positions = int | slice | Sequence[int] | Tensor | None
Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]


def run_with_backward_cache(
    model: Model,
    prompt: str | Int[Tensor, "... pos"],
    target: str | int | Int[Tensor, "..."],
    *,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    prepend_bos: bool | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
) -> tuple[Float[Tensor, ""], BackwardCache]:
    """Run the model forward and backward once and keep the factors of its weight gradients.

    The loss is the negative log-likelihood of ``target`` after the last token of ``prompt``. The
    backward pass computes vector-Jacobian products only: no weight gradient is formed, none is
    stored in ``.grad``, and it stops at the first weight that was asked for. Parameters may be
    frozen. Hooks that are on the model take part and stay. What a backward hook returns takes the
    VJP's place, and the factors of all weights upstream of the hook follow from it.

    Args:
        model: A TransformerLens model in eval mode.
        prompt: Text, or the tokens of one prompt (then nothing is prepended).
        target: The token to differentiate towards: a string of exactly one token, or its id.
        weights: Kinds of weights to capture, such as ``"W_out"``. Default: all.
        layers: Layers to capture; negative ones count from the last. Default: all.
        positions: Positions to keep in the factors: an index, a slice or a list of indices, as in
            TransformerLens. The factors then stand for these tokens' part of the gradient.
            Default: all.
        prepend_bos: As in ``model.to_tokens``. Default: the model's own setting.
        fwd_hooks: Pairs of a HookPoint's name (or a function that selects names) and a hook, as in
            ``model.run_with_hooks``: on the model for this run only. On a ``HookedTransformer``,
            names that :func:`add_hook_points` adds work without it.
        bwd_hooks: The same for the backward pass. ``hook(vjp, hook=...)`` returns a tensor shaped
            like ``vjp``, or None to leave it; it may edit ``vjp`` in place.

    Returns:
        The loss (a scalar, detached) and the cache of factors.

    Raises:
        TypeError: When the model is no TransformerLens model, or prompt or target is malformed.
        ValueError: For an empty or too long prompt, a target that is not one token, a weight,
            layer or position that does not exist, a model in training mode, a loss that is not
            finite, and a backward hook that returns another shape.
        NotImplementedError: For several prompts at once, and as :func:`weight_sites` does.
        RuntimeError: Under ``torch.inference_mode()``.

    Example:
        >>> loss, cache = run_with_backward_cache(model, "Lionel Messi plays for", " Paris")
        >>> cache["W_out", 5].norm()
    """
    sites = weight_sites(model, weights, layers)
    _require_ready(model)
    tokens = prompt_tokens(model, prompt, prepend_bos)
    target_ids = torch.tensor(target_id(model, target))
    kept = None if positions is None else _resolve_positions(positions, len(tokens))

    with ExitStack() as stack:
        stack.enter_context(_frozen(all_parameters(model)))
        stack.enter_context(attached_hook_points(model))
        stack.enter_context(model.hooks(fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks)))
        stack.enter_context(_guarded(model))
        recorder = stack.enter_context(_Recorder(sites))
        stack.enter_context(torch.enable_grad())
        logits = model(tokens.unsqueeze(0), return_type="logits")[0]
        loss = next_token_nll(logits, target_ids.to(logits.device))
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()}: the model's logits at the last position are not "
                "finite; try a higher precision, or check its weights and the hooks on it"
            )
        recorder.check()
        vjps = recorder.backward(loss)

    loss = loss.detach()
    rows = partial(_rows, n=len(tokens), positions=kept)
    factors, behind_norms = {}, {}
    for name, uses in recorder.uses.items():
        factors[name] = GradientFactors(
            rows([use.x for use in uses]), rows([vjps[use.y] for use in uses])
        )
        if uses[0].residual is not None:
            behind_norms[name] = rows([vjps[use.residual] for use in uses])
    cache = BackwardCache(
        factors=factors,
        behind_norms=behind_norms,
        weights_processing=weights_processing(model),
        tokens=tokens.cpu(),
        str_tokens=decode_each(model, tokens.tolist()),
        positions=torch.arange(len(tokens)) if kept is None else kept,
        target_ids=target_ids,
        loss=loss,
    )
    return loss, cache


class _Edge(NamedTuple):
    """A place in the autograd graph, and what arrives there when the loss does not depend on it."""

    edge: GradientEdge
    no_gradient: Callable[[], Tensor]


@dataclass
class _Use:
    """One use of a weight in the forward pass."""

    x: Tensor
    source: Tensor
    version: int
    y: _Edge | None = None
    residual: _Edge | None = None


class _Recorder:
    """Hooks that keep the input of every site and the place of its output in the autograd graph."""

    def __init__(self, sites: Sequence[WeightSite]) -> None:
        self.uses: dict[str, list[_Use]] = {site.name: [] for site in sites}
        self._sites = sites
        self._hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        with ExitStack() as hooks:
            for site in self._sites:
                uses = self.uses[site.name]
                hooks.callback(_hook(site.x_tap(), partial(_see_input, site, uses)).remove)
                hooks.callback(_hook(site.y_tap(), partial(_see_output, uses, "y")).remove)
                if site.residual_tap is not None:
                    see = partial(_see_output, uses, "residual")
                    hooks.callback(_hook(site.residual_tap(), see).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def check(self) -> None:
        """Raise when a site took no part, or when its recorded input is no longer what it was."""
        for name, uses in self.uses.items():
            if not uses or any(use.y is None for use in uses):
                raise RuntimeError(f"{name} took no part in the forward pass")
            if any(use.source._version != use.version for use in uses):
                raise RuntimeError(f"the input of {name} was changed in place after its use")

    def backward(self, loss: Tensor) -> dict[_Edge | None, Tensor]:
        """The VJP at every place that was recorded: one backward pass, no weight gradients."""
        edges = [
            edge
            for uses in self.uses.values()
            for use in uses
            for edge in (use.y, use.residual)
            if edge is not None
        ]
        vjps: Sequence[Tensor | None] = [None] * len(edges)
        if loss.requires_grad:
            vjps = torch.autograd.grad(loss, [place.edge for place in edges], allow_unused=True)
        return {
            place: place.no_gradient() if vjp is None else vjp
            for place, vjp in zip(edges, vjps, strict=True)
        }


def _see_input(site: WeightSite, uses: list[_Use], x: Tensor) -> None:
    uses.append(_Use(site.encode(x.detach()), x.detach(), x._version))


def _see_output(uses: list[_Use], which: Literal["y", "residual"], y: Tensor) -> Tensor | None:
    """Note where ``dL/dy`` will arrive.

    Below the first site nothing requires a gradient: the graph is begun at ``y`` itself. The model
    goes on with a copy there, and where ``y`` is a view, because a later change in place is
    forbidden for a leaf, and would take a view's place out of the graph.
    """
    replaced = None
    if not y.requires_grad:
        replaced = y = y.detach().requires_grad_().clone()
    elif y._is_view():
        replaced = y = y.clone()
    no_gradient = partial(torch.zeros, y.shape, dtype=y.dtype, device=y.device)
    setattr(uses[-1], which, _Edge(get_gradient_edge(y), no_gradient))
    return replaced


def _rows(tensors: Sequence[Tensor], n: int, positions: Tensor | None) -> Float[Tensor, "rows d"]:
    """The rows of one prompt of ``n`` tokens, from each use of the weight."""
    uses = [tensor.reshape(n, -1) for tensor in tensors]
    if positions is not None:
        uses = [rows[positions.to(rows.device)] for rows in uses]
    return uses[0] if len(uses) == 1 else torch.cat(uses)


def _hook(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show ``see`` the tensor that passes the tap; what it returns takes the tensor's place."""
    if tap.side == "output":
        return tap.module.register_forward_hook(lambda module, args, output: see(output))

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = see(args[0])
        return None if replaced is None else (replaced, *args[1:])

    return tap.module.register_forward_pre_hook(before)


@contextmanager
def _guarded(model: Model) -> Iterator[None]:
    """Give each backward hook a VJP of its own to edit in place, and check what it returns.

    Autograd hands the very same tensor to all branches of a sum, as of the residual stream.
    """
    with ExitStack() as hooks:
        for point in {point for point in model.hook_dict.values() if point.bwd_hooks}:
            hooks.callback(point.register_full_backward_pre_hook(_copied).remove)
            hooks.callback(point.register_full_backward_hook(_require_same_shape).remove)
        yield


def _copied(point: Any, vjps: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if vjp is None else vjp.clone() for vjp in vjps)


def _require_same_shape(
    point: Any, patched: tuple[Any, ...], given: tuple[Tensor | None, ...]
) -> None:
    for returned, vjp in zip(patched, given, strict=False):
        if returned is None or vjp is None or getattr(returned, "shape", None) == vjp.shape:
            continue
        got = f"the shape {list(returned.shape)}" if isinstance(returned, Tensor) else returned
        raise ValueError(
            f"a backward hook at {point.name} returned {got}; it must return a tensor shaped like "
            "the VJP that it is given, or None"
        )


@contextmanager
def _frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
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


def _require_ready(model: Model) -> None:
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in all_parameters(model)):
        raise RuntimeError(
            "there is no backward pass under torch.inference_mode(), nor through weights made "
            "under it; leave that block (torch.no_grad() is fine), or load the model outside it"
        )
    training = [name for name, module in all_modules(model) if module.training]
    if training:
        raise ValueError(
            f"the model is in training mode (at least its module {training[0] or 'root'!r}), where "
            "dropout makes gradients random; call model.eval() first"
        )


def _resolve_positions(positions: Positions, n: int) -> Int[Tensor, "n"]:
    """The indices that an index, slice or list of positions selects from ``n`` tokens."""
    index = positions if not isinstance(positions, int) else [positions]
    try:
        kept = torch.arange(n)[index]
    except (IndexError, TypeError) as error:
        raise ValueError(
            f"positions={positions!r}: this prompt has positions 0 to {n - 1}"
        ) from error
    if not len(kept):
        raise ValueError(f"positions={positions!r} selects none of the {n} positions of the prompt")
    return kept
