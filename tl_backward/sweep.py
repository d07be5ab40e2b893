"""Apply a function to many records in batches and collect a resumable table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward import table_files
from tl_backward.provenance import hash_of, only_writer, provenance, require_same

if TYPE_CHECKING:
    import pyarrow as pa

Model = TypeVar("Model")
Record = TypeVar("Record")
Result = TypeVar("Result")
Row = Mapping[str, Any]

PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes: torchrun and accelerate, then MPI."""


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

    Each batch holds records of similar length to limit padding. The longest come first, so running
    out of memory shows up in the first batch.

    With a ``path``, each batch's rows are written to a Parquet file in that folder before they are
    yielded, and ``pd.read_parquet(path)`` reads the whole table. After an interruption, call the
    function again: it yields the rows in the folder, then runs the remaining records. The batch
    size and the number of processes may change in between. The folder records its provenance: the
    records; ``fn`` with its code and everything that it binds or refers to; the model's class,
    config, weights, hooks and tokenizer; and the versions of Python, torch, TransformerLens,
    transformers and this package. Any difference is refused by name. Objects that ``fn`` refers to
    are identified by their pickled state, so exclude state that does not affect the rows, such as
    counters, in ``__getstate__``. Only one sweep at a time may write to a folder.

    Under ``accelerate launch`` or ``torchrun`` each process runs and yields its share of the
    batches, and the shared folder collects all rows. Each process must exhaust its rows; at the end
    it waits for the others.

    Args:
        model: Passed on to ``fn``.
        records: A ``datasets.Dataset``, a list, or any other iterable. An iterable without length
            and indexing is read into memory.
        fn: Takes the model and a list of records, and returns a list with one entry per record: a
            row, or a possibly empty list of rows. A row maps columns to values; tensors and arrays,
            also inside lists and mappings, become numbers or lists of numbers.
        batch_size: Maximum number of records in a batch.
        path: Folder for the table, created if needed. Without one, nothing is written and nothing
            can be resumed.
        length: Sort key of the records, such as the number of tokens. Default: the number of
            characters in ``record["prompt"]``, if it is a string. The sort is stable.
        progress: Whether to show a progress bar (in the main process only).

    Returns:
        The rows, one at a time, in batch order. The first column, ``record``, is the index of the
        row's record in ``records``; sort by it to restore their order.

    Raises:
        TypeError: If ``records`` is a mapping, a string or a data frame; if a record, ``fn`` or the
            model has a part that cannot be recognised in a later session; or if ``fn`` does not
            return rows.
        ValueError: If ``batch_size`` is not a positive integer; if the folder holds rows of other
            records or of another function, model or version, or foreign or damaged files; or if
            ``fn`` does not return one entry per record, or its rows do not fit into one table.
        BlockingIOError: If another sweep is writing to the folder.
        RuntimeError: If several processes were launched, but each believes to be the only one.

    Example:
        >>> def losses(model, batch):
        ...     prompts, targets = ([r[key] for r in batch] for key in ("prompt", "target"))
        ...     loss, _ = tlb.run_with_backward_cache(model, prompts, targets, weights=["W_out"])
        ...     return [{"loss": each} for each in loss]
        >>> table = pd.DataFrame(tlb.sweep(model, dataset, losses, path="losses"))
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if isinstance(records, str | bytes | Mapping):
        raise TypeError(
            f"records is a {type(records).__name__}; pass one split of a DatasetDict, or a list"
        )
    if hasattr(records, "iterrows"):
        raise TypeError("records is a DataFrame; pass its rows, records.to_dict('records')")
    indexed: Any = records
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        indexed = list(records)
    processes = _processes()
    with ExitStack() as stack:
        parts = None
        if path is not None:
            made_by = processes.from_main(lambda: _claim(stack, Path(path), indexed, fn, model))
            parts = _Parts(Path(path), made_by, len(indexed), alone=processes.size == 1)
            processes.wait()  # until all have read the folder, before any writes to it
        claim = stack.pop_all()
    finished = {} if parts is None else parts.finished
    done = {i for batch in finished.values() for i in batch}
    lengths = [(length or _prompt_length)(record) for record in indexed]
    todo = _batches(lengths, batch_size, done)
    share = todo[processes.rank :: processes.size]
    finished_share = list(finished)[processes.rank :: processes.size]

    def rows() -> Iterator[dict[str, Any]]:
        with claim:
            yield from rows_of_share()

    def rows_of_share() -> Iterator[dict[str, Any]]:
        n_done = sum(len(finished[file]) for file in finished_share)
        for file in finished_share:
            yield from table_files.read(file)[0].to_pylist()
        with tqdm(
            desc="sweep",
            unit="record",
            initial=n_done,
            total=n_done + sum(map(len, share)),
            disable=not progress or processes.rank > 0,
        ) as bar:
            for batch in share:
                rows = _run(fn, model, batch, [indexed[i] for i in batch])
                if parts is not None:
                    rows = parts.write(batch, rows)
                bar.update(len(batch))
                yield from rows
        if parts is not None:
            processes.wait()
            if processes.rank == 0:
                parts.align()
            processes.wait()

    return rows()


class _Processes(NamedTuple):
    """The processes that share a sweep.

    Attributes:
        rank: Rank of this process; the main process has 0.
        size: Number of processes.
        wait: Waits for all processes.
    """

    rank: int
    size: int
    wait: Callable[[], None]

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """Compute in the main process, and return its result or raise its error in all."""
        if self.size == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = error
        result, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        return result


def _processes() -> _Processes:
    launched = max(int(os.environ.get(name, "1")) for name in PROCESSES)
    if launched <= 1:
        return _Processes(0, 1, lambda: None)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = getattr(torch, "accelerator", torch.cuda)
    # accelerate treats CPU processes as single ones unless told otherwise
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    if state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate treats each as the only one, so "
            "all would run all records; to run on the CPU, create "
            "accelerate.PartialState(cpu=True) before any other accelerate state in the script"
        )
    return _Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def _prompt_length(record: object) -> int:
    prompt = record.get("prompt") if isinstance(record, Mapping) else None
    return len(prompt) if isinstance(prompt, str) else 0


def _batches(
    lengths: Sequence[int | float], batch_size: int, done: AbstractSet[int] = frozenset()
) -> list[list[int]]:
    """Batches of the indices that are not done, longest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    todo = [i for i in order if i not in done]
    return [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]


def _claim(stack: ExitStack, folder: Path, records: Any, fn: object, model: object) -> str:
    """Become the folder's only writer, check its files' provenance, and return its hash."""
    stack.enter_context(only_writer(folder))
    made_by = provenance(records, fn=fn, model=model)
    contents = {file.name: table_files.read_schema(file)[1] for file in _files(folder)}
    require_same(folder, made_by, {name: each.get("made_by") for name, each in contents.items()})
    return hash_of(made_by)


def _run(
    fn: Callable[[Any, list[Any]], object], model: object, batch: list[int], records: list[Any]
) -> list[dict[str, Any]]:
    """The validated rows of one batch, with the index of their record."""
    try:
        entries = fn(model, records)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in fn, called by tl_backward.sweep with records {batch}")
        raise
    where = f"for the batch that begins with record {batch[0]}"
    if not _is_list(entries):
        raise TypeError(
            f"fn returned {type(entries).__name__} {where}; it must return a list with one entry "
            "per record"
        )
    if len(entries) != len(batch):
        raise ValueError(
            f"fn returned {len(entries)} entries for {len(batch)} records {where}; it must return "
            "one per record: a row, or a possibly empty list of rows"
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
            f"fn returned {row!r} for record {i}; an entry must be a row (a mapping with string "
            "keys) or a list of rows"
        )
    if "record" in row:
        raise ValueError(
            f"fn returned a row with a column 'record' for record {i}; sweep adds that column "
            "itself, so give yours another name"
        )
    return {"record": i} | {column: _plain(value) for column, value in row.items()}


def _plain(value: Any) -> Any:
    """Convert torch and NumPy numbers to Python numbers, for tables and files."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if _is_list(value):
        return [_plain(one) for one in value]
    is_numeric = isinstance(value, Tensor | np.ndarray | np.number | np.bool_)
    return value.tolist() if is_numeric else value


class _Parts:
    """The folder of a sweep: one Parquet file per finished batch.

    The metadata of each file lists its records, whether they have rows or not. All files have the
    same columns and types, so that any Parquet reader sees the folder as one table; when a column
    gets a wider type, earlier files are rewritten.

    Attributes:
        finished: Records of each file.
        schema: Columns so far.
    """

    def __init__(self, folder: Path, made_by: str, n_records: int, alone: bool) -> None:
        import pyarrow as pa

        self.folder, self.made_by, self.alone = folder, made_by, alone
        self.finished: dict[Path, list[int]] = {}
        self.schema: pa.Schema = pa.schema([("record", pa.int64())])
        owners: dict[int, Path] = {}
        for file in _files(folder):
            schema, contents = table_files.read_schema(file)
            self.finished[file] = _finished_records(file, contents, n_records)
            self.schema = _common_schema([self.schema, schema])
            for i in self.finished[file]:
                if i in owners:
                    raise ValueError(
                        f"record {i} is in {owners[i]} and in {file}; delete one of the two files"
                    )
                owners[i] = file

    def write(self, batch: list[int], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the rows of a batch, and return them as a reader will see them."""
        import pyarrow as pa

        columns = dict.fromkeys(column for row in rows for column in row)
        contents = {"made_by": self.made_by, "records": batch}
        try:
            table = pa.table({name: [row.get(name) for row in rows] for name in columns})
            schema = _common_schema([self.schema, table.schema])
            if self.alone and not schema.equals(self.schema):
                self.align(schema)
            table = _widen(table, schema)
            table_files.write(self.folder / f"{batch[0]:08d}.parquet", table, contents)
        except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"fn's rows for records {batch} do not fit into one table with the earlier rows: "
                f"{error}"
            ) from error
        self.schema = schema
        return table.to_pylist()

    def align(self, schema: pa.Schema | None = None) -> None:
        """Give all files the same columns and types, including those of ``schema``."""
        schemas = {file: table_files.read_schema(file)[0] for file in _files(self.folder)}
        common = _common_schema([schema or self.schema, *schemas.values()])
        for file, own in schemas.items():
            if not own.equals(common):
                table, contents = table_files.read(file)
                table_files.write(file, _widen(table, common), contents)


def _files(folder: Path) -> list[Path]:
    """The files that a Parquet reader would read."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith((".", "_")))


def _finished_records(file: Path, contents: dict[str, Any], n_records: int) -> list[int]:
    """The records whose rows a file holds."""
    records: Any = contents.get("records")
    is_list = isinstance(records, list) and all(type(i) is int for i in records)
    if not is_list or not set(records) <= set(range(n_records)):
        raise table_files.damaged(file, "it does not list its records")
    return records


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    import pyarrow as pa

    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except pa.ArrowException as error:
        raise ValueError(f"fn's rows do not fit into one table: {error}") from error


def _widen(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns and types of a wider schema."""
    import pyarrow as pa

    return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
