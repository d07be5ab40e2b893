"""Packages that pip installs together, though they do not work together."""

from importlib.metadata import version


def require_matching_packages() -> None:
    """Refuse a pyarrow that does not import beside this NumPy.

    TransformerLens 2 needs NumPy 1, and pip puts the newest pyarrow next to it.

    Raises:
        ImportError: With the command that mends it.
    """
    numpy, pyarrow = version("numpy"), version("pyarrow")
    if _major(numpy) < 2 and _major(pyarrow) >= 22:
        raise ImportError(
            f"pyarrow {pyarrow} needs NumPy 2, but TransformerLens 2 needs NumPy 1, and {numpy} is "
            "installed; neither TransformerLens nor tl_backward works with these two: "
            "pip install 'pyarrow<22'"
        )


def _major(number: str) -> int:
    return int(number.partition(".")[0])
