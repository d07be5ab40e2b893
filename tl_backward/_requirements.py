"""A check for installed packages that do not work together."""

from importlib.metadata import version


def require_matching_packages() -> None:
    """Refuse a pyarrow that does not work with the installed NumPy.

    TransformerLens 2 needs NumPy 1, but pip installs the newest pyarrow with it.

    Raises:
        ImportError: With the command that fixes the installation.
    """
    numpy, pyarrow = version("numpy"), version("pyarrow")
    if _major(numpy) < 2 and _major(pyarrow) >= 22:
        raise ImportError(
            f"pyarrow {pyarrow} needs NumPy 2, but TransformerLens 2 needs NumPy 1, and NumPy "
            f"{numpy} is installed; neither TransformerLens nor tl_backward can be imported with "
            "both. Fix it with: pip install 'pyarrow<22'"
        )


def _major(number: str) -> int:
    return int(number.partition(".")[0])
