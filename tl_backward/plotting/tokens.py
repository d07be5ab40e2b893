"""Tokens as a reader can tell them apart."""

from __future__ import annotations

SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": r"\x0d"}


def visible(token: str) -> str:
    r"""A token with its white space and control characters made visible.

    Everything that does not print - controls, formats such as zero-width and right-to-left marks,
    white space other than the plain space, surrogates - becomes ``\xNN``, ``\uNNNN`` or
    ``\UNNNNNNNN``. All else, the replacement character included, stays as it is.

    Example:
        >>> visible(" Rome\n"), visible("\u200b"), visible("")
        ('·Rome⏎', '\\u200b', '∅')
    """
    return "".join(map(_visible_character, token)) or "∅"


def _visible_character(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()
