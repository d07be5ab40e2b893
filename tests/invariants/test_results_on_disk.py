"""Results on disk: whatever happens to them, they are right, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tl_backward import table_files
from tl_backward.sweep import sweep

RECORDS = [{"prompt": "x" * n} for n in (3, 1, 4, 1, 5)]
SEARCH = {"deadline": None, "derandomize": True, "database": None}


def measured(model: float, batch: list[dict]) -> list[dict]:
    """Columns of several types, which come out in several encodings."""
    return [
        {"loss": model * len(r["prompt"]), "token": " Paris", "ranks": [len(r["prompt"]), 7]}
        for r in batch
    ]


def rows_in(folder: Path) -> list[dict]:
    rows = sweep(0.1, RECORDS, measured, batch_size=2, path=folder, progress=False)
    return sorted(rows, key=lambda row: row["record"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    rows_in(folder)
    return folder


@pytest.fixture(scope="module")
def expected(finished) -> list[dict]:
    rows = sweep(0.1, RECORDS, measured, progress=False)
    return sorted(rows, key=lambda row: row["record"])


# ----- damage -----


@st.composite
def damages(draw):
    """A function that damages bytes: flips a bit, overwrites, cuts, repeats, or replaces all."""
    kind = draw(st.sampled_from(["flip", "overwrite", "cut", "repeat", "replace"]))
    place, rest = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=40))
    bit = draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        return {
            "flip": content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :],
            "overwrite": content[:at] + rest + content[at + len(rest) :],
            "cut": content[:at],
            "repeat": content[:at] + content[at // 2 :],
            "replace": rest,
        }[kind]

    return damage


@given(which=st.integers(0, 2), damage=damages())
@settings(max_examples=300, **SEARCH)
def test_damaged_rows_are_refused_or_right(finished, expected, tmp_path_factory, which, damage):
    folder = tmp_path_factory.mktemp("damaged") / "sweep"
    shutil.copytree(finished, folder)
    file = sorted(folder.glob("*.parquet"))[which]
    file.write_bytes(damage(file.read_bytes()))
    try:
        rows = rows_in(folder)
    except ValueError as error:
        assert file.name in str(error), error
        file.unlink()  # as the error says
        rows = rows_in(folder)
    assert rows == expected


@given(damage=damages(), name=st.sampled_from(["_provenance.json", ".lock"]))
@settings(max_examples=50, **SEARCH)
def test_what_is_noted_beside_rows_may_be_damaged(
    finished, expected, tmp_path_factory, damage, name
):
    folder = tmp_path_factory.mktemp("damaged") / "sweep"
    shutil.copytree(finished, folder)
    noted = (folder / "_provenance.json").read_bytes()
    (folder / name).write_bytes(damage(noted))
    assert rows_in(folder) == expected
    assert json.loads((folder / "_provenance.json").read_bytes()) == json.loads(noted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    described=JSON
    | st.fixed_dictionaries(
        {"version": st.just(table_files.VERSION) | JSON, "contents": JSON},
        optional={"rows": JSON, "head": JSON},
    )
    | st.fixed_dictionaries(
        {
            "version": st.just(table_files.VERSION),
            "contents": st.fixed_dictionaries({"made_by": JSON, "records": JSON}),
            "rows": JSON,
            "head": JSON,
        }
    )
)
@settings(max_examples=200, **SEARCH)
def test_files_that_say_anything_are_refused(tmp_path_factory, described):
    folder = tmp_path_factory.mktemp("hostile")
    table = pa.table({"record": [0], "loss": [0.5]})
    metadata = {table_files.METADATA: json.dumps(described)}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "00000000.parquet")
    with pytest.raises(ValueError, match=r"00000000\.parquet (is|has)"):
        rows_in(folder)


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"records": "0"},
        {"records": [0.0]},
        {"records": [True]},
        {"records": [5]},
        {"records": [[]]},
    ],
    ids=str,
)
def test_files_that_say_other_records_are_refused(finished, tmp_path, contents):
    folder = tmp_path / "sweep"
    shutil.copytree(finished, folder)
    file = sorted(folder.glob("*.parquet"))[0]
    table, said = table_files.read(file)
    table_files.write(file, table, {"made_by": said["made_by"]} | contents)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        rows_in(folder)


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_deeply_nested_json_is_refused(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    table = pa.table({"record": [0]}).replace_schema_metadata({table_files.METADATA: nested})
    pq.write_table(table, tmp_path / "00000000.parquet")
    with pytest.raises(ValueError, match=r"00000000\.parquet is damaged"):
        rows_in(tmp_path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


ENTRIES = {
    "a folder": Path.mkdir,
    "an empty file": Path.touch,
    "a pipe": a_pipe,
    "a socket": a_socket,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such entries")
@pytest.mark.parametrize("make", ENTRIES.values(), ids=ENTRIES.keys())
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    Path("sweep").mkdir()
    make(Path("sweep") / "other")
    with pytest.raises(ValueError, match="other is damaged"):
        rows_in(Path("sweep"))


# ----- tables -----


def test_a_table_is_read_as_it_was_written(tmp_path):
    frame = pd.DataFrame(
        {
            "rank": [1, 2, 3],
            "loss": [0.5, float("nan"), float("-inf")],
            "token": [" Paris", None, "\\udc80".encode("utf-8", "replace").decode()],
            "ranks": [[1, 2], [], None],
            "when": pd.to_datetime(["2024-01-01", None, "2024-01-02"]),
        },
        index=pd.Index(["a", "b", "c"], name="record"),
    )
    file = tmp_path / "table.parquet"
    table_files.write(file, pa.Table.from_pandas(frame), {"seconds": 1.5})
    table, contents = table_files.read(file)
    assert contents == {"seconds": 1.5}
    by_pandas = pd.read_parquet(file)
    pd.testing.assert_frame_equal(table.to_pandas(), by_pandas)
    assert by_pandas.index.tolist() == ["a", "b", "c"]
    assert by_pandas["rank"].tolist() == [1, 2, 3]


# ----- the commands -----


@pytest.fixture
def run(boot, monkeypatch, tmp_path):
    """Run the command line on a tiny model and two facts."""
    model = boot("llama")
    monkeypatch.setattr("tl_backward.demo_model.load_demo_model", lambda: model)
    data = tmp_path / "facts.json"
    data.write_text(json.dumps(list(facts())))

    def run(command: str, *arguments: str):
        from tl_backward.__main__ import app

        given = [command, *map(str, arguments), "--data", str(data)]
        return CliRunner().invoke(app, given)

    run.model = model
    return run


def facts():
    for case, (subject, new, true) in enumerate(
        [("The Eiffel Tower", "Rome", "Paris"), ("London", "Paris", "Berlin")]
    ):
        yield {
            "case_id": case,
            "requested_rewrite": {
                "prompt": "{} is located in",
                "subject": subject,
                "target_new": {"str": new},
                "target_true": {"str": true},
                "relation_id": "P1",
            },
            "paraphrase_prompts": [f"Not in Berlin is {subject} located but in"],
            "neighborhood_prompts": ["The city of", "Lionel Messi plays for"],
            "generation_prompts": [f"{subject} is"],
        }


def said(shown) -> str:
    """What was printed of an error, without the spaces: long paths are broken."""
    return "".join(shown.stderr.split())


def table_of(shown) -> str:
    """The numbers that were printed; names of methods wrap."""
    assert shown.exit_code == 0, shown.output
    return shown.stdout[shown.stdout.index("efficacy") :]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--layer", "1", "--lr", "0.7"], ["--layer", "-1", "--lr", "0.7"]),
        (["--layer", "1", "--lr", "0.7"], ["--layer", "1", "--lr", "-0.7"]),
    ],
    ids=["layer", "lr"],
)
def test_evaluate_tells_signs_apart(run, tmp_path, one, other):
    for _ in range(2):  # the second time from the folders
        for options in (one, other):
            from_folder = table_of(run("evaluate", *options, "--out", tmp_path / "out"))
            assert from_folder == table_of(run("evaluate", *options))
    assert table_of(run("evaluate", *one)) != table_of(run("evaluate", *other))


def test_evaluate_tells_texts_apart(run, tmp_path, monkeypatch):
    from tl_backward import evaluation

    monkeypatch.setattr(evaluation, "N_LINES", 0)
    texts = {
        "a": "Lionel Messi plays for the city of Paris and Rome",
        "b": "Berlin is not located in London but in the city of Rome",
    }
    for folder, text in texts.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(text)
    out = ["--layer", "1", "--lr", "0.7", "--out", tmp_path / "out", "--whiten"]
    first, second = (table_of(run("evaluate", *out, tmp_path / f / "t.txt")) for f in texts)
    assert first != second
    assert first == table_of(run("evaluate", *out, tmp_path / "a" / "t.txt"))
    (tmp_path / "a" / "t.txt").write_text(texts["b"])
    refused = run("evaluate", *out, tmp_path / "a" / "t.txt")
    assert refused.exit_code == 2
    assert "holdsresultsofotherfn(method.options.statistics" in said(refused)


def test_evaluate_refuses_another_model(run, tmp_path):
    options = ["--method", "unedited", "--out", tmp_path / "out"]
    table_of(run("evaluate", *options))
    weight = run.model.blocks[1].mlp.out.weight
    with torch.no_grad():
        weight[0, 0] += 1
    refused = run("evaluate", *options)
    assert refused.exit_code == 2
    assert "holdsresultsofothermodel(weights." in said(refused)


@given(
    st.tuples(st.integers(-99, 99), st.floats().map(str), st.text(max_size=300)),
    st.tuples(st.integers(-99, 99), st.floats().map(str), st.text(max_size=300)),
)
@settings(max_examples=100, **SEARCH)
def test_every_method_has_a_folder_of_its_own(one, other):
    from tl_backward.commands.evaluate import _folder

    folders = [_folder(f"shift, layer {a}, lr {b}, whitened by {c}") for a, b, c in (one, other)]
    assert all(len(folder.encode()) < 256 and "/" not in folder for folder in folders)
    if one[:2] != other[:2]:
        assert folders[0] != folders[1]


def test_reproduce_keeps_the_chapters_of_earlier_runs(run, tmp_path):
    out = tmp_path / "report"

    def reproduced(*names: str) -> list[str]:
        shown = run("reproduce", *names, "--out", out)
        assert shown.exit_code == 0, shown.output
        page = (out / "report.html").read_text()
        return [chapter.split("</h2>")[0] for chapter in page.split("<h2>")[1:]]

    assert reproduced("vjp_norms") == ["vjp_norms"]
    figure = (out / "vjp_norms.json").read_text()
    assert reproduced("gradient_rank") == ["gradient_rank", "vjp_norms"]
    assert reproduced("gradient_rank") == ["gradient_rank", "vjp_norms"]
    assert (out / "vjp_norms.json").read_text() == figure
    from tl_backward import analysis

    table, _ = table_files.read(out / "vjp_norms.parquet")
    again = analysis.EXPERIMENTS["vjp_norms"].plot(table.to_pandas())
    assert again.to_plotly_json()["data"] is not None and again.to_json() == figure


@pytest.mark.parametrize("command", ["evaluate", "reproduce"])
@pytest.mark.parametrize("content", [b"[]", b"[" * 100_000, b"\\xff", b"{"])
def test_an_options_file_of_an_earlier_version_is_no_matter(run, tmp_path, command, content):
    arguments = ["--method", "unedited"] if command == "evaluate" else ["gradient_rank"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "options.json").write_bytes(content)
    shown = run(command, *arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output


def test_reproduce_refuses_what_it_cannot_read_and_what_something_else_made(run, tmp_path):
    out = tmp_path / "report"
    options = ["gradient_rank", "--out", out]
    assert run("reproduce", *options).exit_code == 0
    intact = (out / "gradient_rank.parquet").read_bytes()

    refused = run("reproduce", "vjp_norms", "--out", out, "-n", "1")
    assert refused.exit_code == 2
    assert "holdsresultsofotherrecords(number:2then,1now" in said(refused)

    for damaged in (b"", intact[:-9], intact.replace(b"stable_rank", b"stable_renk")):
        (out / "gradient_rank.parquet").write_bytes(damaged)
        refused = run("reproduce", "vjp_norms", "--out", out)
        assert refused.exit_code == 2
        assert "gradient_rank.parquetisdamaged" in said(refused)
    pd.DataFrame({"rank": [1]}).to_parquet(out / "gradient_rank.parquet")
    refused = run("reproduce", "vjp_norms", "--out", out)
    assert refused.exit_code == 2
    assert "gradient_rank.parquetisdamaged,ornotfromtl_backward" in said(refused)

    (out / "gradient_rank.parquet").unlink()
    assert run("reproduce", *options).exit_code == 0


def test_two_runs_of_reproduce_in_one_folder_are_refused(run, tmp_path):
    from tl_backward.provenance import only_writer

    with only_writer(tmp_path / "report"):
        refused = run("reproduce", "gradient_rank", "--out", tmp_path / "report")
    assert refused.exit_code == 2
    assert "isbeingwrittenbyanotherrun" in said(refused)
