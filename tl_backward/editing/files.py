"""Edits as safetensors files, and what they have to know of the model that they are for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tl_backward import tensor_files
from tl_backward.editing.weight_change import fingerprint
from tl_backward.editing.weight_edit import MadeFor, WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, weight_sites

KIND = "WeightEdit"


def save_edit(edit: WeightEdit, model: Model, path: Path) -> Path:
    """See :meth:`WeightEdit.save`."""
    tensors: dict[str, Tensor] = {}
    for name, g in edit.factors.items():
        tensors |= {f"{name}.inputs": g.inputs, f"{name}.vjps": g.vjps}
    contents = {"model": model_name(model), "weights": fingerprints(model, list(edit.factors))}
    return tensor_files.write(path, KIND, tensors, contents)


def load_edit(path: Path, model: Model | None) -> WeightEdit:
    """See :meth:`WeightEdit.load`."""
    contents, tensors = tensor_files.read(path, KIND)
    try:
        weights: dict[str, str] = contents["weights"]
        factors = {
            name: GradientFactors(tensors[f"{name}.inputs"], tensors[f"{name}.vjps"])
            for name in weights
        }
        made_for = MadeFor(contents["model"], weights)
    except (KeyError, TypeError, ValueError) as error:
        raise tensor_files.damaged(path, KIND, error) from error
    return WeightEdit(model, factors, made_for=made_for)


def fingerprints(model: Model, names: list[str]) -> dict[str, str]:
    """The fingerprints of the weights of some sites."""
    sites = {site.name: site for site in weight_sites(model)}
    return {name: fingerprint(sites[name].parameter) for name in names}


def model_name(model: Model) -> str:
    """What TransformerLens calls the model; of one from a local folder, the folder's name."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name
