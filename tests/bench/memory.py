"""How memory and time grow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench.floors import TARGET, input_only_backward
from bench.models import MODELS, random_tokens, smollm2_of
from bench.sections import weights_of
from bench.timing import Row, additional_peak, seconds_of

import tl_backward as tlb

TOKENS = (16, 32, 64, 128, 256, 512, 1024)
PROMPTS = (1, 2, 4, 8, 16, 32)
LAYERS = (2, 4, 8, 16)


def memory(name: str) -> list[Row]:
    """By how many MiB a process grows for a capture of all attention and MLP matrices."""
    model = MODELS[name]()
    sites = tlb.weight_sites(model, weights_of(model))
    dense = 4 * sum(site.d_in * site.d_out for site in sites) / 2**20
    return [
        {
            "tokens": n,
            "dense gradients": dense,
            "capture, peak": peak,
            "ratio": peak / dense,
            "at most": 0.05,
            "the cache": held,
            "forward + input-only backward, peak": floor,
        }
        for n in (8, 32, 128)
        for held, peak, floor in [_memory_of_capture(model, random_tokens(n))]
    ]


def growth(name: str) -> list[Row]:
    """The capture of all attention and MLP matrices: by tokens, prompts of 16 tokens, layers."""
    rows = []
    for axis, size, model, prompt in _sizes(name):
        run = partial(tlb.run_with_backward_cache, model, prompt, TARGET, weights=weights_of(model))
        floor = partial(input_only_backward, model, prompt)
        seconds = seconds_of({"capture": run, "floor": floor}, 3)
        held = _held(run()[1])
        rows.append(
            {
                "axis": axis,
                "size": size,
                "ms": 1000 * min(seconds["capture"]),
                "floor, ms": 1000 * min(seconds["floor"]),
                "the cache, MiB": held,
            }
        )
    return rows


def _sizes(name: str) -> Iterator[tuple[str, int, Any, torch.Tensor]]:
    model = MODELS[name]()
    for n in TOKENS:
        yield "tokens", n, model, random_tokens(n)
    for n in PROMPTS:
        yield "prompts", n, model, torch.stack([random_tokens(16, seed) for seed in range(n)])
    for n in LAYERS:
        yield "layers", n, smollm2_of(n), random_tokens(64)


def _memory_of_capture(model: Any, tokens: torch.Tensor) -> tuple[float, float, float]:
    run = partial(tlb.run_with_backward_cache, model, tokens, TARGET, weights=weights_of(model))
    run()
    held = _held(run()[1])
    floor = additional_peak(lambda: input_only_backward(model, tokens))
    return held, additional_peak(run), floor


def _held(cache: tlb.BackwardCache) -> float:
    """What a cache keeps, in MiB; tensors that share memory count once."""
    tensors = [tensor for g in cache.values() for tensor in (g.inputs, g.vjps)]
    tensors += [*cache.residual.vjps.values(), *cache.residual.activations.values()]
    storages = {tensor.untyped_storage() for tensor in tensors}
    by_place = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(by_place.values()) / 2**20


TABLES = {
    "memory": (memory, tuple(MODELS)),
    "growth": (growth, ("SmolLM2-135M",)),
}
