"""Contexts to prepend to a prompt during the value search, so that the edit generalises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing._subjects import SLOT
from tl_backward.sites import Model

SEED = 0
TOP_K = 5
STARTS = ("The", "Therefore", "Because", "I", "You")


def rome_contexts(model: Model) -> list[str]:
    """The plain prompt, and the prompt after ten generated texts each of 5 and of 10 tokens.

    The same model always generates the same texts.

    Args:
        model: A TransformerLens model with a tokenizer. Each text begins with its BOS token.

    Raises:
        ValueError: If the tokenizer has neither a BOS nor an EOS token.
    """
    tokenizer = model.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ValueError(
            "contexts: this tokenizer has no BOS token to start generation from; pass contexts, "
            'such as ["{}", "The cat. {}"]'
        )
    generator = torch.Generator().manual_seed(SEED)
    begins = torch.full((10, 1), begin)
    return [SLOT] + [
        template
        for n_tokens in (5, 10)
        for template in _templates(model, _written(model, begins, n_tokens, generator))
    ]


def memit_contexts(model: Model, prepend_bos: bool | None = None) -> list[list[str]]:
    """Two kinds: the plain prompt, and the prompt after five generated texts of ten tokens.

    The same model always generates the same texts.

    Args:
        model: A TransformerLens model with a tokenizer.
        prepend_bos: As in ``model.to_tokens``.
    """
    generator = torch.Generator().manual_seed(SEED)
    starts = prompt_tokens(model, list(STARTS), prepend_bos, "right")
    written = [_written(model, start[None], 10, generator)[0] for start in starts]
    return [[SLOT], _templates(model, written)]


def checked_templates(contexts: Sequence[str]) -> list[str]:
    """Validate the templates of one kind.

    Raises:
        TypeError: If they are not a list of text.
        ValueError: If there is none, or one does not have exactly one slot for the prompt.
    """
    if isinstance(contexts, str) or not all(isinstance(one, str) for one in contexts):
        raise TypeError(f'contexts must be a list of texts such as "The cat. {{}}", got {contexts}')
    if not contexts:
        raise ValueError(f'contexts is empty; pass ["{SLOT}"] for the plain prompt alone')
    for template in contexts:
        if template.count(SLOT) != 1:
            raise ValueError(f"contexts: {template!r} must have exactly one {SLOT} for the prompt")
    return list(contexts)


@torch.no_grad()
def _written(
    model: Model, tokens: Int[Tensor, "text pos"], n_tokens: int, generator: torch.Generator
) -> Int[Tensor, "text longer"]:
    """Continue the texts by ``n_tokens``, each sampled from the five most probable tokens."""
    special = torch.tensor(model.tokenizer.all_special_ids, dtype=torch.long)
    for _ in range(n_tokens):
        logits = model(tokens.to(model.cfg.device), return_type="logits")[:, -1].double().cpu()
        logits[:, special[special < logits.shape[-1]]] = -torch.inf
        most = logits.topk(TOP_K)
        drawn = torch.multinomial(most.values.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, most.indices.gather(1, drawn)], dim=1)
    return tokens


def _templates(model: Model, texts: Sequence[Int[Tensor, "_"]] | Tensor) -> list[str]:
    """Templates with each text as a sentence before the slot."""
    decoded = model.tokenizer.batch_decode(
        [text.tolist() for text in texts], skip_special_tokens=True
    )
    plain = [" ".join(text.replace("{", " ").replace("}", " ").split()) for text in decoded]
    return [f"{text}. {SLOT}" for text in plain]
