"""Edits and key statistics as safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_backward.editing.weight_change import fingerprint
from tl_backward.editing.weight_edit import MadeFor, WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, weight_sites

VERSION = "1"
EDIT = "WeightEdit"


def save_edit(edit: WeightEdit, model: Model, path: Path) -> Path:
    """See :meth:`WeightEdit.save`."""
    tensors: dict[str, Tensor] = {}
    for name, g in edit.factors.items():
        tensors |= {f"{name}.inputs": g.inputs, f"{name}.vjps": g.vjps}
    contents = {"model": model_name(model), "weights": fingerprints(model, list(edit.factors))}
    return write(path, EDIT, tensors, contents)


def load_edit(path: Path, model: Model | None) -> WeightEdit:
    """See :meth:`WeightEdit.load`."""
    contents, tensors = read(path, EDIT)
    try:
        weights: dict[str, str] = contents["weights"]
        factors = {
            name: GradientFactors(tensors[f"{name}.inputs"], tensors[f"{name}.vjps"])
            for name in weights
        }
        made_for = MadeFor(contents["model"], weights)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged {EDIT} ({error!r}); save it again") from error
    return WeightEdit(model, factors, made_for=made_for)


def write(path: Path, kind: str, tensors: dict[str, Tensor], contents: dict[str, Any]) -> Path:
    """Write tensors, and the rest as JSON; the file appears under its name only when whole.

    Raises:
        OSError: When it cannot be written.
    """
    metadata = {"format": f"tl_backward.{kind}", "version": VERSION}
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with TemporaryDirectory(prefix=".tl_backward-", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        try:
            save_file(stored, whole, metadata | {"contents": json.dumps(contents)})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        os.replace(whole, path)
    return path


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write` has written.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is damaged, holds something else or is of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"tl_backward.{kind}":
                raise ValueError(f"{path} is a safetensors file, but holds no {kind}")
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} is in version {metadata.get('version')} of its format, and this "
                    f"tl_backward reads version {VERSION}; upgrade it, or save the {kind} again"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return json.loads(metadata["contents"]), tensors
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is truncated, damaged, or no safetensors file ({error}); save the {kind} again"
        ) from error


def fingerprints(model: Model, names: list[str]) -> dict[str, str]:
    """The fingerprints of the weights of some sites."""
    sites = {site.name: site for site in weight_sites(model)}
    return {name: fingerprint(sites[name].parameter) for name in names}


def model_name(model: Model) -> str:
    """What TransformerLens calls the model; of one from a local folder, the folder's name."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name
