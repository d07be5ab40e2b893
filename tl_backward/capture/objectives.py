"""Losses to differentiate: one number per example, computed from its logits.

A loss takes the logits and the tokens of texts without padding and returns one value per text:
``loss_fn(logits: [batch, pos, d_vocab], tokens: [batch, pos]) -> [batch]``. Signs are raw: a
descent step lowers the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward._precision import upcast

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss with per-example arguments, such as a target.

    Attributes:
        compute: ``compute(logits, tokens, **of_each)``, one value per text.
        of_each: The arguments by name, each with one entry per example.
        tokens: Names of the arguments that users pass as tokens; :meth:`resolved` turns them into
            ids.
        n_last: Number of last positions per text whose logits it reads; None for all.
    """

    compute: Callable[..., Float[Tensor, "batch"]]
    of_each: dict[str, Any]
    tokens: tuple[str, ...] = ()
    n_last: int | None = None

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch"]:
        """The loss of every text. Unresolved tokens must be ids.

        Raises:
            TypeError: If they are not ids.
        """
        if not self.tokens:
            return self.compute(logits, tokens, **self.of_each)
        n, length = logits.shape[:2]
        return self.resolved(lambda name, of: _given_ids(name, of, n), [length] * n)(logits, tokens)

    def resolved(
        self, token_ids: Callable[[str, Any], Int[Tensor, "batch"]], lengths: Sequence[int]
    ) -> Objective:
        """The objective with token arguments replaced by ids.

        Args:
            token_ids: Called with the name and the value of an argument.
            lengths: Number of tokens of every example.

        Raises:
            ValueError: If an argument does not have one entry per example, or is one tensor for
                examples of different lengths.
        """
        of_each = self.of_each | {name: token_ids(name, self.of_each[name]) for name in self.tokens}
        for name, entries in of_each.items():
            if len(entries) != len(lengths):
                raise ValueError(
                    f"{name} has entries for {len(entries)} prompts, but there are {len(lengths)}"
                )
            if isinstance(entries, Tensor) and entries.ndim == 3 and len(set(lengths)) > 1:
                raise ValueError(
                    f"{name} is one tensor for prompts of different lengths, so shorter ones may "
                    "end with padding; pass a list with the logits of every prompt, such as "
                    "[model(prompt) for prompt in prompts]"
                )
        return replace(self, of_each=of_each, tokens=())

    def example(self, b: int) -> Objective:
        """The objective for one text of the batch."""
        return replace(self, of_each={name: each[b : b + 1] for name, each in self.of_each.items()})


def require_loss(loss_fn: object) -> None:
    """Raise unless ``loss_fn`` can be a loss.

    Raises:
        TypeError: If it is not callable, or is a function that makes objectives, not an objective.
    """
    makers = (logit_diff, kl_divergence)
    if not callable(loss_fn) or any(loss_fn is maker for maker in makers):
        raise TypeError(
            "loss_fn must be a function of logits and tokens, or the result of logit_diff(answer, "
            f"other) or kl_divergence(logits), got {getattr(loss_fn, '__name__', loss_fn)!r}"
        )


def losses_of_examples(
    loss_fn: Loss,
    logits: Float[Tensor, "batch pos d_vocab"],
    texts: Sequence[slice],
    tokens: Tensor,
) -> Float[Tensor, "batch"]:
    """The loss of every example, equal to its loss alone.

    Args:
        loss_fn: Called once per batch if all texts have equal length, otherwise once per text. A
            user's function may edit its logits in place.
        logits: The logits of the padded texts.
        texts: The slice of each text in its row.
        tokens: The padded texts.

    Raises:
        TypeError: If the loss is not a floating-point tensor.
        ValueError: If it has the wrong shape, is detached from the logits, or is not finite.
    """
    if all(text == slice(0, logits.shape[1]) for text in texts):
        losses = _checked(loss_fn(logits, tokens), logits, len(texts), "")
    else:
        losses = torch.cat(
            [
                _checked(
                    _loss_of(loss_fn, b, of_text[None, text], tokens[b : b + 1, text]),
                    logits,
                    1,
                    f", called with example {b} alone,",
                )
                for b, (of_text, text) in enumerate(zip(logits.unbind(0), texts, strict=True))
            ]
        )
    for b, loss in enumerate(losses.tolist()):
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of example {b} is {loss}: its logits, or loss_fn's result, are not "
                "finite; try a higher precision (or padding_side='right' if padded on the left), "
                "or check the model's weights and hooks"
            )
    return losses


def _loss_of(loss_fn: Loss, b: int, logits: Tensor, tokens: Tensor) -> Any:
    """The loss of one example. Autograd forbids in-place edits of the views from ``unbind``."""
    if isinstance(loss_fn, Objective):
        return loss_fn.example(b)(logits, tokens)
    return loss_fn(logits.clone(), tokens)


def _checked(losses: Any, logits: Tensor, n: int, called: str) -> Tensor:
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"loss_fn{called} must return a floating-point tensor, got {got}")
    if losses.shape != (n,):
        got = "a scalar" if not losses.ndim else f"the shape {list(losses.shape)}"
        raise ValueError(
            f"loss_fn{called} returned {got}; it must return one value per text, shape [{n}]"
        )
    if logits.requires_grad and not losses.requires_grad:
        raise ValueError(
            f"loss_fn{called} returned a tensor that is detached from the logits; compute it "
            "without detach(), item() or no_grad()"
        )
    return losses


def target_nll(targets: Sequence[Sequence[int]]) -> Objective:
    """Negative log-likelihood of a target, in nats, averaged over its tokens.

    The last position of a text predicts its target's last token, so the last ``k`` positions
    predict the ``k`` tokens (teacher forcing). For one token, the VJP at the last position's logits
    is ``p_hat[k] - 1[k = t]`` (Eq 4). Computed in float32 or higher.
    """

    def compute(logits: Tensor, tokens: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack(
            [
                torch.nn.functional.cross_entropy(
                    upcast(of_text[-len(ids) :]), torch.tensor(ids, device=logits.device)
                )
                for of_text, ids in zip(logits.unbind(0), targets, strict=True)
            ]
        )

    return Objective(compute, {"targets": targets}, n_last=max(map(len, targets)))


def logit_diff(
    answer: str | int | Sequence[Any] | Int[Tensor, "..."],
    other: str | int | Sequence[Any] | Int[Tensor, "..."],
) -> Objective:
    """Logit of ``answer`` minus logit of ``other`` after the last token.

    This is the metric of activation patching, so a descent step moves *away* from ``answer``; swap
    the two to descend towards it. Inside your own function, call ``logit_diff(5, 7)(logits,
    tokens)`` with ids.

    Args:
        answer: One token, or one per prompt: strings (mind the leading space) or ids.
        other: The same.

    Example:
        >>> run_with_backward_cache(model, prompt, loss_fn=logit_diff(" Paris", " Rome"))
    """

    def compute(
        logits: Tensor, tokens: Tensor, answer: Int[Tensor, "batch"], other: Int[Tensor, "batch"]
    ) -> Tensor:
        last = logits[:, -1]
        rows = torch.arange(len(last), device=last.device)
        return last[rows, answer.to(last.device)] - last[rows, other.to(last.device)]

    return Objective(
        compute, {"answer": answer, "other": other}, tokens=("answer", "other"), n_last=1
    )


def kl_divergence(other_logits: Float[Tensor, "..."] | Sequence[Float[Tensor, "..."]]) -> Objective:
    """``KL(other || this run)`` of the next-token distributions after the last position, in nats.

    Args:
        other_logits: Logits of another run: ``[pos, d_vocab]`` or ``[batch, pos, d_vocab]``, read
            at the last position; a ``[d_vocab]`` vector; or a list of these, one per prompt.
            Prompts of different lengths need a list.

    Example:
        >>> clean = model(prompt)
        >>> run_with_backward_cache(model, corrupted, loss_fn=kl_divergence(clean))
    """
    if isinstance(other_logits, Tensor):
        other = other_logits.detach() if other_logits.ndim == 3 else [other_logits.detach()]
    else:
        other = [
            logits.detach().squeeze(0) if logits.ndim == 3 else logits.detach()
            for logits in other_logits
        ]

    def compute(logits: Tensor, tokens: Tensor, other_logits: Tensor | Sequence[Tensor]) -> Tensor:
        last = torch.stack([each[-1] if each.ndim == 2 else each for each in other_logits])
        if last.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"other_logits covers {last.shape[-1]} tokens, but this model has "
                f"{logits.shape[-1]}; pass logits of a model with the same vocabulary"
            )
        this = upcast(logits[:, -1]).log_softmax(-1)
        other = upcast(last.to(this)).log_softmax(-1)
        probabilities = other.exp()
        return torch.where(probabilities == 0, 0, probabilities * (other - this)).sum(-1)

    return Objective(compute, {"other_logits": other}, n_last=1)


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """The model's own loss: negative log-likelihood of the next token, averaged over the text.

    In nats, as returned by ``model(tokens, return_type="loss")`` for one text.

    Raises:
        ValueError: For a text of one token, which has no next token.

    Example:
        >>> run_with_backward_cache(model, text, loss_fn=lm_cross_entropy_loss)
    """
    if tokens.shape[1] < 2:
        raise ValueError("the loss over a text needs a prompt of at least two tokens")
    log_probs = upcast(logits[:, :-1]).log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1).mean(-1)


def _given_ids(argument: str, value: Any, n: int) -> Int[Tensor, "batch"]:
    """The given token ids, expanded to ``n`` examples."""
    try:
        ids = torch.as_tensor(value).reshape(-1)
    except (TypeError, ValueError):
        ids = torch.empty(0)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"{argument}={value!r}: inside another function there is no tokenizer; pass token ids, "
            "or, to flip the sign, swap answer and other in loss_fn itself"
        )
    return ids.expand(n) if len(ids) == 1 else ids
