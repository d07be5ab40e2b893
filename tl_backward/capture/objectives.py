"""What is differentiated: one number for each example, from its logits.

A loss takes the logits and the tokens of texts without padding and returns one value per text:
``loss_fn(logits: [batch, pos, d_vocab], tokens: [batch, pos]) -> [batch]``. All values are raw: a
descent step lowers them.
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
    """A loss that has something of its own for each example, such as a target.

    Attributes:
        compute: ``compute(logits, tokens, **of_each)``, one value per text.
        of_each: By argument, one entry per example.
        tokens: The arguments that name tokens as users do, and become ids in :meth:`resolved`.
        n_last: How many of a text's last positions have logits that it reads; None for all.
    """

    compute: Callable[..., Float[Tensor, "batch"]]
    of_each: dict[str, Any]
    tokens: tuple[str, ...] = ()
    n_last: int | None = None

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch"]:
        """The loss of every text. Tokens that are not resolved must be ids.

        Raises:
            TypeError: When they are something else.
        """
        if not self.tokens:
            return self.compute(logits, tokens, **self.of_each)
        n, length = logits.shape[:2]
        return self.resolved(lambda name, of: _given_ids(name, of, n), [length] * n)(logits, tokens)

    def resolved(
        self, token_ids: Callable[[str, Any], Int[Tensor, "batch"]], lengths: Sequence[int]
    ) -> Objective:
        """The same with ids for the tokens that it names.

        Args:
            token_ids: Called with an argument and its value.
            lengths: Number of tokens of every example.

        Raises:
            ValueError: When it has not one entry per example, or one padded tensor for examples of
                different lengths.
        """
        of_each = self.of_each | {name: token_ids(name, self.of_each[name]) for name in self.tokens}
        for name, of in of_each.items():
            if len(of) != len(lengths):
                raise ValueError(f"{name} is given for {len(of)} prompts, not for {len(lengths)}")
            if isinstance(of, Tensor) and of.ndim == 3 and len(set(lengths)) > 1:
                raise ValueError(
                    f"{name} is one tensor for prompts of different lengths, in which shorter ones "
                    "may end with padding; pass a list with the logits of every prompt, such as "
                    "[model(prompt) for prompt in prompts]"
                )
        return replace(self, of_each=of_each, tokens=())

    def example(self, b: int) -> Objective:
        """The same for one text of the batch."""
        return replace(self, of_each={name: of[b : b + 1] for name, of in self.of_each.items()})


def require_loss(loss_fn: object) -> None:
    """Refuse what cannot be a loss.

    Raises:
        TypeError: When it is no function, or one that makes an objective and was not called.
    """
    makers = (logit_diff, kl_divergence)
    if not callable(loss_fn) or any(loss_fn is maker for maker in makers):
        raise TypeError(
            "loss_fn must be a function of logits and tokens, or what logit_diff(answer, other) "
            f"or kl_divergence(logits) returns, got {getattr(loss_fn, '__name__', loss_fn)!r}"
        )


def losses_of_examples(
    loss_fn: Loss,
    logits: Float[Tensor, "batch pos d_vocab"],
    texts: Sequence[slice],
    tokens: Tensor,
) -> Float[Tensor, "batch"]:
    """The loss of every example, as if it was alone.

    Args:
        loss_fn: Called with all texts at once if they are of one length, and else text by text. A
            user's function may edit its logits in place.
        logits: Those of padded texts.
        texts: Where each text is in its row.
        tokens: The padded texts.

    Raises:
        TypeError: When the loss is no tensor of real numbers.
        ValueError: When it has the wrong shape, is detached from the logits, or is not finite.
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
                f"the loss of example {b} is {loss}: its logits, or what loss_fn makes of them, "
                "are not finite; try a higher precision (or, for padding on the left, "
                "padding_side='right'), or check the model's weights and the hooks on it"
            )
    return losses


def _loss_of(loss_fn: Loss, b: int, logits: Tensor, tokens: Tensor) -> Any:
    """The loss of one example. Autograd forbids to edit what ``unbind`` gives in place."""
    if isinstance(loss_fn, Objective):
        return loss_fn.example(b)(logits, tokens)
    return loss_fn(logits.clone(), tokens)


def _checked(losses: Any, logits: Tensor, n: int, called: str) -> Tensor:
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"loss_fn{called} must return a tensor of floating point, got {got}")
    if losses.shape != (n,):
        got = "a scalar" if not losses.ndim else f"the shape {list(losses.shape)}"
        raise ValueError(
            f"loss_fn{called} returned {got}; it must return one value per text, shape [{n}]"
        )
    if logits.requires_grad and not losses.requires_grad:
        raise ValueError(
            f"loss_fn{called} returned a tensor that is detached from the logits; compute it from "
            "them without detach(), item() or no_grad()"
        )
    return losses


def target_nll(targets: Sequence[Sequence[int]]) -> Objective:
    """Negative log-likelihood of a target's tokens, in nats, mean over them.

    Every text ends where its target's last token is to be predicted, so that the last ``k``
    positions predict the ``k`` tokens (teacher forcing). For one token, the VJP at the last
    position's logits is ``p_hat[k] - 1[k = t]`` (Eq 4). Computed in float32 at least.
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

    A metric as in activation patching, so a descent step moves *away* from ``answer``; swap the
    two to descend towards it. In a function of your own, ``logit_diff(5, 7)(logits, tokens)``
    takes ids.

    Args:
        answer: One token, or one for each prompt: strings (mind the leading space) or ids.
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
    """``KL(other || this run)`` of the distributions of the token after the last one, in nats.

    Args:
        other_logits: What another run gave: ``[pos, d_vocab]`` or ``[batch, pos, d_vocab]``, of
            which the last position counts, a ``[d_vocab]`` vector, or a list of these, one for each
            prompt. Prompts of different lengths need a list.

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
        last = torch.stack([of[-1] if of.ndim == 2 else of for of in other_logits])
        if last.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"other_logits is over {last.shape[-1]} tokens, and this model has "
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
    """The model's own loss: mean over the text of each next token's negative log-likelihood.

    In nats, as ``model(tokens, return_type="loss")`` gives it for one text.

    Raises:
        ValueError: For a text of one token, which has no next one.

    Example:
        >>> run_with_backward_cache(model, text, loss_fn=lm_cross_entropy_loss)
    """
    if tokens.shape[1] < 2:
        raise ValueError("the loss over a text needs a prompt of at least two tokens")
    log_probs = upcast(logits[:, :-1]).log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1).mean(-1)


def _given_ids(argument: str, value: Any, n: int) -> Int[Tensor, "batch"]:
    """Token ids as they are given, for ``n`` examples."""
    try:
        ids = torch.as_tensor(value).reshape(-1)
    except (TypeError, ValueError):
        ids = torch.empty(0)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"{argument}={value!r}: within another function there is no tokenizer; pass token ids, "
            "or, to turn the sign around, swap answer and other in the loss_fn itself"
        )
    return ids.expand(n) if len(ids) == 1 else ids
