"""Times of jobs, side by side within one run, and how much memory they take."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LEAST_SECONDS = 0.05

Job = Callable[[], object]
Row = dict[str, Any]


class Comparison(NamedTuple):
    """One job's time against another's, times a factor, and what it should be at most."""

    what: str
    job: str
    against: str
    at_most: float
    factor: float = 1.0


class Section(NamedTuple):
    """Jobs that are timed together."""

    jobs: Mapping[str, Job]
    comparisons: Sequence[Comparison]
    repeats: int = 7


def timed(section: Section) -> list[Row]:
    """The median ratio of every comparison over the turns, and its spread."""
    seconds = seconds_of(section.jobs, section.repeats)
    return [
        {
            "what": comparison.what,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "at most": comparison.at_most,
            "ms": 1000 * statistics.median(seconds[comparison.job]),
            "against, ms": 1000 * statistics.median(seconds[comparison.against]),
        }
        for comparison in section.comparisons
        for ratios in [
            [
                a / (b * comparison.factor)
                for a, b in zip(seconds[comparison.job], seconds[comparison.against], strict=True)
            ]
        ]
    ]


def seconds_of(jobs: Mapping[str, Job], repeats: int) -> dict[str, list[float]]:
    """Each job's times, taken in turns so that a slow moment of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            gc.collect()
            seconds[name].append(_seconds_per_call(job))
    return seconds


def _seconds_per_call(job: Job) -> float:
    """A short job is called several times: right after a long one, it would find cold caches."""
    start, elapsed, n_calls = time.perf_counter(), 0.0, 0
    while elapsed < LEAST_SECONDS:
        job()
        n_calls += 1
        elapsed = time.perf_counter() - start
    return elapsed / n_calls


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
