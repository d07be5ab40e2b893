"""Against the ``BackwardLens`` of TransformerLens 4.2, in an environment with that version."""

from __future__ import annotations

from bench.models import gpt2_small
from bench.timing import Comparison, Row, Section, additional_peak, timed

import tl_backward as tlb

PROMPT = " city" * 32
TARGET = " Paris"


def backward_lens(_: str) -> list[Row]:
    """All layers and positions of W_in and W_out, 33 tokens, ten tokens at each end."""
    from transformer_lens.tools.analysis.backward_lens import BackwardLens

    model = gpt2_small()
    ours, theirs = tlb.BackwardLogitLens(model), BackwardLens(model)
    jobs = {
        "analyze": lambda: theirs.analyze(PROMPT, TARGET, range(12)),
        "lens": lambda: ours(PROMPT, TARGET),
    }
    what = "lens / BackwardLens.analyze"
    rows = timed(Section(jobs, [Comparison(what, "lens", "analyze", 0.5)], repeats=5))
    peaks = {name: additional_peak(job) for name, job in jobs.items()}
    memory = {
        "what": f"{what}, additional memory",
        "ratio": peaks["lens"] / peaks["analyze"],
        "at most": 0.2,
        "MiB": peaks["lens"],
        "against, MiB": peaks["analyze"],
    }
    return [*rows, memory]
