"""Times and memory of jobs, side by side within one run."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

Job = Callable[[], object]
Row = dict[str, Any]


def seconds_of(jobs: Mapping[str, Job], repeats: int) -> dict[str, list[float]]:
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


def compared(jobs: Mapping[str, Job], repeats: int, baseline: str) -> list[Row]:
    """Median seconds of each job, and the ratio to those of the baseline in the same turn."""
    seconds = seconds_of(jobs, repeats)
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        rows.append(
            {
                "job": name,
                "seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def ratio_of(rows: list[Row], job: str, other: str) -> float:
    """The ratio of two jobs' medians."""
    seconds = {row["job"]: row["seconds"] for row in rows}
    return seconds[job] / seconds[other]


def additional_peak(job: Job) -> float:
    """By how many MiB the process grows at most while a job runs (Linux only)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier jobs have freed would be used again
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = job()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def as_table(title: str, rows: list[Row]) -> Table:
    """The rows as they are printed."""
    table = Table(title=f"{title}; {torch.get_num_threads()} threads")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "job" else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
