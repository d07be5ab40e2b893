"""Edits as safetensors files, and what they have to know of the model that they are for."""

from __future__ import annotations

from pathlib import Path

from tl_backward import tensor_files
from tl_backward.editing._weight_change import fingerprint
from tl_backward.editing.weight_edit import MadeFor, WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, weight_sites

KIND = "WeightEdit"


def save_edit(edit: WeightEdit, model: Model, path: Path) -> Path:
    """See :meth:`WeightEdit.save`."""
    tree = {
        "model": model_name(model),
        "weights": fingerprints(model, list(edit.factors)),
        "factors": {name: {"inputs": g.inputs, "vjps": g.vjps} for name, g in edit.factors.items()},
    }
    return tensor_files.write(path, KIND, tree)


def load_edit(path: Path, model: Model | None) -> WeightEdit:
    """See :meth:`WeightEdit.load`."""
    tree = tensor_files.read(path, KIND)
    try:
        factors = {name: GradientFactors(**g) for name, g in tree["factors"].items()}
        made_for = MadeFor(tree["model"], dict(tree["weights"]))
        if made_for.weights.keys() != factors.keys():
            raise ValueError("the weights are not those of the factors")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
