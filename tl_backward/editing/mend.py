"""MEND: an editor that learns to turn the factors of a gradient into an edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward import tensor_files
from tl_backward._precision import upcast_dtype
from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.tokens import Prompt, Target, is_single
from tl_backward.editing._made_for import fingerprints, model_name
from tl_backward.editing._mend_transform import MendNetworks
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite, weight_sites

KIND = "MendEditor"
Rows: TypeAlias = dict[str, tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]]
"""Inputs and VJPs by site name."""


@dataclass(frozen=True)
class MendReport:
    """Report of an editor's training.

    Attributes:
        edit_losses: The edited model's negative log-likelihood of new targets at each step,
            averaged over the batch and the targets' tokens, in nats.
        locality_losses: At each step, ``KL(original || edited)`` where neighbours' targets are
            predicted, mean over the batch and the targets' tokens, in nats.
        n_records: How many records it was trained on.
        seconds: How long the training took.
    """

    edit_losses: tuple[float, ...] = ()
    locality_losses: tuple[float, ...] = ()
    n_records: int = 0
    seconds: float = field(default=0.0, compare=False)


class MendEditor:
    """Makes edits from one forward and one backward pass, with a network per weight shape.

    The network maps the factors ``x`` and ``delta`` of the gradient of the target's negative
    log-likelihood to ``x~`` and ``delta~``. The edit is ``step size * sum x~^T delta~``, with a
    learned step size, of any sign, per weight. :func:`train_mend` trains editors.

    Attributes:
        model: The model to edit.
        sites: The weights to edit.
        networks: The trained networks.
        prepend_bos: As in ``model.to_tokens``, for prompts that are texts.
        report: How it was trained.

    Args:
        model: A TransformerLens model in eval mode.
        sites: The weights to edit.
        rank: Inner width of the networks' layers.
        prepend_bos: As in ``model.to_tokens``.
        seed: Seed of the networks' initial parameters.

    Example:
        >>> editor = train_mend(model, records, layers=[27, 28, 29], rank=64, lr=1e-4, steps=500)
        >>> edit = editor("Lionel Messi plays for", " Paris")
        >>> editor.save("mend.safetensors")
        >>> MendEditor.load("mend.safetensors", model)
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[WeightSite],
        rank: int,
        prepend_bos: bool | None,
        seed: int = 0,
    ) -> None:
        self.model, self.sites = model, list(sites)
        self.rank, self.prepend_bos, self.report = rank, prepend_bos, MendReport()
        self.networks = MendNetworks([(site.d_in, site.d_out) for site in sites], rank, seed)
        self.networks.to(model.cfg.device, upcast_dtype(model.cfg.dtype))
        self.networks.requires_grad_(False)

    def __call__(self, prompt: Prompt, target: Target) -> WeightEdit:
        """An edit that makes targets follow prompts.

        Args:
            prompt: Text or token ids of one prompt or several.
            target: One target for all prompts or a list with one per prompt.

        Returns:
            The edit, not applied; for several prompts, the sum of their edits.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: As
                :func:`run_with_backward_cache`.
        """
        each = self.gradients(prompt, target)
        factors = {}
        for i, site in enumerate(self.sites):
            xs, deltas = zip(*(gradient[site.name] for gradient in each), strict=True)
            new = self.networks(i, torch.cat(xs), torch.cat(deltas))
            factors[site.name] = GradientFactors(*new)
        return WeightEdit(self.model, factors)

    def gradients(self, prompt: Prompt, target: Target) -> list[Rows]:
        """The factors of each prompt's gradient, without zero rows."""
        _, cache = run_with_backward_cache(
            self.model,
            prompt,
            target,
            weights=list(dict.fromkeys(site.kind for site in self.sites)),
            layers=sorted({site.layer for site in self.sites if site.layer is not None}),
            prepend_bos=self.prepend_bos,
            padding_side="right",
        )
        single = is_single(prompt)
        found = []
        for b in range(cache.loss.numel()):
            rows = {}
            for site in self.sites:
                g = cache[site.name] if single else cache[site.name].example(b)
                x, delta = g.inputs.detach(), g.vjps.detach()
                counts = x.ne(0).any(-1) & delta.ne(0).any(-1)
                rows[site.name] = x[counts], delta[counts]
            found.append(rows)
        return found

    def save(self, path: str | Path) -> Path:
        """Write the editor to one safetensors file, with fingerprints of the weights it edits.

        Args:
            path: The file to write. Its folder must exist.

        Raises:
            OSError: If the file cannot be written.
        """
        names = [site.name for site in self.sites]
        tree = {
            "model": model_name(self.model),
            "weights": fingerprints(self.model, names),
            "rank": self.rank,
            "prepend_bos": self.prepend_bos,
            "report": asdict(self.report),
            "state": dict(self.networks.state_dict()),
        }
        return tensor_files.write(Path(path), KIND, tree)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> MendEditor:
        """Read an editor written by :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else, or the editor belongs to
                other weights than this model's.
        """
        tree = tensor_files.read(Path(path), KIND)
        try:
            expected: dict[str, str] = tree["weights"]
            by_name = {site.name: site for site in weight_sites(model)}
            known = [name for name in expected if name in by_name]
            if fingerprints(model, known) == expected:
                sites = [by_name[name] for name in known]
                editor = cls(model, sites, tree["rank"], tree["prepend_bos"])
                editor.networks.load_state_dict(tree["state"])
                editor.report = MendReport(**tree["report"])
                return editor
            made_for = tree["model"]
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise tensor_files.damaged(Path(path), KIND, error) from error
        raise ValueError(
            f"{path} has an editor of {made_for}, but this model has other weights "
            f"({', '.join(expected)}); revert the applied edits, or load that model"
        )


def mlp_sites(
    model: Model, weights: str | Iterable[str] | None, layers: int | Iterable[int] | None
) -> list[WeightSite]:
    """The weights to edit, by default those of the MLPs in the last three layers."""
    n_layers = model.cfg.n_layers
    chosen = range(max(0, n_layers - 3), n_layers) if layers is None else layers
    if weights is not None:
        return weight_sites(model, weights, chosen)
    kinds = {site.kind for site in weight_sites(model, None, chosen)}
    return weight_sites(model, [k for k in ("W_in", "W_gate", "W_out") if k in kinds], chosen)
