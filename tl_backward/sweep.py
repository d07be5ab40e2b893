"""A function over many records, in batches, as a table that survives interruptions."""

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
    batch size and the number of processes may change in between. The folder knows what made it:
    the records; ``fn``, which is its code and all that it binds or refers to; the model's class,
    config, weights, hooks and tokenizer; and the versions of Python, torch, TransformerLens,
    transformers and this package. What differs is refused by name. Objects that ``fn`` refers to
    are known by what ``pickle`` would store of them: leave out of ``__getstate__`` what has no part
    in the rows, such as counters. One sweep at a time writes to a folder.

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
        TypeError: When ``records`` is a mapping, a string or a data frame; when a record, ``fn`` or
            the model has a part that the folder could not recognise again; or when ``fn`` returns
            something else than rows.
        ValueError: When ``batch_size`` is not a positive integer; when the folder holds the rows of
            other records, another function, model or version, other files or a damaged one; when
            ``fn`` does not return one entry for each record, or rows that fit into no common table.
        BlockingIOError: When another sweep is writing to the folder.
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
    processes = _processes()
    with ExitStack() as stack:
        parts = None
        if path is not None:
            made_by = processes.from_main(lambda: _claim(stack, Path(path), indexed, fn, model))
            parts = _Parts(Path(path), made_by, len(indexed), alone=processes.size == 1)
            processes.wait()  # all have read the folder before one writes to it
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
    """Those that share a sweep.

    Attributes:
        rank: The number of this one; the main one has 0.
        size: How many there are.
        wait: Waits for all.
    """

    rank: int
    size: int
    wait: Callable[[], None]

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """What the main process computes or raises, in all of them."""
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
    # accelerate takes processes on the CPU for single ones, unless it is told
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    if state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate takes each for the only one, so "
            "all would run all records; if they are to run on the CPU, make "
            "accelerate.PartialState(cpu=True) the first of its kind in the script"
        )
    return _Processes(state.process_index, state.num_processes, state.wait_for_everyone)


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


def _claim(stack: ExitStack, folder: Path, records: Any, fn: object, model: object) -> str:
    """Become the only one to write there, if what is there has the provenance that is returned."""
    stack.enter_context(only_writer(folder))
    made_by = provenance(records, fn=fn, model=model)
    contents = {file.name: table_files.read_schema(file)[1] for file in _files(folder)}
    require_same(folder, made_by, {name: of.get("made_by") for name, of in contents.items()})
    return hash_of(made_by)


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
        """Add the rows of a batch; returns them as they will be read."""
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
                f"fn's rows for the records {batch} do not go into one table with those before: "
                f"{error}"
            ) from error
        self.schema = schema
        return table.to_pylist()

    def align(self, schema: pa.Schema | None = None) -> None:
        """Give all files the same columns and types, those of ``schema`` among them."""
        schemas = {file: table_files.read_schema(file)[0] for file in _files(self.folder)}
        common = _common_schema([schema or self.schema, *schemas.values()])
        for file, own in schemas.items():
            if not own.equals(common):
                table, contents = table_files.read(file)
                table_files.write(file, _widen(table, common), contents)


def _files(folder: Path) -> list[Path]:
    """What readers of Parquet would read."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith((".", "_")))


def _finished_records(file: Path, contents: dict[str, Any], n_records: int) -> list[int]:
    """The records that a file has the rows of."""
    records: Any = contents.get("records")
    is_list = isinstance(records, list) and all(type(i) is int for i in records)
    if not is_list or not set(records) <= set(range(n_records)):
        raise table_files.damaged(file, "it does not say of which records it is")
    return records


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
