"""An update of one or more weights in factored form."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.editing._weight_change import WeightChange, fingerprint
from tl_backward.editing.hooks import ForwardHooks, edit_hooks
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite, weight_sites
from tl_backward.sites.kinds import READ_BY_INPUT


class MadeFor(NamedTuple):
    """The weights that a saved edit is for: the model's name, and fingerprints by site name."""

    model: str
    weights: dict[str, str]


class WeightEdit:
    """What is added to some weights of a model, as a sum of outer products ``u^T v``.

    It changes nothing until it is asked to: by :meth:`apply`, which changes the weights that the
    forward pass uses and that :meth:`revert` restores bit for bit, or by :meth:`fwd_hooks`, which
    touch no weight. An edit of a weight that two sites share (tied embeddings) acts in both.

    Attributes:
        model: The model that it is bound to; None for one that was loaded or made without.
        factors: By site name the update that is *added* to ``W`` in the orientation
            ``[d_in, d_out]``: left vectors ``u`` in ``.inputs``, right vectors ``v`` in ``.vjps``.
        report: What the function that made the edit has to say about it; None for others.
        made_for: The weights that a loaded edit is for; None for others.

    Args:
        model: A TransformerLens model, or None to :meth:`bind` it later.
        factors: The factors by site name, with or without a batch axis.
        report: See above.
        made_for: See above.
        sites: The sites of the factors and those tied to them, where they are known already; the
            model is not searched for them then.

    Raises:
        TypeError: When the model is no TransformerLens model.
        ValueError: When the model has no such site, or its shape or its weights are others.

    Example:
        >>> u, v = torch.randn(1, 1536), torch.randn(1, 576)
        >>> edit = WeightEdit(model, {"blocks.5.mlp.W_out": GradientFactors(u, v)})
        >>> with edit.applied():
        ...     model.generate("Lionel Messi plays for")
    """

    def __init__(
        self,
        model: Model | None,
        factors: Mapping[str, GradientFactors],
        report: Any = None,
        made_for: MadeFor | None = None,
        sites: Sequence[WeightSite] | None = None,
    ) -> None:
        self.model = model
        self.factors: dict[str, GradientFactors] = {
            name: GradientFactors(g.inputs.detach().flatten(0, -2), g.vjps.detach().flatten(0, -2))
            for name, g in factors.items()
        }
        self.report = report
        self.made_for = made_for
        self._changes: list[tuple[Tensor, WeightChange]] | None = None
        self._sites: dict[str, WeightSite] = {}
        if model is not None and self.factors:
            every = weight_sites(model) if sites is None else sites
            self._sites = {site.name: site for site in every}
            self._require_fitting_sites()

    def __repr__(self) -> str:
        terms = ", ".join(f"{name}: rank <= {len(g.vjps)}" for name, g in self.factors.items())
        return f"WeightEdit({terms or 'nothing'})"

    @property
    def is_applied(self) -> bool:
        """Whether the weights bear the edit now."""
        return self._changes is not None

    def bind(self, model: Model) -> WeightEdit:
        """The same edit for a model with these sites and, if it was loaded, these weights.

        Raises:
            TypeError, ValueError: As for a new edit.
        """
        return WeightEdit(model, self.factors, self.report, self.made_for)

    def apply(self) -> None:
        """Add the update to the weights, in place: to all of them, or on an error to none.

        Half-precision weights are added to in float32 and rounded once.

        Raises:
            RuntimeError: When it is applied already.
            NotImplementedError: When a weight is quantised; :meth:`fwd_hooks` work for it.
            ValueError: When the edit is bound to no model, or an update is not finite.
        """
        if self._changes is not None:
            raise RuntimeError("this edit is applied already; revert() it first, or apply 2 * edit")
        changes: list[tuple[Tensor, WeightChange]] = []
        try:
            for name, update in self._updates():
                parameter = self._sites[name].parameter
                change = WeightChange(name, parameter, update.to(parameter.device))
                changes.append((parameter, change))
                change.make(parameter)
            self._changes = changes
        except BaseException:
            self._changes = None
            for parameter, change in reversed(changes):
                change.undo(parameter)
            raise

    def revert(self) -> None:
        """Restore the weights bit for bit, as they were before :meth:`apply`.

        Edits of the same weight are reverted in the reverse order of their application, edits of
        different weights in any order.

        Raises:
            RuntimeError: When it is not applied, when a later edit of one of the weights is still
                there, or when something else has changed one since. Nothing is reverted then.
        """
        if self._changes is None:
            raise RuntimeError("this edit is not applied; apply() comes first")
        for parameter, change in self._changes:
            change.require_undoable(parameter)
            if self._sites[change.name].parameter is not parameter:
                raise RuntimeError(
                    f"the model has another tensor for {change.name} than when this edit was "
                    "applied; load it again. Nothing was reverted"
                )
        try:
            self._undo()
        except BaseException:
            self._undo()
            raise

    @contextmanager
    def applied(self) -> Iterator[WeightEdit]:
        """The model with the edit applied, and reverted at the end, also after an exception.

        Raises:
            RuntimeError: As :meth:`apply` and :meth:`revert`.
        """
        self.apply()
        try:
            yield self
        finally:
            if self._changes is not None:
                self.revert()

    def fwd_hooks(self) -> ForwardHooks:
        """Hooks that have the effect of the edit and touch no weight.

        They work for frozen and quantised weights, in generation, and together with other hooks;
        those at the very HookPoints of an edited weight belong before them when they patch its
        input, and behind them when they patch its output. On a ``HookedTransformer`` the HookPoints
        that it lacks are added, as by :func:`tl_backward.add_hook_points`.

        Returns:
            Pairs of a HookPoint's name and a function.

        Raises:
            ValueError: When the edit is bound to no model.

        Example:
            >>> model.run_with_hooks(tokens, fwd_hooks=edit.fwd_hooks())
        """
        return edit_hooks(self._require_model(), [self])

    def norm(self) -> Float[Tensor, ""]:
        """Frobenius norm of the update over all weights together.

        Raises:
            ValueError: When the edit is bound to no model, which knows which weights are tied.
        """
        groups = [g for name, (_, g) in self.at_sites().items() if self._is_first_of_its_ties(name)]
        squares = [g.norm().cpu() ** 2 for g in groups]
        return torch.stack(squares).sum().sqrt() if squares else torch.tensor(0.0)

    def residual_vectors(self) -> tuple[Float[Tensor, "entry d_model"], list[str]]:
        """The edit's vectors on the side of the residual stream, and labels, for ``lens.read``.

        Left ones of weights that read the stream, right ones of those that write to it. As numbers
        go to the other side (see :meth:`__mul__`), these are the vectors that the edit was made of:
        a shift's right vectors are target embeddings, to be read at their top, and a gradient
        step's are VJPs with their raw sign, to be read at their bottom. All unembeddings may have a
        direction in common that hides the target; subtract ``model.W_U.mean(1)`` then.

        Raises:
            ValueError: When the edit is empty.

        Example:
            >>> lens.read(*edit.residual_vectors()).top_tokens()
        """
        vectors, labels = [], []
        for name, g in self.factors.items():
            of_site = g.inputs if _is_read_by_input(name) else g.vjps
            vectors += [one.to(torch.promote_types(one.dtype, torch.float32)) for one in of_site]
            labels += [f"{name} term {i}" for i in range(len(of_site))]
        if not vectors:
            raise ValueError("this edit is empty: there is nothing to read")
        return torch.stack(vectors), labels

    def __add__(self, other: WeightEdit) -> WeightEdit:
        """Both edits at once."""
        if not isinstance(other, WeightEdit):
            return NotImplemented
        if self.model is not other.model:
            raise ValueError("cannot add edits of different models; bind() them to the same one")
        factors = dict(self.factors)
        for name, g in other.factors.items():
            factors[name] = factors[name] + g if name in factors else g
        edit = self._with(factors)
        edit._sites = self._sites | other._sites
        return edit

    def __mul__(self, scalar: int | float | Float[Tensor, ""]) -> WeightEdit:
        """The edit times a number, which goes to the vectors that :meth:`residual_vectors` omits.

        Raises:
            ValueError: When the number is not finite.
        """
        if isinstance(scalar, Real | Tensor) and not math.isfinite(scalar):
            raise ValueError(f"an edit can be multiplied by a finite number only, got {scalar}")
        factors = {
            name: g * scalar if _is_read_by_input(name) else (g.T * scalar).T
            for name, g in self.factors.items()
        }
        return self._with(factors)

    __rmul__ = __mul__

    def save(self, path: str | Path) -> Path:
        """Write the edit to one safetensors file, with the weights that it is for by fingerprint.

        Args:
            path: The file to write. Its folder must exist.

        Returns:
            The same path.

        Raises:
            RuntimeError: While the edit is applied.
            ValueError: When it is bound to no model.
            OSError: When the file cannot be written.
        """
        from tl_backward.editing.files import save_edit

        if self._changes is not None:
            raise RuntimeError("an edit is saved for the weights without it; revert() it first")
        return save_edit(self, self._require_model(), Path(path))

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> WeightEdit:
        """Read an edit that :meth:`save` has written.

        Args:
            path: The file.
            model: The model to bind it to. Without one, only the factors can be used until
                :meth:`bind`.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds no edit or is damaged, and when the model has other
                sites, shapes or weights than the one that the edit was saved for.

        Example:
            >>> edit.save("messi.safetensors")
            >>> WeightEdit.load("messi.safetensors", model).apply()
        """
        from tl_backward.editing.files import load_edit

        return load_edit(Path(path), model)

    def at_sites(self) -> dict[str, tuple[WeightSite, GradientFactors]]:
        """Where the edit acts: its sites and those with the same weight, each with its update.

        Raises:
            ValueError: When the edit is bound to no model.
        """
        self._require_model()
        found: dict[str, tuple[WeightSite, GradientFactors]] = {}
        for name, g in self.factors.items():
            site = self._sites[name]
            for other in (site, *(self._sites[tied] for tied in site.tied_to)):
                here = g if other.kind == site.kind else g.T
                if other.name in found:
                    here = found[other.name][1] + here
                found[other.name] = (other, here)
        return found

    def _with(self, factors: dict[str, GradientFactors]) -> WeightEdit:
        """An edit of the same sites with other factors."""
        edit = copy.copy(self)
        edit.factors, edit.report, edit.made_for, edit._changes = factors, None, None, None
        return edit

    def _updates(self) -> Iterator[tuple[str, Tensor]]:
        """By weight, what is added to it, in its own layout."""
        for name, (site, g) in self.at_sites().items():
            if self._is_first_of_its_ties(name):
                yield name, site.to_parameter_layout(g.dense())

    def _is_first_of_its_ties(self, name: str) -> bool:
        """Whether this site stands for the weight that it edits and may share with others."""
        sharers = {name, *self._sites[name].tied_to}
        return next((n for n in self.factors if n in sharers), None) == name

    def _undo(self) -> None:
        for parameter, change in reversed(self._changes or []):
            change.undo(parameter)
        self._changes = None

    def _require_model(self) -> Model:
        if self.model is None:
            raise ValueError("this edit is bound to no model; use edit.bind(model)")
        return self.model

    def _require_fitting_sites(self) -> None:
        for name, g in self.factors.items():
            site = self._sites.get(name)
            if site is None:
                raise ValueError(f"factors: this model has no site {name!r}; see weight_sites()")
            if g.shape != (site.d_in, site.d_out):
                raise ValueError(
                    f"factors: {name} is [{site.d_in}, {site.d_out}] in this model, and the edit "
                    f"has {list(g.shape)}"
                )
        if self.made_for is None:
            return
        for name, expected in self.made_for.weights.items():
            if fingerprint(self._sites[name].parameter) != expected:
                raise ValueError(
                    f"model: its {name} is not the one that this edit was saved for (that of "
                    f"{self.made_for.model}): the values, the dtype or the shape are others; "
                    "revert the edits that are applied, or load that model as it was"
                )


def _is_read_by_input(name: str) -> bool:
    """Whether the side of the residual stream is the weight's input."""
    return name.rpartition(".")[2] in (*READ_BY_INPUT, "W_U")
