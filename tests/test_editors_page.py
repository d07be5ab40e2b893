"""The page of editors has what the tables say."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from editors_page import page

SUCCESSES = {"efficacy": [1.0, 1.0, 0.0, 1.0], "paraphrase": [0.5, 1.0, 0.0, 0.5]}


def table_of(cases, **columns):
    found = {"case_id": cases, "error": [None] * len(cases), "seconds": [2.0, 9.0, 4.0, 1.0]}
    for kind in ("efficacy", "paraphrase", "neighborhood"):
        values = SUCCESSES.get(kind, [0.25] * 4)
        for family in ("success", "accuracy", "magnitude"):
            found[f"{kind}_{family}"] = values
    rows = pd.DataFrame({key: values[: len(cases)] for key, values in found.items()} | columns)
    return rows.assign(prepend_bos=False)


@pytest.fixture
def folder(tmp_path):
    runs = tmp_path / "single-facts"
    for name, cases, about in (
        ("unedited", [1, 2, 3], None),
        ("rome", [1, 2, 3, 4], {"settings": {}, "statistics_tokens": 12345}),
        ("mend", [2, 1], {"training": {"edit_losses": [5.0] * 10 + [3.0] * 90}}),
    ):
        (runs / name).mkdir(parents=True)
        table_of(cases).to_parquet(runs / name / "0.parquet")
        if about is None:
            continue
        if "training" in about:
            about["training"] |= {"locality_losses": [0.5], "n_records": 7, "seconds": 120.0}
        else:
            row = {"layer": 5, "score": 41.25, "measured": 4, "errors": 0}
            about |= {"tuned_on": 4, "tuning": [row]}
        (runs / f"{name}.json").write_text(json.dumps(about | {"name": name}))
    return runs


def rows_of(section):
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_page_has_means_medians_and_settings(folder):
    text = page([folder])
    sections = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    rome = rows_of(sections["Single facts"])["rome"]
    assert rome["records"] == "4" and rome["tokens"] == "12,345" and rome["seconds"] == "3.0"
    assert rome["efficacy (success)"] == "75.0" and rome["paraphrase (success)"] == "50.0"
    assert rome["score (success)"] == f"{3 / (1 / 75 + 1 / 50 + 1 / 25):.1f}"
    assert rome["perplexity"] == "-"
    common = sections["All on the same 2 records"].split("| GPT-2 XL")[0]
    assert {row["records"] for row in rows_of(common).values()} == {"2"}
    assert rows_of(common)["rome"]["efficacy (success)"] == "100.0"
    assert "| 5 | 41.25 | 0 |" in sections["Tuning"]
    assert "100 steps in 2 minutes, on 7 records" in sections["Tuning"]
    assert "went from 5.00 to 3.00 nats" in sections["Tuning"]
