"""Ratios of times within one run: ``make bench``, or ``python tests/bench SECTION ...``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.peer import backward_lens
from bench.sections import SECTIONS
from bench.timing import as_table

PEER = "transformer_lens.tools.analysis.backward_lens"


def main(names: list[str]) -> None:
    torch.set_num_threads(2)
    sections = dict(SECTIONS)
    if find_spec(PEER):
        sections = {"BackwardLens": (backward_lens, ("",))}
    found = []
    for name in names or sections:
        section, models = sections[name]
        for model in models:
            rows = section(model)
            title = f"{name} {model}: {section.__doc__.splitlines()[0]}"
            Console(width=140).print(as_table(title, rows))
            found += [{"section": name, "model": model, **row} for row in rows]
    path = Path(f"bench-{version('transformer-lens')}.json")
    path.write_text(json.dumps(found, indent=1))
    print(f"as JSON: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
