"""Text generation, with and without edits."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Categorical

from tl_backward._undo import Undo
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.run_hooks import Run
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing import WeightEdit, edit_hooks
from tl_backward.sites import Model, all_modules, occupy, require_eval_mode

TOP_K = 5
MAX_TOKENS = 100
SEED = 0
N_PROBED = 3
"""Number of prompt tokens, and of new tokens, for the test of the KV cache."""

_cache_is_right: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


@torch.no_grad()
def generate_tokens(
    model: Model, tokens: Int[Tensor, "batch pos"], n_new: int, *, top_k: int = 1
) -> Int[Tensor, "batch longer"]:
    """Continue texts of the same length by ``n_new`` tokens each.

    Some versions of transformers and TransformerLens lose or misread the KV cache and write
    nonsense without an error. The first call for a model therefore compares next-token logits with
    and without the cache, on the beginnings of these texts. If they differ, every token comes from
    a forward pass over the whole text, which is slower but correct in every version.

    Args:
        model: A TransformerLens model. Its hooks take part; with the cache, they see only the last
            token of a text.
        tokens: Token ids, without padding.
        n_new: Number of tokens to add; an end-of-text token does not end a text.
        top_k: Number of most probable tokens to sample from. Default: greedy decoding.

    Returns:
        ``tokens`` and their continuation, on the model's device.

    Raises:
        ValueError: If ``n_new`` or ``top_k`` is not positive, there is no token to continue, the
            texts would exceed the model's context, or training mode changes the result.

    Warns:
        UserWarning: Once for each model whose KV cache is not used, with the versions.

    Example:
        >>> tokens = generate_tokens(model, model.to_tokens("Lionel Messi plays for"), 12)
        >>> model.tokenizer.decode(tokens[0])
    """
    for name, value in (("n_new", n_new), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    length, n_ctx = tokens.shape[1], model.cfg.n_ctx
    if not tokens.numel():
        raise ValueError("tokens is empty; pass at least one token of each text")
    if n_ctx and length + n_new > n_ctx:
        raise ValueError(
            f"n_new is {n_new}, but after {length} tokens the model's context of {n_ctx} has room "
            f"for {n_ctx - length} more"
        )
    require_eval_mode(model)
    tokens = tokens.to(model.cfg.device)
    if model not in _cache_is_right:
        _cache_is_right[model] = _try_cache(model, tokens[:, :N_PROBED])
    if _cache_is_right[model]:
        return _generate_with_cache(model, tokens, n_new, top_k)
    for _ in range(n_new):
        chosen = _choose(model(tokens, return_type="logits")[:, -1], top_k)
        tokens = torch.cat([tokens, chosen.to(tokens.device).unsqueeze(1)], dim=1)
    return tokens


def _choose(logits: Float[Tensor, "batch d_vocab"], top_k: int) -> Int[Tensor, "batch"]:
    """Sample the next tokens, with the same random numbers as TransformerLens's ``generate``."""
    if top_k == 1:
        return logits.argmax(-1)
    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return Categorical(logits=logits.masked_fill(logits < least, -torch.inf).float()).sample()


def _generate_with_cache(
    model: Model, tokens: Int[Tensor, "batch pos"], n_new: int, top_k: int
) -> Int[Tensor, "batch longer"]:
    with Undo() as undo, undo, undo:
        for _, module in all_modules(model):  # HookedTransformer leaves them in eval mode
            undo.add(setattr, module, "training", module.training)
        return model.generate(
            tokens,
            max_new_tokens=n_new,
            stop_at_eos=False,
            do_sample=top_k > 1,
            top_k=top_k,
            use_past_kv_cache=True,
            return_type="tokens",
            verbose=False,
        )


def _try_cache(model: Model, prompts: Int[Tensor, "batch pos"]) -> bool:
    """Whether generation with the KV cache gives the logits of whole forward passes.

    Warns:
        UserWarning: If it does not.
    """
    try:
        with _recorded_logits(model) as cached:
            tokens = _generate_with_cache(model, prompts, N_PROBED, top_k=1)
    except Exception as error:  # TransformerLens can raise anything here
        complaint = f"fails with {type(error).__name__}: {error}"
    else:
        with _recorded_logits(model) as whole:
            for length in range(prompts.shape[1], tokens.shape[1]):
                model(tokens[:, :length])
        difference = _relative_difference(torch.stack(cached), torch.stack(whole))
        # transformers computes rotations and norms in float32, whatever the model's precision
        eps = max(torch.finfo(dtype).eps for dtype in (cached[0].dtype, torch.float32))
        if difference <= eps**0.5:
            return True
        complaint = f"gives other logits than whole forward passes (by {difference:.0%})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers"))
    warnings.warn(
        f"generation with the KV cache {complaint} in {versions}; texts are generated without it, "
        "which is correct but slower",
        stacklevel=3,
    )
    return False


@contextmanager
def _recorded_logits(model: Model) -> Iterator[list[Float[Tensor, "batch d_vocab"]]]:
    """Record the last token's logits in every forward pass, before any soft cap."""
    logits: list[Tensor] = []
    handle = model.unembed.register_forward_hook(
        lambda module, args, output: logits.append(output[:, -1])
    )
    try:
        yield logits
    finally:
        handle.remove()


def _relative_difference(
    a: Float[Tensor, "step batch d_vocab"], b: Float[Tensor, "step batch d_vocab"]
) -> float:
    """The relative difference of logits up to an additive constant per row."""
    a, b = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (a, b))
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def generate_texts(
    model: Model,
    prompts: Sequence[str],
    *,
    edits: Sequence[WeightEdit] = (),
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
) -> list[str]:
    """Continue each prompt, under its own edit, until the text has 100 tokens.

    Each token is sampled from the five most probable ones. An end-of-text token does not end a
    text; special tokens are removed from the returned texts. Prompts with the same number of tokens
    share a batch, and thus random numbers. Every call starts from the same seed and restores the
    program's random state.

    Args:
        model: A TransformerLens model in eval mode.
        prompts: The prompts to continue.
        edits: The edits, applied by hooks.
        rows: Index of each prompt's edit, or -1 for none. Default: no edits.
        batch_size: Maximum number of texts in a batch.
        prepend_bos: Whether prompts begin with a BOS token, which counts among the 100. Default: as
            the tokenizer does.

    Returns:
        The texts, including the prompts.

    Raises:
        ValueError: If ``rows`` and ``prompts`` differ in number.

    Warns:
        UserWarning: As :func:`generate_tokens`.
    """
    edit_rows = [-1] * len(prompts) if rows is None else list(rows)
    if len(edit_rows) != len(prompts):
        raise ValueError(f"rows has {len(edit_rows)} entries, but there are {len(prompts)} prompts")
    by_length = defaultdict(list)
    bos = prepends_bos(model, prepend_bos)
    tokens = prompt_tokens(model, prompts, bos) if prompts else []
    for i, ids in enumerate(tokens):
        by_length[len(ids)].append(i)
    n_ctx = model.cfg.n_ctx or MAX_TOKENS
    texts = [""] * len(prompts)
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        _seed(undo)
        for length, indices in sorted(by_length.items()):
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                written = torch.stack([tokens[i] for i in batch]).to(model.cfg.device)
                n_new = min(MAX_TOKENS, n_ctx) - length
                if n_new > 0:
                    hooks = edit_hooks(model, edits, [edit_rows[i] for i in batch])
                    with Undo() as batch_undo, batch_undo, batch_undo:
                        Run(batch_undo).put_hooks(model, batch_undo, hooks)
                        written = generate_tokens(model, written, n_new, top_k=TOP_K)
                decoded = model.tokenizer.batch_decode(written.tolist(), skip_special_tokens=True)
                for i, text in zip(batch, decoded, strict=True):
                    texts[i] = text
    return texts


def _seed(undo: Undo) -> None:
    """Seed the random generators of all devices until undone."""
    undo.add(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_available():
        undo.add(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    torch.manual_seed(SEED)
