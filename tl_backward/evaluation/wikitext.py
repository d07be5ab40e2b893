"""WikiText-2, whose perplexity tells what an edit does elsewhere."""

from __future__ import annotations

from pathlib import Path

from tl_backward.evaluation.hub_data import load_hub_data

N_LINES = 100


def wikitext_lines(source: str | Path, n: int = N_LINES, *, min_characters: int = 30) -> list[str]:
    """The first long enough lines of a text, as the paper takes them from WikiText-2-raw's test.

    Args:
        source: A text file with one line for each record, or else the name of a data set on the
            Hugging Face hub, such as ``"Salesforce/wikitext"``, of whose configuration
            ``wikitext-2-raw-v1`` the test split is loaded by ``datasets``.
        n: How many lines.
        min_characters: What they must have, the line break not counted.

    Raises:
        FileNotFoundError: When ``source`` ends in ``.txt`` and is no file.
        ValueError: When no line is long enough, the file is not in UTF-8, or the data set cannot
            be loaded.

    Example:
        >>> evaluate(model, records, method, perplexity_texts=wikitext_lines("wiki.test.raw.txt"))
    """
    file = Path(source)
    if file.is_file() or file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"source: {file} is no text in UTF-8 ({error})") from error
    else:
        lines = load_hub_data(str(source), "wikitext-2-raw-v1", split="test")["text"]
    cut = (line.rstrip("\r\n") for line in lines)
    long_enough = [line for line in cut if len(line) >= min_characters][:n]
    if not long_enough:
        raise ValueError(f"source: {source} has no line of {min_characters} characters or more")
    return long_enough
