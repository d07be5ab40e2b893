"""CounterFact records, from a file or from the hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tl_backward.evaluation.hub_data import load_hub_data


@dataclass(frozen=True)
class Record:
    """A fact to rewrite, and prompts that measure the edit's side effects.

    Attributes:
        case_id: Number of the record in CounterFact.
        prompt: The prompt to continue, including the subject.
        subject: Subject of the fact.
        relation_id: Wikidata's id of the relation, such as ``"P103"``.
        target_new: New target of the prompt, without a leading space.
        target_true: True target of the prompt and of the neighbourhood prompts.
        paraphrase_prompts: Paraphrases of the fact.
        neighborhood_prompts: Prompts with the same relation for other subjects that share
            ``target_true``.
        generation_prompts: Prompts for texts about the subject.
    """

    case_id: int
    prompt: str
    subject: str
    relation_id: str
    target_new: str
    target_true: str
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    generation_prompts: tuple[str, ...]


class Rewrite(NamedTuple):
    """The fact of a CounterFact entry.

    Attributes:
        before: The prompt before the subject.
        subject: Subject of the fact.
        after: The prompt after the subject.
        target_new: New target of the prompt.
        target_true: True target of the prompt.
    """

    before: str
    subject: str
    after: str
    target_new: str
    target_true: str


def load_records(source: str | Path, n: int | None = None, *, split: str = "train") -> list[Record]:
    """Read CounterFact records in the original schema (Meng et al. 2022).

    Args:
        source: A JSON file with a list of records, or the name of a data set on the Hugging Face
            hub.
        n: Number of entries to read, from the first. Default: all.
        split: Split of a data set on the hub.

    Returns:
        The well-formed records, in order.

    Raises:
        FileNotFoundError: If ``source`` ends in ``.json`` and does not exist.
        ValueError: If the file does not hold a JSON list, the data set cannot be loaded, ``n`` is
            not positive, or no record is well-formed.

    Warns:
        UserWarning: If records are malformed, with the index and field of each.

    Example:
        >>> records = load_records("counterfact.json", n=100)
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, or None for all records, got {n}")
    file = Path(source)
    if file.is_file() or file.suffix == ".json":
        entries = _from_file(file)
    else:
        entries = load_hub_data(str(source), split=split)
    records, complaints = [], []
    for i, entry in zip(range(len(entries) if n is None else n), entries, strict=False):
        try:
            records.append(_record(entry))
        except ValueError as error:
            complaints.append(f"record {i}: {error}")
    if not records:
        raise ValueError("\n  ".join([f"source: {source} holds no usable record", *complaints]))
    if complaints:
        summary = f"{source}: skipped {len(complaints)} malformed records"
        warnings.warn("\n  ".join([summary, *complaints]), stacklevel=2)
    return records


def _from_file(file: Path) -> list[Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"source: {file} is not a readable JSON file ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"source: {file} holds a JSON {type(entries).__name__}, not a list")
    return entries


def rewrite_of(entry: Any) -> Rewrite:
    """The fact of an entry in the original schema.

    Raises:
        ValueError: If the entry is malformed; the message names the field.
    """
    template = _text(entry, "requested_rewrite", "prompt")
    if template.count("{}") != 1:
        raise ValueError(f"requested_rewrite.prompt must have one {{}}, got {template!r}")
    before, after = template.split("{}")
    return Rewrite(
        before=before,
        subject=_text(entry, "requested_rewrite", "subject"),
        after=after,
        target_new=_text(entry, "requested_rewrite", "target_new", "str"),
        target_true=_text(entry, "requested_rewrite", "target_true", "str"),
    )


def _record(entry: Any) -> Record:
    """The record of an entry in the original schema.

    Raises:
        ValueError: If the entry is malformed; the message names the field.
    """
    rewrite = rewrite_of(entry)
    case_id = _at(entry, "case_id")
    if not isinstance(case_id, int) or isinstance(case_id, bool):
        raise ValueError(f"case_id must be an integer, got {case_id!r}")
    return Record(
        case_id=case_id,
        prompt=rewrite.before + rewrite.subject + rewrite.after,
        subject=rewrite.subject,
        relation_id=_text(entry, "requested_rewrite", "relation_id"),
        target_new=rewrite.target_new,
        target_true=rewrite.target_true,
        paraphrase_prompts=_texts(entry, "paraphrase_prompts"),
        neighborhood_prompts=_texts(entry, "neighborhood_prompts"),
        generation_prompts=_texts(entry, "generation_prompts"),
    )


def _at(entry: Any, *path: str) -> Any:
    value = entry
    for depth, key in enumerate(path):
        if not isinstance(value, Mapping):
            where = ".".join(path[:depth]) or "the record"
            raise ValueError(f"{where} must be an object, got {value!r}")
        if key not in value:
            raise ValueError(f"{'.'.join(path[: depth + 1])} is missing")
        value = value[key]
    return value


def _text(entry: Any, *path: str) -> str:
    value = _at(entry, *path)
    if not _is_text(value):
        raise ValueError(f"{'.'.join(path)} must be text, got {value!r}")
    return value


def _texts(entry: Any, field: str) -> tuple[str, ...]:
    value = _at(entry, field)
    is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    if not is_list or not value or not all(_is_text(one) for one in value):
        raise ValueError(f"{field} must be a list of at least one text, got {value!r}")
    return tuple(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
