"""Which share of the matrices has a site, in a model of each type at its config's default size.

``python tests/matrix_shares.py`` prints the table of the README, in about two minutes. Where a
model cannot be booted without values, it is that of a tiny one.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from helpers.families import FAMILIES, make
from helpers.matrices import default_size, matrix_share
from helpers.texts import tokenizer_from


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder:
        tokenizer = tokenizer_from(Path(folder))
        families = {FAMILIES[name](len(tokenizer)).model_type: name for name in reversed(FAMILIES)}
        for model_type, family in sorted(families.items()):
            try:
                model, size = default_size(model_type, tokenizer), "default size"
            except (NotImplementedError, TypeError):
                model, size = make(family, tokenizer), "tiny"
            print(f"{model_type:24} {matrix_share(model):8.2%}  {size}", flush=True)


if __name__ == "__main__":
    main()
