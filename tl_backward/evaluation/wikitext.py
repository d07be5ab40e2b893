"""Lines of WikiText-2, whose perplexity measures an edit's side effects."""

from __future__ import annotations

from pathlib import Path

from tl_backward.evaluation.hub_data import load_hub_data

N_LINES = 100


def wikitext_lines(source: str | Path, n: int = N_LINES, *, min_characters: int = 30) -> list[str]:
    """The first lines of sufficient length, which the paper takes from WikiText-2-raw's test split.

    Args:
        source: A text file with one record per line, or the name of a data set on the Hugging Face
            hub, such as ``"Salesforce/wikitext"``; its configuration ``wikitext-2-raw-v1`` and test
            split are loaded.
        n: Maximum number of lines.
        min_characters: Minimum length of a line, without the line break.

    Raises:
        FileNotFoundError: If ``source`` ends in ``.txt`` and does not exist.
        ValueError: If no line is long enough, the file is not UTF-8, or the data set cannot be
            loaded.

    Example:
        >>> evaluate(model, records, method, perplexity_texts=wikitext_lines("wiki.test.raw.txt"))
    """
    file = Path(source)
    if file.is_file() or file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"source: {file} is not UTF-8 text ({error})") from error
    else:
        lines = load_hub_data(str(source), "wikitext-2-raw-v1", split="test")["text"]
    cut = (line.rstrip("\r\n") for line in lines)
    long_enough = [line for line in cut if len(line) >= min_characters][:n]
    if not long_enough:
        raise ValueError(f"source: {source} has no line of {min_characters} characters or more")
    return long_enough
