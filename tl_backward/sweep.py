"""A function over many records, in batches, as a table that survives interruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    import pyarrow as pa

Model = TypeVar("Model")
Record = TypeVar("Record")
Row = Mapping[str, Any]

METADATA = b"tl_backward.sweep"
VERSION = 1
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are: torchrun and accelerate, and those of MPI."""


def sweep(
    model: Model,
    records: Iterable[Record],
    fn: Callable[[Model, list[Record]], Sequence[Row | Sequence[Row]]],
    *,
    batch_size: int = 8,
    path: str | Path | None = None,
    length: Callable[[Record], float] | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Call ``fn`` on all records, batch by batch, and yield its rows.

    Each batch holds records of similar length, so that little of it is padding. The longest come
    first: if they do not fit into memory, you learn it at once.

    With a ``path``, the rows of each batch are written to a Parquet file in that folder before
    they are yielded, and ``pd.read_parquet(path)`` is the whole table. After an interruption call
    the function again: it yields what is in the folder, then runs the records that are not. The
    batch size and the number of processes may change in between. The folder knows its records by
    a hash of their contents, but neither ``fn`` nor the model: for another one take another folder.

    Under ``accelerate launch`` or ``torchrun`` each process runs and yields its share of the
    batches, and the folder, which all of them must see, has the rows of all. Each process must
    go through its rows to the end, where it waits for the others.

    Args:
        model: Passed on to ``fn``.
        records: A ``datasets.Dataset``, a list, or anything else to iterate over. What has no
            length and no index is read into memory.
        fn: Takes the model and a list of records, and returns a list with one entry for each: a
            row, or a list of rows, which may be empty. A row is a mapping from columns to values;
            tensors and arrays, also within lists and mappings, become numbers or lists of numbers.
        batch_size: The most records in a batch.
        path: A folder for the table; it is made if it is not there. Without one, nothing is
            written and nothing can be resumed.
        length: What the batches are sorted by, such as the number of tokens; by default the number
            of characters in ``record["prompt"]``, if there is such a string. Records of equal
            length stay in their order.
        progress: Whether to show a progress bar; of several processes only the main one does.

    Returns:
        The rows, one at a time, in the order of the batches. The first column, ``record``, is the
        index of the row's record in ``records``: sort by it to have their order.

    Raises:
        TypeError: When ``records`` is a mapping, a string or a data frame, when a record cannot be
            hashed for the folder, or when ``fn`` returns something else than rows.
        ValueError: When ``batch_size`` is not a positive integer; when the folder belongs to a
            sweep over other records, holds other files or a damaged one; when ``fn`` does not
            return one entry for each record, or rows that fit into no common table.
        RuntimeError: When several processes were launched, but each takes itself for the only one.

    Example:
        >>> def losses(model, batch):
        ...     prompts, targets = ([r[key] for r in batch] for key in ("prompt", "target"))
        ...     loss, _ = tlb.run_with_backward_cache(model, prompts, targets, weights=["W_out"])
        ...     return [{"loss": each} for each in loss]
        >>> table = pd.DataFrame(tlb.sweep(model, dataset, losses, path="losses"))
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a positive integer")
    if isinstance(records, str | bytes | Mapping):
        raise TypeError(
            f"records is a {type(records).__name__}; pass one split of a DatasetDict, or a list"
        )
    if hasattr(records, "iterrows"):
        raise TypeError("records is a DataFrame; pass its rows, records.to_dict('records')")
    indexed: Any = records
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        indexed = list(records)
    process, n_processes, wait = _processes()
    parts = None
    if path is not None:
        parts = _Parts(Path(path), _fingerprint(indexed), alone=n_processes == 1)
        wait()  # all have read the folder before one writes to it
    finished = {} if parts is None else parts.finished
    done = {i for batch in finished.values() for i in batch}
    lengths = [(length or _prompt_length)(record) for record in indexed]
    todo = _batches(lengths, batch_size, done)
    share = todo[process::n_processes]
    finished_share = list(finished)[process::n_processes]

    def rows() -> Iterator[dict[str, Any]]:
        n_done = sum(len(finished[file]) for file in finished_share)
        for file in finished_share:
            yield from _read(file).to_pylist()
        with tqdm(
            desc="sweep",
            unit="record",
            initial=n_done,
            total=n_done + sum(map(len, share)),
            disable=not progress or process > 0,
        ) as bar:
            for batch in share:
                rows = _run(fn, model, batch, [indexed[i] for i in batch])
                if parts is not None:
                    rows = parts.write(batch, rows)
                bar.update(len(batch))
                yield from rows
        if parts is not None:
            wait()
            if process == 0:
                parts.align()
            wait()

    return rows()


def _processes() -> tuple[int, int, Callable[[], None]]:
    """The index of this process, the number of all, and a function that waits for them."""
    launched = max(int(os.environ.get(name, "1")) for name in PROCESSES)
    if launched <= 1:
        return 0, 1, lambda: None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = getattr(torch, "accelerator", torch.cuda)
    # accelerate takes processes on the CPU for single ones, unless it is told
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    if state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate takes each for the only one, so "
            "all would run all records; if they are to run on the CPU, make "
            "accelerate.PartialState(cpu=True) the first of its kind in the script"
        )
    return state.process_index, state.num_processes, state.wait_for_everyone


def _prompt_length(record: object) -> int:
    prompt = record.get("prompt") if isinstance(record, Mapping) else None
    return len(prompt) if isinstance(prompt, str) else 0


def _batches(
    lengths: Sequence[int | float], batch_size: int, done: AbstractSet[int] = frozenset()
) -> list[list[int]]:
    """The indices of what is not done, the longest first, in batches."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    todo = [i for i in order if i not in done]
    return [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]


def _fingerprint(records: Iterable[object]) -> str:
    """A hash of all records that is the same in every process."""
    digest = sha256()
    for i, record in enumerate(records):
        try:
            text = json.dumps(record, default=_without_address, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"record {i} cannot be recognised when the sweep resumes ({error}); make it of "
                "mappings, lists, strings and numbers, or sweep without a path"
            ) from error
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _without_address(value: Any) -> object:
    """What stands for a value that JSON does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, AbstractSet):
        return sorted(value, key=repr)
    if hasattr(value, "tolist"):
        return value.tolist()
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"{text} is known by its address alone")
    return text


def _run(
    fn: Callable[[Any, list[Any]], object], model: object, batch: list[int], records: list[Any]
) -> list[dict[str, Any]]:
    """The rows of one batch, checked and with their record's index."""
    try:
        entries = fn(model, records)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in fn, called by tl_backward.sweep with the records {batch}")
        raise
    where = f"for the batch that begins with record {batch[0]}"
    if not _is_list(entries):
        raise TypeError(
            f"fn returned {type(entries).__name__} {where}; it must return a list with one entry "
            "for each record"
        )
    if len(entries) != len(batch):
        raise ValueError(
            f"fn returned {len(entries)} entries for {len(batch)} records {where}; it must return "
            "one for each: a row, or a list of rows, which may be empty"
        )
    return [
        _tidy(row, i)
        for i, entry in zip(batch, entries, strict=True)
        for row in (entry if _is_list(entry) else [entry])
    ]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _tidy(row: Any, i: int) -> dict[str, Any]:
    if not isinstance(row, Mapping) or not all(isinstance(column, str) for column in row):
        raise TypeError(
            f"fn returned {row!r} for record {i}; an entry must be a row, which is a mapping from "
            "strings, or a list of rows"
        )
    if "record" in row:
        raise ValueError(
            f"fn returned a row with a column 'record' for record {i}; sweep adds that column "
            "itself, so give yours another name"
        )
    return {"record": i} | {column: _plain(value) for column, value in row.items()}


def _plain(value: Any) -> Any:
    """Numbers of torch and NumPy as those of Python, which go into tables and onto disk."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if _is_list(value):
        return [_plain(one) for one in value]
    is_numeric = isinstance(value, Tensor | np.ndarray | np.number | np.bool_)
    return value.tolist() if is_numeric else value


class _Parts:
    """The folder of a sweep: one Parquet file for each batch that is done.

    Each file tells in its metadata which records it is about, with rows or without. All files have
    the same columns and types, so that any reader of Parquet takes the folder as one table: those
    that were written before a column had its type are written once more.

    Attributes:
        finished: For each file, its records.
        schema: The columns so far.
    """

    def __init__(self, folder: Path, fingerprint: str, alone: bool) -> None:
        import pyarrow as pa

        self.folder, self.fingerprint, self.alone = folder, fingerprint, alone
        folder.mkdir(parents=True, exist_ok=True)
        self.finished: dict[Path, list[int]] = {}
        self.schema: pa.Schema = pa.schema([("record", pa.int64())])
        owners: dict[int, Path] = {}
        for file, schema in self._schemas().items():
            self.finished[file] = json.loads(schema.metadata[METADATA])["records"]
            self.schema = _common_schema([self.schema, schema])
            for i in self.finished[file]:
                if i in owners:
                    raise ValueError(
                        f"record {i} is in {owners[i]} and in {file}, so two sweeps have written "
                        "here at the same time; delete one of the two files"
                    )
                owners[i] = file

    def write(self, batch: list[int], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the rows of a batch; returns them as they will be read."""
        import pyarrow as pa

        columns = dict.fromkeys(column for row in rows for column in row)
        metadata = {"version": VERSION, "fingerprint": self.fingerprint, "records": batch}
        try:
            table = pa.table({name: [row.get(name) for row in rows] for name in columns})
            schema = _common_schema([self.schema, table.schema])
            if self.alone and not schema.equals(self.schema):
                self.align(schema)
            table = _widen(table, schema).replace_schema_metadata({METADATA: json.dumps(metadata)})
            _write(table, self.folder / f"{batch[0]:08d}.parquet")
        except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"fn's rows for the records {batch} do not go into one table with those before: "
                f"{error}"
            ) from error
        self.schema = schema
        return table.to_pylist()

    def align(self, schema: pa.Schema | None = None) -> None:
        """Give all files the same columns and types, those of ``schema`` among them."""
        schemas = self._schemas()
        common = _common_schema([schema or self.schema, *schemas.values()])
        for file, own in schemas.items():
            if not own.equals(common):
                _write(_widen(_read(file), common).replace_schema_metadata(own.metadata), file)

    def _schemas(self) -> dict[Path, pa.Schema]:
        """The columns and metadata of each file; no file is another sweep's."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schemas = {}
        for file in sorted(self.folder.iterdir()):
            if file.name.startswith((".", "_")):  # as readers of Parquet do
                continue
            try:
                schemas[file] = pq.read_schema(file)
                metadata = json.loads(schemas[file].metadata[METADATA])
            except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file} is damaged, or no part of a sweep ({error!r}); delete it, which runs "
                    "its records again, or pass a folder for this sweep alone"
                ) from error
            if metadata["version"] != VERSION:
                raise ValueError(
                    f"{file} is in version {metadata['version']} of its format, and this "
                    f"tl_backward reads version {VERSION}; upgrade it, or pass a new folder"
                )
            if metadata["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds a sweep over other records; pass the same records in the "
                    "same order, or a new folder"
                )
        return schemas


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    import pyarrow as pa

    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except pa.ArrowException as error:
        raise ValueError(f"fn's rows fit into no common table: {error}") from error


def _widen(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns and types of a schema that is at least as wide."""
    import pyarrow as pa

    return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")


def _read(file: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        return parquet.read()


def _write(table: pa.Table, file: Path) -> None:
    """Write a file that appears under its name only when it is whole."""
    import pyarrow.parquet as pq

    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        pq.write_table(table, unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
