"""One forward and one backward pass, and from them the two factors of every weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tl_backward import objectives
from tl_backward.cache import BackwardCache
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, Tap, WeightSite, all_modules, all_parameters, weight_sites

Positions = int | slice | Sequence[int] | Tensor | None


def run_with_backward_cache(
    model: Model,
    prompt: str | Int[Tensor, "... pos"],
    target: str | int | Int[Tensor, "..."],
    *,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    prepend_bos: bool | None = None,
) -> tuple[Float[Tensor, ""], BackwardCache]:
    """Run the model forward and backward once and keep the factors of its weight gradients.

    The loss is the negative log-likelihood of ``target`` after the last token of ``prompt``. The
    backward pass computes vector-Jacobian products only: no weight gradient is formed, none is
    stored in ``.grad``, and it stops at the first weight that was asked for. Parameters may be
    frozen. Hooks that are on the model take part and stay.

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

    Returns:
        The loss (a scalar, detached) and the cache of factors.

    Raises:
        TypeError: When the model is no TransformerLens model, or prompt or target is malformed.
        ValueError: For an empty or too long prompt, a target that is not one token, a weight,
            layer or position that does not exist, a model in training mode, and a loss that is
            not finite.
        NotImplementedError: For several prompts at once, and as :func:`weight_sites` does.
        RuntimeError: Under ``torch.inference_mode()``.

    Example:
        >>> loss, cache = run_with_backward_cache(model, "Lionel Messi plays for", " Paris")
        >>> cache["W_out", 5].norm()
    """
    sites = weight_sites(model, weights, layers)
    _require_ready(model)
    tokens = _tokenize(model, prompt, prepend_bos)
    target_ids = torch.tensor(objectives.target_id(model, target))
    kept = None if positions is None else _resolve_positions(positions, len(tokens))

    with ExitStack() as stack:
        stack.enter_context(_frozen(all_parameters(model)))
        recorder = stack.enter_context(_Recorder(sites))
        stack.enter_context(torch.enable_grad())
        logits = model(tokens.unsqueeze(0), return_type="logits")[0]
        loss = objectives.next_token_nll(logits, target_ids.to(logits.device))
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()}: the model's logits at the last position are not "
                "finite; try a higher precision, or check its weights and the hooks on it"
            )
        factors = recorder.factors(loss, kept)

    loss = loss.detach()
    cache = BackwardCache(
        factors=factors,
        tokens=tokens.cpu(),
        str_tokens=[model.tokenizer.decode([i]) for i in tokens.tolist()],
        positions=torch.arange(len(tokens)) if kept is None else kept,
        target_ids=target_ids,
        loss=loss,
    )
    return loss, cache


class _Recorder:
    """Hooks that keep the input of every site and the place of its output in the autograd graph."""

    def __init__(self, sites: Sequence[WeightSite]) -> None:
        self.sites = sites
        self.inputs: dict[str, tuple[Tensor, int]] = {}
        self.outputs: dict[str, tuple[GradientEdge, Callable[[], Tensor]]] = {}
        self._handles = ExitStack()

    def __enter__(self) -> _Recorder:
        with ExitStack() as handles:
            for site in self.sites:
                handles.callback(_hook(site.x_tap(), partial(self._see_input, site)).remove)
                handles.callback(_hook(site.y_tap(), partial(self._see_output, site)).remove)
            self._handles = handles.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.close()

    def _see_input(self, site: WeightSite, x: Tensor) -> None:
        if site.name in self.inputs:
            raise NotImplementedError(f"{site.name} is used more than once in one forward pass")
        self.inputs[site.name] = x.detach(), x._version

    def _see_output(self, site: WeightSite, y: Tensor) -> Tensor | None:
        """Note where ``dL/dy`` will arrive.

        Below the first site nothing requires a gradient. There the graph is begun at ``y`` itself,
        with a copy, because the model may go on to change it in place, which a leaf forbids.
        """
        replaced = None
        if not y.requires_grad:
            replaced = y = y.detach().requires_grad_().clone()
        zeros = partial(torch.zeros, y.shape, dtype=y.dtype, device=y.device)
        self.outputs[site.name] = get_gradient_edge(y), zeros
        return replaced

    def factors(self, loss: Tensor, positions: Tensor | None) -> dict[str, GradientFactors]:
        """Run the backward pass and pair what arrives with the inputs."""
        for site in self.sites:
            if site.name not in self.inputs or site.name not in self.outputs:
                raise RuntimeError(f"{site.name} took no part in the forward pass")
            x, version = self.inputs[site.name]
            if x._version != version:
                raise RuntimeError(
                    f"the input of {site.name} was changed in place after the forward pass used it"
                )
        edges, zeros = zip(*(self.outputs[site.name] for site in self.sites), strict=True)
        deltas: Sequence[Tensor | None] = [None] * len(edges)
        if loss.requires_grad:
            deltas = torch.autograd.grad(loss, edges, allow_unused=True)
        return {
            site.name: GradientFactors(
                _rows(self.inputs[site.name][0], positions),
                _rows(no_gradient() if delta is None else delta, positions),
            )
            for site, delta, no_gradient in zip(self.sites, deltas, zeros, strict=True)
        }


def _rows(batch_of_one: Tensor, positions: Tensor | None) -> Float[Tensor, "n d"]:
    rows = batch_of_one[0].flatten(1)
    return rows if positions is None else rows[positions.to(rows.device)]


def _hook(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show ``see`` the tensor that passes the tap; what it returns takes the tensor's place."""
    if tap.side == "output":
        return tap.module.register_forward_hook(lambda module, args, output: see(output))

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = see(args[0])
        return None if replaced is None else (replaced, *args[1:])

    return tap.module.register_forward_pre_hook(before)


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


def _tokenize(model: Any, prompt: str | Tensor, prepend_bos: bool | None) -> Int[Tensor, "pos"]:
    """The tokens of one prompt, checked."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt is empty; pass at least one token of text")
        tokens = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)
    elif isinstance(prompt, Tensor) and not prompt.is_floating_point() and prompt.ndim in (1, 2):
        tokens = prompt if prompt.ndim == 2 else prompt.unsqueeze(0)
        tokens = tokens.to(model.cfg.device)
    elif isinstance(prompt, list):
        raise NotImplementedError("several prompts at once are not supported yet; pass one prompt")
    else:
        raise TypeError(f"prompt must be a string or a tensor of token ids, got {prompt!r}")
    if len(tokens) != 1:
        raise NotImplementedError(
            f"prompt must be a single one for now, got a batch of {len(tokens)}"
        )
    n, n_ctx, d_vocab = tokens.shape[1], model.cfg.n_ctx, model.cfg.d_vocab
    if n == 0:
        raise ValueError("prompt is empty; pass at least one token")
    if n_ctx is not None and n > n_ctx:
        raise ValueError(
            f"prompt has {n} tokens, more than the model's context of {n_ctx}; shorten it"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(f"prompt holds token ids outside the vocabulary, 0 to {d_vocab - 1}")
    return tokens[0]


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
