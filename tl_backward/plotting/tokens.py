"""Making tokens visible and distinguishable."""

from __future__ import annotations

SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": r"\x0d"}


def visible(token: str) -> str:
    r"""Make a token's white space and control characters visible.

    Non-printing characters - control and format characters such as zero-width and right-to-left
    marks, unusual white space, surrogates - become ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``. All
    others, including the replacement character, are unchanged.

    Example:
        >>> visible(" Rome\n"), visible("\u200b"), visible("")
        ('·Rome⏎', '\\u200b', '∅')
    """
    return "".join(map(_visible_character, token)) or "∅"


def _visible_character(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()
