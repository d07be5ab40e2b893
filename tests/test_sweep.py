"""Sweeps: the same table as a plain loop, whatever interrupts it and however many run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import accelerate
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers.counting import RECORDS, Calls, count_characters
from helpers.texts import TARGET
from helpers.versions import NEEDS_BRIDGE
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_backward import provenance, table_files
from tl_backward.sweep import _batches, sweep


def plain_loop(model: int = 10) -> list[dict]:
    return [
        {"record": record["id"], "n": model * len(record["prompt"]), "k": k}
        for record in RECORDS
        for k in range(record["id"] % 3)
    ]


def ordered(rows) -> list[dict]:
    return sorted(rows, key=lambda row: row["record"])


def on_disk(path: Path) -> list[dict]:
    return ordered(pd.read_parquet(path).to_dict("records"))


def files(path: Path) -> list[Path]:
    """What readers of Parquet read in a folder."""
    return sorted(file for file in path.iterdir() if not file.name.startswith((".", "_")))


# ----- the table -----


@pytest.mark.parametrize("batch_size", [1, 3, 11, 100])
@pytest.mark.parametrize("on", ["disk", "memory"])
def test_the_table_is_that_of_a_plain_loop(tmp_path, batch_size, on):
    path = tmp_path / "new" / "sweep" if on == "disk" else None
    rows = sweep(10, RECORDS, count_characters, batch_size=batch_size, path=path, progress=False)
    rows = list(rows)
    assert ordered(rows) == plain_loop()
    assert list(rows[0]) == ["record", "n", "k"]
    if path:
        assert on_disk(path) == plain_loop()
        assert list(pd.read_parquet(path)) == ["record", "n", "k"]
    assert sorted(os.listdir(tmp_path)) == (["new"] if path else [])


@pytest.mark.parametrize(
    "records",
    [
        Dataset.from_list(RECORDS),
        Dataset.from_list(RECORDS).to_iterable_dataset(),
        tuple(RECORDS),
        (record for record in RECORDS),
    ],
    ids=lambda records: type(records).__name__,
)
def test_records_may_be_anything_to_iterate_over(tmp_path, records):
    rows = list(sweep(10, records, count_characters, path=tmp_path, progress=False))
    assert ordered(rows) == plain_loop() == on_disk(tmp_path)


def test_a_dataset_is_recognised_as_the_list_it_was_made_of(tmp_path):
    list(sweep(10, RECORDS, Calls(), path=tmp_path, progress=False))
    calls = Calls()
    again = sweep(10, Dataset.from_list(RECORDS), calls, path=tmp_path, progress=False)
    assert ordered(again) == plain_loop()
    assert calls.batches == []


def test_batches_begin_with_the_longest_and_keep_the_order_of_equals():
    calls = Calls()
    list(sweep(10, RECORDS, calls, batch_size=4, progress=False))
    assert calls.batches == [[1, 7, 10, 5], [8, 3, 4, 0], [6, 2, 9]]
    calls = Calls()
    list(sweep(10, RECORDS, calls, batch_size=4, length=lambda r: r["id"], progress=False))
    assert calls.batches == [[10, 9, 8, 7], [6, 5, 4, 3], [2, 1, 0]]


def test_without_prompts_records_stay_in_order():
    seen = []
    list(sweep(None, list("abcde"), lambda m, b: seen.append(b) or [[]] * len(b), batch_size=2))
    assert seen == [["a", "b"], ["c", "d"], ["e"]]


@given(
    lengths=st.lists(st.integers(0, 9) | st.floats(0, 9), max_size=40),
    batch_size=st.integers(1, 12),
    data=st.data(),
)
@settings(deadline=None, derandomize=True, max_examples=100, database=None)
def test_batches_have_each_record_once_and_neighbours_together(lengths, batch_size, data):
    indices = range(len(lengths))
    done = data.draw(st.sets(st.sampled_from(indices))) if lengths else set()
    batches = _batches(lengths, batch_size, done)
    flat = [i for batch in batches for i in batch]
    assert flat == sorted(set(indices) - done, key=lambda i: (-lengths[i], i))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("path", [None, "sweep"])
def test_no_records_no_rows(tmp_path, path):
    path = path and tmp_path / path
    assert list(sweep(10, [], count_characters, path=path, progress=False)) == []


def test_tensors_and_arrays_become_numbers(tmp_path):
    def fn(model, batch):
        weight = torch.tensor(1.5, requires_grad=True)
        return [
            {
                "tensor": weight * 2,
                "half": torch.tensor(0.5, dtype=torch.bfloat16),
                "rank": torch.tensor(3),
                "hit": np.bool_(True),
                "mean": np.float32(0.25),
                "norms": torch.tensor([1.0, 2.0]),
                "text": " Paris",
            }
            for _ in batch
        ]

    want = {"record": 0, "tensor": 3.0, "half": 0.5, "rank": 3, "hit": True, "mean": 0.25}
    want |= {"norms": [1.0, 2.0], "text": " Paris"}
    for path in (None, tmp_path):
        (row,) = sweep(None, [{}], fn, path=path, progress=False)
        assert row == want
        assert [type(value) for value in row.values()] == [type(value) for value in want.values()]
    (row,) = on_disk(tmp_path)
    assert row["norms"].tolist() == want["norms"]
    assert row | {"norms": want["norms"]} == want


def test_tensors_and_arrays_within_lists_and_mappings_do_too(tmp_path):
    def fn(model, batch):
        norms = [torch.tensor(1.5), torch.tensor(2.0)]
        best = {"rank": np.int64(2), "tokens": (torch.tensor([3, 1]), [np.int32(4)])}
        return [{"norms": norms, "best": best} for _ in batch]

    want = {"record": 0, "norms": [1.5, 2.0], "best": {"rank": 2, "tokens": [[3, 1], [4]]}}
    for path in (None, tmp_path):
        assert list(sweep(None, [{}], fn, path=path, progress=False)) == [want]
        (row,) = sweep(None, [{}], fn, path=path, progress=False)
        assert json.dumps(row) == json.dumps(want)


def test_progress_counts_records(capsys):
    list(sweep(10, RECORDS, count_characters, progress=False))
    assert capsys.readouterr().err == ""
    list(sweep(10, RECORDS, count_characters))
    assert "11/11" in capsys.readouterr().err


# ----- columns of different types -----


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(
    "values",
    [
        [None, 1, None, 2],
        [None, None, None, None],
        [1, 2.5, None, 3],
        [None, "a", None, "b"],
        [[], [1], None, [2, 3]],
        [{"x": None}, {"x": 1}, {"y": 2.5}, None],
        [None, True, None, False],
    ],
    ids=str,
)
def test_columns_that_are_none_or_missing_in_some_batches(tmp_path, values, batch_size):
    def fn(model, batch):
        return [{"value": values[i], f"only_{i % 2}": str(i)} for i in batch]

    path = tmp_path / "layer=3"  # not a partition
    list(sweep(None, range(4), fn, path=path, batch_size=batch_size, progress=False))
    one_file = tmp_path / "one"
    list(sweep(None, range(4), fn, path=one_file, batch_size=4, progress=False))
    together, whole = (pd.read_parquet(p).sort_values("record") for p in (path, one_file))
    columns = ["record", "value", "only_0", "only_1"]
    pd.testing.assert_frame_equal(together[columns], whole[columns], check_like=True)
    schemas = [pq.read_schema(file) for file in files(path)]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert together["only_1"].tolist()[1::2] == ["1", "3"]
    if not isinstance(values[0], dict):
        frame = pd.DataFrame({"value": values})
        assert together["value"].isna().tolist() == frame["value"].isna().tolist()


def test_the_folder_is_one_table_at_every_moment(tmp_path):
    def fn(model, batch):
        return [{"value": None if i < 2 else i, **({"late": i} if i == 3 else {})} for i in batch]

    rows = sweep(None, range(4), fn, path=tmp_path, batch_size=1, progress=False)
    for n, row in enumerate(rows, start=1):
        table = pd.read_parquet(tmp_path)
        assert table["record"].tolist() == list(range(n))
        assert set(table) == set(row)
    assert table["late"].tolist()[3] == 3


@pytest.mark.parametrize("values", [[1, "a"], [1, True], [2**53 + 1, 0.5], [2**70, 1], [{}, 1]])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_that_fit_into_no_table_are_refused(tmp_path, values, batch_size):
    def fn(model, batch):
        return [{"value": values[i]} for i in batch]

    rows = sweep(None, range(2), fn, path=tmp_path, batch_size=batch_size, progress=False)
    with pytest.raises(ValueError, match=r"fn's rows for records \[.*do not fit into one table"):
        list(rows)
    assert all(file.name == "00000000.parquet" for file in files(tmp_path))


# ----- interruptions -----


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fail_at", range(6))
def test_every_record_is_run_once_though_a_batch_failed(tmp_path, fail_at, error):
    first, second = Calls(fail_at, error), Calls()
    rows = []
    with pytest.raises(type(error)) as raised:
        for row in sweep(10, RECORDS, first, batch_size=2, path=tmp_path, progress=False):
            rows.append(row)
    assert raised.value is error
    assert {row["record"] for row in rows} <= set(first.finished)
    assert len(files(tmp_path)) == fail_at
    assert ordered(rows) == (on_disk(tmp_path) if rows else [])

    again = list(sweep(10, RECORDS, second, batch_size=3, path=tmp_path, progress=False))
    assert ordered(again[: len(rows)]) == ordered(rows)  # what was finished comes first
    assert sorted(first.finished + second.finished) == list(range(len(RECORDS)))
    assert ordered(again) == plain_loop() == on_disk(tmp_path)
    third = Calls()
    rows = sweep(10, RECORDS, third, path=tmp_path, progress=False)
    assert ordered(rows) == plain_loop()
    assert third.batches == []


@pytest.mark.parametrize("n_rows", range(len(plain_loop())))
def test_every_record_is_run_once_though_the_reader_stopped(tmp_path, n_rows):
    first, second = Calls(), Calls()
    rows = sweep(10, RECORDS, first, batch_size=2, path=tmp_path, progress=False)
    assert len(list(islice(rows, n_rows))) == n_rows
    rows.close()
    again = sweep(10, RECORDS, second, batch_size=2, path=tmp_path, progress=False)
    assert ordered(again) == plain_loop() == on_disk(tmp_path)
    assert sorted(first.finished + second.finished) == list(range(len(RECORDS)))


@pytest.mark.parametrize("where", ["write_table", "replace"])
def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch, where):
    def half_a_file(table, file):
        Path(file).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    def no_replace(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rows = sweep(10, RECORDS, count_characters, path=tmp_path, progress=False)
        patch.setattr(
            *(pq, where, half_a_file) if where == "write_table" else (os, where, no_replace)
        )
        list(rows)
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "_provenance.json"}


def test_what_a_killed_process_left_is_no_part_of_the_table(tmp_path):
    first, second = Calls(2, RuntimeError()), Calls()
    with pytest.raises(RuntimeError):
        list(sweep(10, RECORDS, first, batch_size=3, path=tmp_path, progress=False))
    (tmp_path / ".00000004.parquet.unfinished").write_bytes(b"PAR1")
    pd.read_parquet(tmp_path)
    again = sweep(10, RECORDS, second, batch_size=3, path=tmp_path, progress=False)
    assert ordered(again) == plain_loop() == on_disk(tmp_path)
    assert sorted(first.finished + second.finished) == list(range(len(RECORDS)))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_a_failure_names_its_records():
    with pytest.raises(RuntimeError) as raised:
        list(sweep(10, RECORDS, Calls(1, RuntimeError()), batch_size=3, progress=False))
    assert raised.value.__notes__ == ["in fn, called by tl_backward.sweep with records [5, 8, 3]"]


# ----- what is refused -----


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "3", None])
@pytest.mark.usefixtures("unchecked")
def test_a_bad_batch_size_is_refused_at_once(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be a positive integer"):
        sweep(10, RECORDS, count_characters, batch_size=batch_size)


@pytest.mark.parametrize("records", [{"train": RECORDS}, "a prompt"], ids=["dict", "str"])
def test_records_that_are_no_records_are_refused_at_once(records):
    with pytest.raises(TypeError, match=r"records is a (dict|str)"):
        sweep(10, records, count_characters)


def test_a_data_frame_is_sent_for_its_rows():
    frame = pd.DataFrame(RECORDS)
    with pytest.raises(TypeError, match=r"records is a DataFrame; .*\.to_dict\('records'\)"):
        sweep(10, frame, count_characters)
    rows = list(sweep(10, frame.to_dict("records"), count_characters, progress=False))
    assert rows == list(sweep(10, RECORDS, count_characters, progress=False))


@pytest.mark.parametrize(
    ("outcome", "error", "match"),
    [
        (lambda b: None, TypeError, "fn returned NoneType for the batch .* record 1;"),
        (lambda b: {"n": 1}, TypeError, "fn returned dict for the batch .* record 1;"),
        (lambda b: "abc", TypeError, "fn returned str for the batch .* record 1;"),
        (lambda b: ({"n": 1} for _ in b), TypeError, "fn returned generator .* record 1;"),
        (lambda b: [{"n": 1}], ValueError, "fn returned 1 entries for 3 records .* record 1;"),
        (lambda b: [{"n": 1}] * 4, ValueError, "fn returned 4 entries for 3 records"),
        (lambda b: [{"n": 1}, 2, {"n": 3}], TypeError, "fn returned 2 for record 7;"),
        (lambda b: [[], ["n"], []], TypeError, "fn returned 'n' for record 7;"),
        (lambda b: [[], "", []], TypeError, "fn returned '' for record 7;"),
        (lambda b: [{1: 2}] * 3, TypeError, "fn returned {1: 2} for record 1;"),
        (lambda b: [{"record": 1}] * 3, ValueError, "column 'record' for record 1;"),
    ],
)
@pytest.mark.parametrize("on", ["disk", "memory"])
def test_what_is_no_rows_is_refused(tmp_path, outcome, error, match, on):
    path = tmp_path if on == "disk" else None
    rows = sweep(10, RECORDS, lambda m, b: outcome(b), batch_size=3, path=path, progress=False)
    with pytest.raises(error, match=match):
        list(rows)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "others",
    [RECORDS[:-1], RECORDS[::-1], [*RECORDS[:-1], {"prompt": "other", "id": 10}], []],
    ids=["fewer", "reordered", "changed", "none"],
)
def test_a_sweep_over_other_records_is_refused_at_once(tmp_path, others):
    list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
    with pytest.raises(ValueError, match="holds results of other records"):
        sweep(10, others, count_characters, path=tmp_path)
    assert on_disk(tmp_path) == plain_loop()


@pytest.mark.parametrize("what", ["parquet", "text", "truncated", "folder"])
def test_a_folder_with_other_files_is_refused_at_once(tmp_path, what):
    other = tmp_path / "other.parquet"
    if what == "parquet":
        pd.DataFrame({"a": [1]}).to_parquet(other)
    elif what == "text":
        other.write_text("notes")
    elif what == "folder":
        other.mkdir()
    else:
        list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
        file = files(tmp_path)[0]
        other.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"other\.parquet is damaged, or not from tl_backward"):
        sweep(10, RECORDS, count_characters, path=tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("notes")
    with pytest.raises(FileExistsError):
        sweep(10, RECORDS, count_characters, path=tmp_path / "file")


def test_a_record_that_was_written_twice_is_refused(tmp_path):
    for batch_size in (2, 3):
        rows = sweep(10, RECORDS, Calls(), batch_size=batch_size, path=tmp_path / str(batch_size))
        list(rows)
    (tmp_path / "2" / "00000006.parquet").rename(tmp_path / "3" / "other.parquet")
    with pytest.raises(ValueError, match=r"record \d+ is in .* and in .*other\.parquet"):
        sweep(10, RECORDS, Calls(), path=tmp_path / "3")


@pytest.mark.parametrize(("version", "todo"), [(0, "delete the file"), (3, "upgrade it")])
def test_another_format_is_refused(tmp_path, monkeypatch, version, todo):
    with monkeypatch.context() as patch:
        patch.setattr(table_files, "VERSION", version)
        list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
    with pytest.raises(ValueError, match=f"has format version {version}.*{todo}"):
        sweep(10, RECORDS, count_characters, path=tmp_path)


def test_the_first_format_is_refused(tmp_path):
    """It did not note what had made the rows."""
    metadata = {"version": 1, "fingerprint": "0", "records": [0]}
    table = pa.table({"record": [0]})
    pq.write_table(
        table.replace_schema_metadata({"tl_backward.sweep": json.dumps(metadata)}),
        tmp_path / "00000000.parquet",
    )
    with pytest.raises(ValueError, match="has format version 1"):
        sweep(10, RECORDS, count_characters, path=tmp_path)


def scaled(factor: float):
    return lambda model, batch: [{"n": factor * len(record["prompt"])} for record in batch]


def test_a_sweep_of_another_function_is_refused_at_once(tmp_path):
    rows = list(sweep(10, RECORDS, scaled(0.3), path=tmp_path, progress=False))
    with pytest.raises(ValueError, match=r"results of other fn \(factor: 0.3 then, -0.3 now\)"):
        sweep(10, RECORDS, scaled(-0.3), path=tmp_path)
    with pytest.raises(ValueError, match=r"other fn \(__qualname__: .*, __code__"):
        sweep(10, RECORDS, count_characters, path=tmp_path)
    assert list(sweep(10, RECORDS, scaled(0.3), path=tmp_path, progress=False)) == rows


def test_a_sweep_of_another_model_is_refused_at_once(tmp_path):
    list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
    with pytest.raises(ValueError, match=r"results of other model \(value: 10 then, 11 now\)"):
        sweep(11, RECORDS, count_characters, path=tmp_path)
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    list(sweep(one, RECORDS, scaled(1), path=tmp_path / "weights", progress=False))
    with pytest.raises(ValueError, match=r"other model \(weights..weight, weights..bias\)"):
        sweep(other, RECORDS, scaled(1), path=tmp_path / "weights")
    other.load_state_dict(one.state_dict())
    list(sweep(other, RECORDS, scaled(1), path=tmp_path / "weights", progress=False))


def test_a_sweep_of_another_version_is_refused_at_once(tmp_path, monkeypatch):
    list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
    of_today = provenance.modules.versions()
    monkeypatch.setattr(provenance.folders, "versions", lambda: of_today | {"torch": "99.0"})
    with pytest.raises(ValueError, match=r'other versions \(torch: ".*" then, "99.0" now\)'):
        sweep(10, RECORDS, count_characters, path=tmp_path)


class Counted:
    """Gives no rows, and counts the records."""

    n = 0

    def __call__(self, model: object, batch: list) -> list:
        self.n += len(batch)
        return [[]] * len(batch)

    def __getstate__(self) -> dict:
        return {}


def test_records_are_known_by_their_contents(tmp_path):
    def records(value: float) -> list[object]:
        return [
            {"tensor": torch.tensor([value]), "array": np.arange(3), "set": {"a", "b", "c"}},
            {"nan": float("nan"), "bytes": b"1", "text": "\ud83d", "tuple": (1, Path("a"))},
        ]

    calls = Counted()
    list(sweep(None, records(1.0), calls, path=tmp_path, progress=False))
    list(sweep(None, records(1.0), calls, path=tmp_path, progress=False))
    assert calls.n == 2
    with pytest.raises(ValueError, match="other records"):
        sweep(None, records(2.0), calls, path=tmp_path)
    opaque = [{}, {"it": threading.Lock()}]
    with pytest.raises(TypeError, match=r"record 1 cannot be recognised .* '_thread.lock'"):
        sweep(None, opaque, calls, path=tmp_path)
    list(sweep(None, opaque, calls, progress=False))


# ----- two sweeps in one folder -----


def test_a_second_sweep_is_refused_until_the_first_has_ended(tmp_path):
    first = sweep(10, RECORDS, Calls(), batch_size=2, path=tmp_path, progress=False)
    rows = []
    for _ in range(2):
        with pytest.raises(BlockingIOError, match="is being written by another run"):
            sweep(10, RECORDS, Calls(), batch_size=2, path=tmp_path)
        rows.append(next(first))
    assert ordered([*rows, *first]) == plain_loop() == on_disk(tmp_path)
    second = Calls()
    assert ordered(sweep(10, RECORDS, second, path=tmp_path, progress=False)) == plain_loop()
    assert second.batches == []


@pytest.mark.parametrize("ended_by", ["an error", "close", "being forgotten", "never starting"])
def test_a_sweep_that_ended_leaves_the_folder_to_the_next(tmp_path, ended_by):
    calls = Calls(1, RuntimeError("no more"))
    first = sweep(10, RECORDS, calls, batch_size=2, path=tmp_path, progress=False)
    if ended_by == "an error":
        with pytest.raises(RuntimeError, match="no more") as kept:
            list(first)
        assert kept.value.__traceback__ is not None  # which keeps the sweep's variables
    elif ended_by != "never starting":
        next(first)
    if ended_by == "close":
        first.close()
    else:
        del first
    assert ordered(sweep(10, RECORDS, Calls(), path=tmp_path, progress=False)) == plain_loop()


def test_a_refusal_does_not_keep_the_folder(tmp_path):
    list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))
    with pytest.raises(ValueError, match="other records") as kept:
        sweep(10, RECORDS[:2], count_characters, path=tmp_path)
    assert kept.value.__traceback__ is not None
    list(sweep(10, RECORDS, count_characters, path=tmp_path, progress=False))


SLEEPER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.counting import RECORDS
from helpers.counting import Calls
from tl_backward.sweep import sweep

rows = sweep(10, RECORDS, Calls(), batch_size=2, path=sys.argv[2], progress=False)
print(next(rows)["record"], flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_process_dies_with_it(tmp_path):
    """Killed in the middle of a sweep, it has kept all others out until then."""
    command = [sys.executable, "-c", SLEEPER, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() != ""
            with pytest.raises(BlockingIOError, match="is being written by another run"):
                sweep(10, RECORDS, Calls(), path=tmp_path)
        finally:
            process.kill()
    assert (tmp_path / ".lock").exists()
    calls = Calls()
    rows = list(sweep(10, RECORDS, calls, batch_size=2, path=tmp_path, progress=False))
    assert ordered(rows) == plain_loop() == on_disk(tmp_path)
    assert len(calls.finished) == len(RECORDS) - 2


# ----- several processes -----

SCRIPT = """
import json, os, sys
from itertools import islice
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.counting import RECORDS, Calls, count_characters
from tl_backward.sweep import sweep

folder, rank, report = Path(sys.argv[2]), os.environ["RANK"], {}
for name, path in (("fresh", "fresh"), ("resumed", "resumed"), ("memory", None)):
    calls = Calls()
    rows = list(sweep(10, RECORDS, calls, batch_size=2, path=path and folder / path))
    report[name] = {"rows": rows, "ids": calls.finished}

def late_column(model, batch):
    return [{"value": None if i < 4 else i} for i in batch]

list(sweep(None, range(6), late_column, batch_size=1, path=folder / "types", progress=False))

try:
    sweep(10, RECORDS, Calls(), path=folder / "locked")
except BlockingIOError as error:
    report["locked"] = str(error)

calls = Calls()
rows = sweep(10, RECORDS, calls, batch_size=2, path=folder / "stopped", progress=False)
report["stopped"] = {"rows": list(islice(rows, 2)), "ids": calls.finished}
rows.close()
(folder / f"report-{rank}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list[dict], list[int], str]:
    """What two processes did: their folder, their reports, who had begun, and their output."""
    folder = tmp_path_factory.mktemp("two")
    one = Calls(2, RuntimeError())
    with pytest.raises(RuntimeError):
        list(sweep(10, RECORDS, one, batch_size=3, path=folder / "resumed", progress=False))
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # with --cpu, accelerate itself starts one process only; it leaves the others to mpirun
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", f"--main_process_port={port}"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no"]
    with provenance.only_writer(folder / "locked"):
        done = subprocess.run(
            [*launch, str(script), str(Path(__file__).parent), str(folder)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    reports = [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, reports, one.finished, done.stderr


@pytest.mark.parametrize("name", ["fresh", "resumed", "memory"])
def test_two_processes_share_the_records_and_have_the_same_table(two_processes, name):
    folder, reports, finished, _ = two_processes
    if name != "memory":
        assert on_disk(folder / name) == plain_loop()
        calls = Calls()
        again = sweep(10, RECORDS, calls, path=folder / name, progress=False)
        assert ordered(again) == plain_loop()
        assert calls.batches == []
    shares = [report[name] for report in reports]
    assert all(share["ids"] and share["rows"] for share in shares)
    assert ordered(row for share in shares for row in share["rows"]) == plain_loop()
    before = finished if name == "resumed" else []
    assert sorted(before + shares[0]["ids"] + shares[1]["ids"]) == list(range(len(RECORDS)))


def test_one_process_finishes_what_two_have_begun(two_processes):
    folder, reports, _, _ = two_processes
    calls, begun = Calls(), [i for report in reports for i in report["stopped"]["ids"]]
    assert 0 < len(begun) < len(RECORDS)
    rows = sweep(10, RECORDS, calls, batch_size=5, path=folder / "stopped", progress=False)
    assert ordered(rows) == plain_loop() == on_disk(folder / "stopped")
    assert sorted(begun + calls.finished) == list(range(len(RECORDS)))


def test_all_processes_learn_that_the_folder_is_locked(two_processes):
    _, reports, _, _ = two_processes
    assert all("is being written by another run" in report["locked"] for report in reports)


def test_two_processes_agree_on_types(two_processes):
    table = pd.read_parquet(two_processes[0] / "types")
    assert table["record"].tolist() == list(range(6))
    assert table["value"].isna().tolist() == [True] * 4 + [False] * 2
    assert table["value"].tolist()[4:] == [4, 5]


def test_only_the_main_process_shows_progress(two_processes):
    assert "6/6 [" in two_processes[3]  # the main process's share
    assert "/5 [" not in two_processes[3]


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    class Alone:
        num_processes = 1

        def __init__(self, cpu: bool) -> None:
            self.cpu = cpu

    monkeypatch.setattr(accelerate, "PartialState", Alone)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched"):
        sweep(10, RECORDS, count_characters)


# ----- a model -----


@NEEDS_BRIDGE
def test_the_losses_of_a_model(boot, tmp_path):
    import tl_backward as tlb

    model = boot("gpt2")
    prompts = ["Lionel Messi plays for", "The Eiffel Tower is in", "Rome", "the city of"]

    def losses(model, batch):
        results = [
            tlb.run_with_backward_cache(model, r["prompt"], TARGET, weights=["W_out"])
            for r in batch
        ]
        return [
            [
                {"loss": loss, "layer": layer, "norm": cache["W_out", layer].norm()}
                for layer in range(3)
            ]
            for loss, cache in results
        ]

    dataset = Dataset.from_dict({"prompt": prompts})
    table = pd.DataFrame(sweep(model, dataset, losses, batch_size=3, path=tmp_path, progress=False))
    table = table.sort_values(["record", "layer"], ignore_index=True)
    assert len(table) == 12
    for i, prompt in enumerate(prompts):
        loss, cache = tlb.run_with_backward_cache(model, prompt, TARGET, weights=["W_out"])
        assert table["loss"][3 * i] == loss.item()
        assert table["norm"][3 * i + 1] == cache["W_out", 1].norm().item()
