"""Texts that edited models write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing import WeightEdit, edit_hooks
from tl_backward.sites import Model, attached_hook_points

TOP_K = 5
MAX_TOKENS = 100
SEED = 0


@torch.no_grad()
def generate_texts(
    model: Model,
    prompts: Sequence[str],
    *,
    edits: Sequence[WeightEdit] = (),
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Continue each prompt, under an edit of its own, until the text has 100 tokens.

    Each next token is drawn from the five most probable ones. No BOS token is put before the
    prompts, and an end-of-text token does not end a text (nor is it part of it). Prompts of the
    same number of tokens share a batch. The random numbers begin with the same seed at each call
    (those of the rest of the program go on as if none were drawn), and who shares a batch shares
    them.

    Args:
        model: A TransformerLens model in eval mode.
        prompts: The beginnings.
        edits: The edits that take part, by their hooks.
        rows: For each prompt the index of its edit, or -1 for none. Default: none for all.
        batch_size: Texts at once.

    Returns:
        The texts, prompts included.

    Raises:
        ValueError: When ``rows`` and ``prompts`` differ in number.
    """
    of_prompt = [-1] * len(prompts) if rows is None else list(rows)
    if len(of_prompt) != len(prompts):
        raise ValueError(f"rows has {len(of_prompt)} entries, but there are {len(prompts)} prompts")
    by_length = defaultdict(list)
    tokens = prompt_tokens(model, prompts, False, "right") if prompts else []
    for i, ids in enumerate(tokens):
        by_length[len(ids)].append(i)
    n_ctx = model.cfg.n_ctx or MAX_TOKENS
    texts = [""] * len(prompts)
    with torch.random.fork_rng(), attached_hook_points(model):
        torch.manual_seed(SEED)
        for length, of_length in sorted(by_length.items()):
            for start in range(0, len(of_length), batch_size):
                batch = of_length[start : start + batch_size]
                written = torch.stack([tokens[i] for i in batch]).to(model.cfg.device)
                n_new = min(MAX_TOKENS, n_ctx) - length
                if n_new > 0:
                    hooks = edit_hooks(model, edits, [of_prompt[i] for i in batch])
                    with model.hooks(fwd_hooks=hooks):
                        written = model.generate(
                            written,
                            max_new_tokens=n_new,
                            stop_at_eos=False,
                            do_sample=True,
                            top_k=TOP_K,
                            return_type="tokens",
                            verbose=False,
                        )
                decoded = model.tokenizer.batch_decode(written.tolist(), skip_special_tokens=True)
                for i, text in zip(batch, decoded, strict=True):
                    texts[i] = text
    return texts
