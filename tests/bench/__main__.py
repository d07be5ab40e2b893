"""Ratios of times within one run: ``make bench``, or ``python tests/bench SECTION ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import TABLES
from bench.peer import backward_lens
from bench.sections import SECTIONS
from bench.timing import Row, timed

PEER = "transformer_lens.tools.analysis.backward_lens"
N_THREADS = 2


def main(names: list[str]) -> None:
    torch.set_num_threads(N_THREADS)
    found = []
    for name, about, model, rows in _measured(names):
        Console(width=150).print(_as_table(f"{name} {model}: {about}", rows))
        found += [{"section": name, "model": model, **row} for row in rows]
    path = Path(f"bench-{version('transformer-lens')}.json")
    path.write_text(json.dumps(found, indent=1))
    print(f"as JSON: {path}")


def _measured(names: list[str]) -> Iterator[tuple[str, str, str, list[Row]]]:
    """The rows of each section and model, with what they are about."""
    tables = {"BackwardLens": (backward_lens, ("GPT-2 small",))} if find_spec(PEER) else TABLES
    sections = {} if find_spec(PEER) else SECTIONS
    for name in names or [*sections, *tables]:
        measure, models = (sections | tables)[name]
        for model in models:
            made = measure(model)
            rows = timed(made) if name in sections else made
            yield name, measure.__doc__.splitlines()[0], model, rows


def _as_table(title: str, rows: list[Row]) -> Table:
    table = Table(title=f"{title}; {torch.get_num_threads()} threads")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    return table


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
