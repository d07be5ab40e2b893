"""``demos/pages/editors.md``, from the tables that ``evaluate --out`` has written.

``python tests/editors_page.py FOLDER ...`` takes the folders of several runs; each has a table for
every method, and a JSON file that says how it was made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from tl_backward.evaluation import summarise

PAGE = Path(__file__).parents[1] / "demos" / "pages" / "editors.md"
METRICS = {
    "records": ("records", "measured"),
    "errors": ("records", "errors"),
    "efficacy (success)": ("success", "efficacy"),
    "paraphrase (success)": ("success", "paraphrase"),
    "neighbourhood (success)": ("success", "neighborhood"),
    "score (success)": ("success", "score"),
    "efficacy (accuracy)": ("accuracy", "efficacy"),
    "paraphrase (accuracy)": ("accuracy", "paraphrase"),
    "neighbourhood (accuracy)": ("accuracy", "neighborhood"),
    "score (accuracy)": ("accuracy", "score"),
    "n-gram entropy": ("text", "ngram_entropy"),
    "perplexity": ("text", "perplexity"),
}
PAPER = """
| GPT-2 XL, 1,000 records (the paper's Table 1, accuracies) | efficacy | paraphrase | \
neighbourhood | n-gram entropy | perplexity |
|---|---:|---:|---:|---:|---:|
| unedited | 0.4 | 0.4 | 11.21 | 626.94 | 93.56 |
| fine-tuning, MLP 0 | 96.37 | 7.46 | 10.12 | 618.81 | 199.84 |
| fine-tuning, MLP 35 | 100 | 46.1 | 5.59 | 618.5 | 103.42 |
| MEND | 71.4 | 17.6 | 7.73 | 623.94 | 94.96 |
| ROME | 99.4 | 71.9 | 10.91 | 622.78 | 137.38 |
| MEMIT | 79.4 | 40.7 | 10.98 | 627.18 | 93.6 |
| forward pass shift | 99.4 | 41.55 | 6.02 | 622.45 | 93.66 |
"""
HEAD = """# Editors, side by side

SmolLM2-135M-Instruct on CounterFact records, prompts without BOS, float32, one CPU thread with
other work on the machine (so the seconds are an upper bound). Means over records in per cent.

- Success: the new target is more probable than the true one, for neighbours the other way round.
  Accuracy: all its tokens are the most probable ones. Score: harmonic mean of the three.
- Errors: records without an edit, or measured with the best edit of a search that fell short; a
  group that is edited together falls short when one of its facts does.
- Perplexity: of the first lines of WikiText-2, the mean of each line's, with the number of records
  for whose edits it was taken. A dash is what was not measured.
- Seconds: median over the records, of a group the share of each, without the making of
  statistics, contexts and MEND editors. Tokens: what the keys' statistics were taken on.
- Where settings were chosen, it was by the score on records that are not measured; the last
  section lists what was tried.

`python tests/editors_page.py FOLDER ...` wrote this page from the tables of runs such as

```sh
python -m tl_backward evaluate --data counterfact.json -n 200 --layer 26 --tokens all \\
    --set value=centred --whiten wikitext.txt --out target-and-centred
python -m tl_backward evaluate --data counterfact.json -n 100 --layer 26 --tokens all \\
    --set joint=true --whiten wikitext.txt --size 100 --perplexity wikitext.txt --out many-facts
python -m tl_backward evaluate --data counterfact.json -n 200 --method rome --layer 5,10,15 \\
    --whiten wikitext.txt --perplexity wikitext.txt --text-every 20 --out single-facts
```

For another model pass its name and layers: `--model gpt2-xl --method rome --layer 13,17,21`.
"""


def runs_of(folder: Path) -> dict[str, tuple[dict[str, Any], pd.DataFrame]]:
    """By name of the method, how it was run, and its table."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        about = json.loads(file.read_text())
        found[about["name"]] = about, pd.read_parquet(file.with_suffix(""))
    if (folder / "unedited").is_dir():
        found = {"unedited": ({}, pd.read_parquet(folder / "unedited"))} | found
    return found


def as_table(runs: dict[str, tuple[dict[str, Any], pd.DataFrame]]) -> list[str]:
    """The methods side by side, as the lines of a Markdown table."""
    summary = summarise({name: frame for name, (_, frame) in runs.items()})
    head = ["method", *METRICS, "seconds", "tokens"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, (about, frame) in runs.items():
        values = [summary.loc[name].get(column, float("nan")) for column in METRICS.values()]
        cells = [_shown(value, i < 2) for i, value in enumerate(values)]
        for i, (family, metric) in enumerate(METRICS.values()):
            if family == "text" and metric in frame:
                cells[i] += f" ({frame[metric].notna().sum()})"
        seconds = frame["seconds"].median() if name != "unedited" else float("nan")
        cells += [f"{seconds:.1f}" if seconds == seconds else "-"]
        cells += [f"{about['statistics_tokens']:,}" if "statistics_tokens" in about else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def tuning_of(about: dict[str, Any]) -> list[str]:
    """What was tried for a method."""
    tried = pd.DataFrame(about["tuning"]).drop(columns="measured")
    head = " | ".join(tried.columns)
    lines = [
        f"\n**{about['name']}**, by {about['tuned_on']} records:\n",
        f"| {head} |",
        "|" + "---:|" * len(tried.columns),
    ]
    rows = tried.to_dict("records")
    return lines + [f"| {' | '.join(_setting(v) for v in row.values())} |" for row in rows]


def training_of(about: dict[str, Any]) -> str:
    """How a MEND editor was trained."""
    training = about["training"]
    edits, local = training["edit_losses"], training["locality_losses"]
    part = max(1, len(edits) // 10)
    first, last = (sum(some) / part for some in (edits[:part], edits[-part:]))
    kl = sum(local[-part:]) / part
    return (
        f"\n**{about['name']}** was trained for {len(edits)} steps in "
        f"{training['seconds'] / 60:.0f} minutes, on {training['n_records']} records that are not "
        "measured. From the first to the last tenth of the steps the negative log-likelihood of "
        f"the new targets went from {first:.2f} to {last:.2f} nats, with a divergence of {kl:.3f} "
        "nats at neighbours."
    )


def page(folders: list[Path]) -> str:
    """The whole page."""
    lines, single, every = [HEAD], {}, {}
    for folder in folders:
        runs = runs_of(folder)
        every |= runs
        single |= {name: run for name, run in runs.items() if run[0].get("size", 1) == 1}
        lines += [f"\n## {folder.name.capitalize().replace('-', ' ')}\n", *as_table(runs)]
    shared = set.intersection(*(set(frame["case_id"]) for _, frame in single.values()))
    common = {
        name: (about, frame[frame["case_id"].isin(shared)])
        for name, (about, frame) in single.items()
    }
    lines += [f"\n## All on the same {len(shared)} records\n", *as_table(common), PAPER]
    lines.append("\n## Tuning")
    for about, _ in every.values():
        lines += tuning_of(about) if "tuning" in about else []
        lines += [training_of(about)] if "training" in about else []
    return "\n".join(lines) + "\n"


def _shown(value: float, whole: bool) -> str:
    if value != value:
        return "-"
    return f"{value:.0f}" if whole else f"{value:.1f}"


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page([Path(folder) for folder in sys.argv[1:]]))
