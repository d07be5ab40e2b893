"""What is measured. Each function gives the rows of one table."""

from __future__ import annotations

import time
from typing import Any

import torch
from bench.floors import TARGET, full_backward, input_only_backward
from bench.models import MODELS, counterfact_like, random_tokens, smollm2
from bench.timing import Row, additional_peak, compared

import tl_backward as tlb

LAYERS_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
REPEATS = 7


def weights_of(model: Any) -> tuple[str, ...]:
    there = {site.kind for site in tlb.weight_sites(model)}
    return tuple(kind for kind in LAYERS_WEIGHTS if kind in there)


def capture(name: str) -> list[Row]:
    """All attention and MLP matrices of one prompt of 64 tokens."""
    model, tokens = MODELS[name](), random_tokens(64)
    weights = weights_of(model)
    hooks = {h for s in tlb.weight_sites(model, weights) for h in (s.hook_in, s.hook_out)}
    middle = model.cfg.n_layers // 2
    jobs = {
        "floor: forward + backward of inputs only": lambda: input_only_backward(model, tokens),
        "capture": lambda: tlb.run_with_backward_cache(model, tokens, TARGET, weights=weights),
        "forward + loss.backward()": lambda: full_backward(model, tokens),
        "run_with_cache(incl_bwd=True), the same hook points": lambda: incl_bwd(
            model, tokens, hooks
        ),
        f"floor from layer {middle} up": lambda: input_only_backward(
            model, tokens, f"blocks.{middle}.mlp.hook_out"
        ),
        f"capture of W_out in layer {middle}": lambda: tlb.run_with_backward_cache(
            model, tokens, TARGET, weights="W_out", layers=middle
        ),
    }
    return compared(jobs, REPEATS, "floor: forward + backward of inputs only")


def incl_bwd(model: Any, tokens: torch.Tensor, hooks: set[str]) -> None:
    """TransformerLens's own: the mean loss over the text, which is what it can differentiate."""
    model.run_with_cache(
        tokens.reshape(1, -1), return_type="loss", incl_bwd=True, names_filter=hooks.__contains__
    )
    model.zero_grad(set_to_none=True)


def algebra(_: str) -> list[Row]:
    """A gradient of 11008 x 4096 from 32 tokens, factored and dense."""
    from transformer_lens import FactoredMatrix

    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(32, d, generator=generator) for d in (11008, 4096))
    g = tlb.GradientFactors(x, delta)
    dense = g.dense()
    rows = compared(
        {
            "FactoredMatrix.svd": lambda: FactoredMatrix(x.mT, delta).svd(),
            "GradientFactors.svd": g.svd,
            "singular values": g.singular_values,
            "rank": g.rank,
        },
        REPEATS,
        "FactoredMatrix.svd",
    )
    start = time.perf_counter()
    torch.linalg.svdvals(dense)
    seconds = time.perf_counter() - start
    for row in rows:
        row["ratio to dense svdvals"] = row["seconds"] / seconds
    return rows


def lens(name: str) -> list[Row]:
    """All layers and positions of W_in and W_out, 33 tokens, ten tokens at each end."""
    model, tokens = MODELS[name](), random_tokens(33)
    reader = tlb.BackwardLogitLens(model)
    rows_read = 33 * model.cfg.n_layers * 2 - 32
    vectors = torch.randn(rows_read, model.cfg.d_model)

    def floor() -> None:
        input_only_backward(model, tokens)
        W_U = model.W_U
        for part in vectors.split(64):
            part @ W_U

    jobs = {
        "floor: that of the capture + vectors @ W_U": floor,
        "lens": lambda: reader(tokens, TARGET),
    }
    return compared(jobs, REPEATS, "floor: that of the capture + vectors @ W_U")


def sweep(_: str) -> list[Row]:
    """The lens at the last token of 200 prompts as long as CounterFact's, W_in and W_out."""
    model, records = smollm2(), counterfact_like(200)
    reader = tlb.BackwardLogitLens(model)

    def read(model: Any, batch: list[Any]) -> list[Row]:
        result = reader(batch, TARGET, positions=-1)
        return [{"rank": int(r)} for r in result["W_out"].target_ranks[-1, :, 0]]

    jobs = {
        "a call for each": lambda: [reader(one, TARGET, positions=-1) for one in records],
        "sweep in batches of 32": lambda: list(
            tlb.sweep(model, records, read, batch_size=32, length=len, progress=False)
        ),
    }
    return compared(jobs, 1, "a call for each")


def edits(_: str) -> list[Row]:
    """Rank-1 edits of W_out, each evaluated on 13 prompts: in one batch, and one at a time."""
    from tl_backward.editing import edit_hooks

    model, prompts = smollm2(), torch.stack([random_tokens(12, seed) for seed in range(13)])
    edits = [
        tlb.WeightEdit(model, {"blocks.24.mlp.W_out": tlb.GradientFactors(u, v)})
        for u, v in ((torch.randn(1, 1536), 0.01 * torch.randn(1, 576)) for _ in range(16))
    ]
    rows = torch.arange(len(edits)).repeat_interleave(len(prompts))
    batch = prompts.repeat(len(edits), 1)

    @torch.no_grad()
    def together() -> None:
        with model.hooks(fwd_hooks=edit_hooks(model, edits, rows)):
            model(batch)

    @torch.no_grad()
    def one_at_a_time() -> None:
        for edit in edits:
            with edit.applied():
                for prompt in prompts:
                    model(prompt.unsqueeze(0))

    jobs = {
        "weights written and restored, a prompt at a time": one_at_a_time,
        "16 edits in one batch, by hooks": together,
    }
    return compared(jobs, 3, "weights written and restored, a prompt at a time")


def memory(name: str) -> list[Row]:
    """By how much a process grows, against dense gradients of all attention and MLP matrices."""
    model = MODELS[name]()
    weights = weights_of(model)
    dense = 4 * sum(s.d_in * s.d_out for s in tlb.weight_sites(model, weights)) / 2**20
    rows = []
    for n in (8, 32, 128):
        tokens = random_tokens(n)
        tlb.run_with_backward_cache(model, tokens, TARGET, weights=weights)
        _, cache = tlb.run_with_backward_cache(model, tokens, TARGET, weights=weights)
        tensors = [t for g in cache.values() for t in (g.inputs, g.vjps)]
        tensors += [*cache.residual.vjps.values(), *cache.residual.activations.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        held = sum(storage.nbytes() for storage in storages.values()) / 2**20
        del cache, tensors, storages
        floor = additional_peak(lambda n=tokens: input_only_backward(model, n))
        peak = additional_peak(
            lambda n=tokens: tlb.run_with_backward_cache(model, n, TARGET, weights=weights)
        )
        rows.append(
            {
                "tokens": n,
                "dense gradients, MiB": dense,
                "the cache, MiB": held,
                "peak of the capture, MiB": peak,
                "peak of the floor, MiB": floor,
                "cache / dense": held / dense,
            }
        )
    return rows


def growth(name: str) -> list[Row]:
    """The capture with tokens, and with prompts in a batch."""
    model = MODELS[name]()
    weights, rows = weights_of(model), []
    for axis, sizes in (("tokens", (16, 64, 256, 1024)), ("prompts of 16 tokens", (1, 4, 16))):
        for size in sizes:
            prompt: Any = random_tokens(size)
            if axis != "tokens":
                prompt = [random_tokens(16, seed) for seed in range(size)]
            jobs = {
                "capture": lambda p=prompt: tlb.run_with_backward_cache(
                    model, p, TARGET, weights=weights
                )
            }
            (row,) = compared(jobs, 3, "capture")
            rows.append({"axis": axis, "size": size, "seconds": row["seconds"]})
    return rows


SECTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "capture": (capture, tuple(MODELS)),
    "lens": (lens, ("GPT-2 small", "SmolLM2-135M")),
    "algebra": (algebra, ("",)),
    "sweep": (sweep, ("",)),
    "edits": (edits, ("",)),
    "memory": (memory, ("GPT-2 small", "SmolLM2-135M")),
    "growth": (growth, ("SmolLM2-135M",)),
}
