"""Ratios of times within one run: ``make bench``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import tl_backward as tlb
from tl_backward.demo_model import load_demo_model

REPEATS = 9
TOKENS = 64


def interleaved_seconds(jobs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Each job's times, taken in turns so that a slow moment of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(REPEATS):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    torch.set_num_threads(2)
    model = load_demo_model()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, model.cfg.d_vocab, (1, TOKENS), generator=generator)
    target = 1000

    def forward_and_full_backward() -> None:
        loss = -model(tokens)[0, -1].log_softmax(-1)[target]
        loss.backward()
        model.zero_grad(set_to_none=True)

    weights = ("W_in", "W_gate", "W_out")
    jobs = {
        "forward + loss.backward()": forward_and_full_backward,
        "forward alone, no_grad": lambda: torch.no_grad()(model)(tokens),
        "capture of W_in, W_gate, W_out": lambda: tlb.run_with_backward_cache(
            model, tokens, target, weights=weights
        ),
    }
    seconds = interleaved_seconds(jobs)
    baseline = next(iter(jobs))
    table = Table(title=f"SmolLM2-135M, {TOKENS} tokens, median of {REPEATS}, 2 threads")
    for column in ("job", "seconds", f"ratio to {baseline}", "range of the ratio"):
        table.add_column(column, justify="left" if column == "job" else "right")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(times):.3f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
