"""Ratios of times within one run: ``make bench``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_backward as tlb
from tl_backward.demo_model import load_demo_model

REPEATS = 9
TOKENS = 64
BATCH = 32
MLP = ("W_in", "W_gate", "W_out")


def interleaved_seconds(
    jobs: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Each job's times, taken in turns so that a slow moment of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(title: str, jobs: dict[str, Callable[[], object]], repeats: int) -> Table:
    """Seconds of each job, and their ratio to those of the first one in the same turn."""
    seconds = interleaved_seconds(jobs, repeats)
    baseline = next(iter(jobs))
    table = Table(title=f"{title}, median of {repeats}, {torch.get_num_threads()} threads")
    for column in ("job", "seconds", f"ratio to {baseline}", "range of the ratio"):
        table.add_column(column, justify="left" if column == "job" else "right")
    for name, times in seconds.items():
        of_turns = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(times):.3f}",
            f"{statistics.median(of_turns):.2f}",
            f"{min(of_turns):.2f}-{max(of_turns):.2f}",
        )
    return table


def capture(model: TransformerBridge) -> Table:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, model.cfg.d_vocab, (1, TOKENS), generator=generator)
    target = 1000

    def forward_and_full_backward() -> None:
        loss = -model(tokens)[0, -1].log_softmax(-1)[target]
        loss.backward()
        model.zero_grad(set_to_none=True)

    jobs = {
        "forward + loss.backward()": forward_and_full_backward,
        "forward alone, no_grad": lambda: torch.no_grad()(model)(tokens),
        "capture of W_in, W_gate, W_out": lambda: tlb.run_with_backward_cache(
            model, tokens, target, weights=MLP
        ),
    }
    return ratios(f"SmolLM2-135M, {TOKENS} tokens", jobs, REPEATS)


def batch(model: TransformerBridge) -> Table:
    """Prompts as long as CounterFact's, in one call and one by one."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(100, model.cfg.d_vocab, (n,), generator=generator)
        for n in torch.randint(7, 16, (BATCH,), generator=generator).tolist()
    ]
    jobs = {
        f"one call for {BATCH} prompts": lambda: tlb.run_with_backward_cache(
            model, prompts, 1000, weights=MLP
        ),
        "a call for each": lambda: [
            tlb.run_with_backward_cache(model, prompt, 1000, weights=MLP) for prompt in prompts
        ],
    }
    return ratios(f"SmolLM2-135M, {BATCH} prompts of 7 to 15 tokens", jobs, 3)


def memory(model: TransformerBridge) -> Table:
    """A cache of all attention and MLP matrices against the same gradients, held densely."""
    table = Table(title="SmolLM2-135M, all attention and MLP matrices, MiB")
    for column in ("tokens", "factors", "the whole cache", "dense gradients", "ratio"):
        table.add_column(column, justify="right")
    sites = [site for site in tlb.weight_sites(model) if site.layer is not None]
    dense = sum(site.d_in * site.d_out for site in sites) * 4
    for n in (8, 32, 128):
        tokens = torch.arange(100, 100 + n)
        _, cache = tlb.run_with_backward_cache(
            model, tokens, 1000, weights=sorted({site.kind for site in sites})
        )
        factors = [x for g in cache.values() for x in (g.inputs, g.vjps)]
        residual = [*cache.residual.vjps.values(), *cache.residual.activations.values()]
        whole = in_memory([*factors, *residual, *cache.behind_norms.values()])
        sizes = [in_memory(factors), whole, dense]
        table.add_row(str(n), *(f"{size / 2**20:.1f}" for size in sizes), f"{whole / dense:.3f}")
    return table


def in_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, those that are shared once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def main() -> None:
    torch.set_num_threads(2)
    model = load_demo_model()
    for job in (capture, batch, memory):
        Console().print(job(model))


if __name__ == "__main__":
    main()
