"""The weights that a saved edit or saved statistics belong to."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tl_backward._fingerprint import fingerprint
from tl_backward.sites import Model, weight_sites


class MadeFor(NamedTuple):
    """The weights that a saved edit belongs to: model name, and fingerprints by site name."""

    model: str
    weights: dict[str, str]

    def merged(self, other: MadeFor) -> MadeFor:
        """The weights that the sum of two edits belongs to.

        Raises:
            ValueError: If they belong to different values of the same weight.
        """
        for name in self.weights.keys() & other.weights.keys():
            if self.weights[name] != other.weights[name]:
                raise ValueError(
                    f"cannot add edits that were saved for other weights: {name} of {self.model} "
                    f"and of {other.model}"
                )
        names = dict.fromkeys([self.model, other.model])
        return MadeFor(" and ".join(names), self.weights | other.weights)


def fingerprints(model: Model, names: list[str]) -> dict[str, str]:
    """The fingerprints of the weights of some sites."""
    sites = {site.name: site for site in weight_sites(model)}
    return {name: fingerprint(sites[name].parameter) for name in names}


def model_name(model: Model) -> str:
    """TransformerLens's name of the model; for a local folder, the folder's name."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() else name
