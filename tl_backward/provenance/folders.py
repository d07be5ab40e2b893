"""The provenance and the writer of a folder of results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tl_backward.provenance.descriptions import Parts, describe, describe_each, hash_of, text_of
from tl_backward.provenance.modules import versions

Provenance: TypeAlias = dict[str, Parts]
"""Parts by category: ``"versions"``, ``"records"``, ``"model"`` and so on."""

FILE, LOCK = "_provenance.json", ".lock"
"""File names in a folder of results. Parquet readers skip names with these prefixes."""
MOST_NAMED = 3
MISSING = "missing"


def provenance(records: Iterable[object], **others: Any) -> Provenance:
    """The provenance of results: versions, records, and a named model, function or options.

    Raises:
        TypeError: If a part cannot be recognised in another process; the error names it.
    """
    parts = {"versions": versions(), "records": describe_each(records)}
    return parts | describe(**others)


def require_same(folder: Path, made_by: Provenance, found: Mapping[str, object]) -> None:
    """Check that all results in a folder have one provenance, and record it there.

    Args:
        folder: The folder, which must exist.
        made_by: The provenance of the new results.
        found: The hash of the provenance of the existing results, by file.

    Raises:
        ValueError: If one differs; the error names the differences.
        OSError: If the folder cannot be written.
    """
    file, now = folder / FILE, hash_of(made_by)
    noted, then = _noted(file)
    others = [name for name, made_by_hash in found.items() if made_by_hash != now]
    if not others:
        if then != now:
            unfinished = folder / f".{FILE}.unfinished"
            unfinished.write_text(json.dumps(made_by, indent=1), encoding="utf-8")
            os.replace(unfinished, file)
        return
    if then != now and then in found.values():
        differences = "; ".join(_differences(noted, made_by))
    else:
        differences = f"something else ({file.name} does not describe {others[0]})"
    raise ValueError(
        f"{folder} holds results of {differences}. Restore what they were made with, pass a new "
        "folder, or delete this one"
    )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against other writers; the lock dies with the process.

    Raises:
        BlockingIOError: If another run is writing there.
        OSError: If the folder cannot be created or written.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is being written by another run; wait until it ends, or pass another "
            "folder. A sweep in this process ends when its rows are exhausted or close()d"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _noted(file: Path) -> tuple[Any, str]:
    """The recorded provenance of a folder and its hash; None and "" if unreadable."""
    try:
        noted = json.loads(file.read_bytes() if file.is_file() else b"")
        return noted, hash_of(noted)
    except (OSError, RecursionError, ValueError):
        return None, ""


def _differences(then: Provenance, now: Provenance) -> Iterator[str]:
    for category in dict.fromkeys([*now, *then]):
        before, after = then.get(category, {}), now.get(category, {})
        names = [
            name
            for name in dict.fromkeys([*after, *before])
            if text_of(before.get(name, MISSING)) != text_of(after.get(name, MISSING))
        ]
        if names:
            named = [_difference(name, before, after) for name in names[:MOST_NAMED]]
            more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
            yield f"other {category} ({', '.join(named + more)})"


def _difference(name: str, before: Parts, after: Parts) -> str:
    was, now = (text_of(parts.get(name, MISSING)) for parts in (before, after))
    is_hash = name.startswith("weights.") or '"sha256:' in was + now
    return name if is_hash else f"{name}: {was} then, {now} now"
