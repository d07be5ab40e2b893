"""Against the ``BackwardLens`` of TransformerLens 4.2, in an environment with that version."""

from __future__ import annotations

from bench.models import gpt2_small
from bench.timing import Row, additional_peak, compared

import tl_backward as tlb

PROMPT = " city" * 32
TARGET = " Paris"


def backward_lens(_: str) -> list[Row]:
    """All layers and positions of W_in and W_out, 33 tokens, ten tokens at each end."""
    from transformer_lens.tools.analysis.backward_lens import BackwardLens

    model = gpt2_small()
    ours, theirs = tlb.BackwardLogitLens(model), BackwardLens(model)
    jobs = {
        "BackwardLens.analyze": lambda: theirs.analyze(PROMPT, TARGET, range(12)),
        "BackwardLogitLens": lambda: ours(PROMPT, TARGET),
    }
    rows = compared(jobs, 5, "BackwardLens.analyze")
    peaks = {name: additional_peak(job) for name, job in jobs.items()}
    for row in rows:
        row["additional peak, MiB"] = peaks[row["job"]]
        row["ratio of it"] = peaks[row["job"]] / peaks["BackwardLens.analyze"]
    return rows
