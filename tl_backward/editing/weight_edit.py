"""An update of one or more weights in factored form."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward import tensor_files
from tl_backward._fingerprint import fingerprint
from tl_backward._integers import is_integer
from tl_backward._precision import stable_norm, upcast
from tl_backward.cache import BackwardCache
from tl_backward.editing._alignment import alignment_of
from tl_backward.editing._difference import difference_factors
from tl_backward.editing._export import export_model
from tl_backward.editing._lora import adapter_factors
from tl_backward.editing._low_rank_hooks import (
    ForwardHooks,
    low_rank_hooks,
    require_finite,
    with_hook_points,
)
from tl_backward.editing._made_for import MadeFor, fingerprints, model_name
from tl_backward.editing._summary import EditSummary, summary_of
from tl_backward.editing._weight_change import WeightChanges, standing_changes
from tl_backward.factors import GradientFactors
from tl_backward.sites import Model, WeightSite, weight_sites
from tl_backward.sites.kinds import is_read_by_input, require_beside_the_stream
from tl_backward.sites.names import parse_site_name
from tl_backward.sites.ties import is_same_matrix, is_transposed, rearranged, shares_memory

KIND = "WeightEdit"


class WeightEdit:
    """An update to add to some weights of a model, as a sum of outer products ``u^T v``.

    Creating an edit changes nothing. :meth:`apply` changes the weights of the forward pass, and
    :meth:`revert` restores them bit for bit. :meth:`fwd_hooks` have the same effect without
    changing weights. An edit of a weight that two sites share (tied embeddings) acts in both.

    Attributes:
        model: The model that the edit is bound to; None if it was loaded or made without one.
        factors: The update *added* to ``W``, shape ``[d_in, d_out]``, by site name: left vectors
            ``u`` in ``.inputs``, right vectors ``v`` in ``.vjps``.
        report: Report of the function that made the edit, if any.
        made_for: The weights that a loaded edit belongs to; None for others.

    Args:
        model: A TransformerLens model, or None to :meth:`bind` the edit later.
        factors: The factors by site name, with or without a batch axis.
        report: See above.
        made_for: See above.
        sites: The sites of the factors and those tied to them, if already known; avoids surveying
            the model.

    Raises:
        TypeError: If ``model`` is not a TransformerLens model.
        ValueError: If the model lacks a site, or its shape or weights differ.

    Example:
        >>> (site,) = weight_sites(model, "W_out", layers=5)
        >>> u, v = torch.randn(1, site.d_in), torch.randn(1, site.d_out)
        >>> edit = WeightEdit(model, {site.name: GradientFactors(u, v)})
        >>> with edit.applied():
        ...     model.generate("Lionel Messi plays for", use_past_kv_cache=False)
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
            name: GradientFactors(
                rearrange(g.inputs.detach(), "... d_in -> (...) d_in"),
                rearrange(g.vjps.detach(), "... d_out -> (...) d_out"),
            )
            for name, g in factors.items()
        }
        self.report = report
        self.made_for = made_for
        self._changes: WeightChanges | None = None
        self._sites: dict[str, WeightSite] = {}
        self._sharers: dict[str, tuple[WeightSite, ...]] = {}
        self._borne: dict[str, frozenset[object]] = {}
        if model is not None and self.factors:
            every = weight_sites(model) if sites is None else sites
            self._sites = {site.name: site for site in every}
            self._require_fitting_sites()
            self._sharers = {name: self._sites_in_memory_of(name) for name in self.factors}
            self._borne = {name: self._standing_changes(name) for name in self.factors}

    @classmethod
    def from_difference(
        cls,
        base: Model,
        tuned: Model,
        weights: str | Iterable[str] | None = None,
        layers: int | Iterable[int] | None = None,
        rank: int | float = 8,
    ) -> WeightEdit:
        """What a fine-tune wrote: the leading singular directions of ``W_tuned - W_base``.

        One weight at a time is compared, so that memory holds three matrices of a weight's shape
        at most. The decomposition is randomised where the matrix is large, and the same each time.

        Args:
            base: The model before; the edit is bound to it.
            tuned: The model after: the same architecture, shapes, tokens and processing of weights.
            weights: Kinds of weights, as in :func:`tl_backward.weight_sites`. Default: all.
            layers: Layers. Default: all.
            rank: How many directions of each weight to keep, or the share of its energy (squared
                Frobenius norm) that they have at least, in (0, 1).

        Returns:
            The edit. ``edit.report`` has every weight's norm and the share of the energy that was
            left out, and the parameters outside of the sites (norms, biases) that differ, too.
            Weights that do not differ are not in the edit.

        Raises:
            TypeError: When one is no TransformerLens model.
            ValueError: When the models have other sites, shapes, ties, tokens, architectures or
                processed weights, when a value is not finite, or the rank is out of range.
            NotImplementedError: When a weight is quantised or offloaded.

        Warns:
            UserWarning: When parameters differ that no edit can hold.

        Example:
            >>> edit = WeightEdit.from_difference(base, tuned, rank=4)
            >>> pd.DataFrame(edit.report.sites).nlargest(5, "norm")
        """
        return cls(base, *difference_factors(base, tuned, weights, layers, rank))

    @classmethod
    def from_peft(cls, model: Model, adapter: Any) -> WeightEdit:
        """What a LoRA adapter of ``peft`` adds to the weights: exact, and without merging it.

        Scales, patterns of ranks and scales, rank-stabilised scales and embeddings are heeded; of
        a ``PeftModel`` with several active adapters the edit is their sum. An adapter of a fused
        weight (QKV, gate and up) becomes an edit of each part.

        Args:
            model: A ``TransformerBridge`` of the base model, with raw weights.
            adapter: The adapter's folder, its safetensors file (with the config beside it), or a
                ``PeftModel``, whose active adapters are read.

        Returns:
            The edit; its ``report`` has the scale of every module.

        Raises:
            TypeError: When it is none of these, or the model no TransformerLens model.
            FileNotFoundError: When there is no such adapter.
            ValueError: When the model has no such module, another shape, processed weights, or the
                adapter already; and when a file is damaged.
            NotImplementedError: For a ``HookedTransformer``; for adapters that are more than two
                matrices beside a weight (DoRA, biases, ``modules_to_save`` ...); and where a module
                has no site (quantised weights, say) or shares its weight with another.

        Example:
            >>> edit = WeightEdit.from_peft(model, "adapters/my-lora")
            >>> with edit.applied():
            ...     model.generate("Lionel Messi plays for")
        """
        return cls(model, *adapter_factors(model, adapter))

    def __repr__(self) -> str:
        terms = ", ".join(f"{name}: rank <= {len(g.vjps)}" for name, g in self.factors.items())
        return f"WeightEdit({terms or 'nothing'})"

    @property
    def is_applied(self) -> bool:
        """Whether the edit is currently applied."""
        return self._changes is not None

    def bind(self, model: Model) -> WeightEdit:
        """The same edit for a model with these sites and, if it was loaded, these weights.

        Raises:
            TypeError, ValueError: As for a new edit.
        """
        return WeightEdit(model, self.factors, self.report, self.made_for)

    def apply(self) -> None:
        """Add the update to the weights in place: to all of them, or on an error to none.

        For half-precision weights, the sum is computed in float32 and rounded once.

        Raises:
            RuntimeError: If the edit is already applied.
            NotImplementedError: If a weight is quantised, offloaded, or recomputed in every forward
                pass from other parameters; :meth:`fwd_hooks` work for it.
            ValueError: If the edit is bound to no model, or an update is not finite or too large
                for the weight's dtype.
        """
        changes = self._new_changes()
        with self._none_on_error(), self._none_on_error(), self._none_on_error():
            self._changes = changes
            changes.make()

    def revert(self) -> None:
        """Restore the weights of before :meth:`apply` bit for bit.

        Revert edits of the same weight in the reverse order of their application, and edits of
        different weights in any order.

        Raises:
            RuntimeError: If the edit is not applied, a later edit of one of the weights is still in
                place, or something else changed a weight. Nothing is reverted then.
        """
        if self._changes is None:
            raise RuntimeError("this edit is not applied; call apply() first")
        self._changes.require_undoable()
        with self._none_on_error(), self._none_on_error(), self._none_on_error():
            self._undo()

    @contextmanager
    def applied(self) -> Iterator[WeightEdit]:
        """Context with the edit applied; reverts it on exit, also after an exception.

        An interrupt during the check of the weights on exit restores them unchecked.

        Raises:
            RuntimeError, NotImplementedError, ValueError: As :meth:`apply` and :meth:`revert`.
        """
        changes = self._new_changes()
        with self._none_on_error(), self._none_on_error(), self._none_on_error():
            self._changes = changes
            changes.make()
            try:
                yield self
            finally:
                if self._changes is not None:
                    self.revert()

    @property
    def is_hookable(self) -> bool:
        """Whether all weights have HookPoints, so that :meth:`fwd_hooks` work."""
        sites = [site for site, _ in self.at_sites().values()]
        return all(site.hook_in and site.hook_out for site in sites)

    @contextmanager
    def in_effect(self) -> Iterator[ForwardHooks]:
        """Context for a run with the edit: yields its hooks, or applies it if hooks do not work."""
        if self.is_hookable:
            yield self.fwd_hooks()
        else:
            with self.applied():
                yield []

    def fwd_hooks(self) -> ForwardHooks:
        """Hooks with the effect of the edit that change no weight.

        They work for frozen and quantised weights, in generation, and together with other hooks. At
        the HookPoints of an edited weight, put hooks that patch its input before these hooks, and
        hooks that patch its output after them. Missing HookPoints are added to a
        ``HookedTransformer``, as by :func:`tl_backward.add_hook_points`.

        Returns:
            Pairs of a HookPoint's name and a function.

        Raises:
            ValueError: If the edit is bound to no model.
            NotImplementedError: For the matrices of LoRA adapters and of experts, which have no
                HookPoints.

        Example:
            >>> model.run_with_hooks(tokens, fwd_hooks=edit.fwd_hooks())
        """
        model, at_sites = self._require_model(), self.at_sites()
        sites = [site for site, _ in at_sites.values()]
        with_hook_points(model, sites)
        for site, g in at_sites.values():
            require_finite(site, g.inputs, g.vjps)
        return [
            hook
            for site, g in at_sites.values()
            for hook in low_rank_hooks(site, g.inputs.unsqueeze(0), g.vjps.unsqueeze(0))
        ]

    def norm(self) -> Float[Tensor, ""]:
        """Frobenius norm of the update over all weights together.

        Raises:
            ValueError: If the edit is bound to no model, which determines the tied weights.
        """
        groups = [g for name, (_, g) in self.at_sites().items() if self._is_first_of_its_ties(name)]
        norms = [g.norm().cpu() for g in groups]
        return stable_norm(torch.stack(norms)) if norms else torch.tensor(0.0)

    def alignment(self, cache: BackwardCache) -> Float[Tensor, "*batch"]:
        """``-<dW, G_i>``: to first order what the edit takes off the loss of each example.

        Summed over the weights of the edit, of tied ones over all their uses, from the factors
        alone: no gradient is formed. The sum over the examples is that of the whole batch.

        Args:
            cache: Of a run that captured all weights of the edit, of one prompt or of several.

        Returns:
            One number for each prompt; positive where the edit goes down the prompt's gradient.

        Raises:
            ValueError: When the edit is bound to no model, or the cache lacks one of its weights.

        Example:
            >>> edit.alignment(cache)
        """
        updates = {name: g for name, (_, g) in self.at_sites().items()}
        return alignment_of(updates, cache)

    def residual_vectors(self) -> tuple[Float[Tensor, "entry d_model"], list[str]]:
        """The edit's vectors in the residual stream, and labels, for ``lens.read``.

        These are the left vectors of weights that read the stream, and the right vectors of weights
        that write to it. Scaling acts on the other side (see :meth:`__mul__`), so they keep their
        original sign and size: a shift's are target embeddings, to be read at the top; a gradient
        step's are VJPs with raw sign, to be read at the bottom. If a direction that all
        unembeddings share hides the target, subtract ``model.W_U.mean(1)``.

        Raises:
            ValueError: If the edit is empty, or one of its weights neither reads nor writes the
                residual stream (``W_in.lora_B``, ``W_out.lora_A``).

        Example:
            >>> lens.read(*edit.residual_vectors()).top_tokens()
        """
        vectors, labels = [], []
        for name, g in self.factors.items():
            require_beside_the_stream(name)
            terms = g.inputs if is_read_by_input(parse_site_name(name).kind) else g.vjps
            vectors += [upcast(term) for term in terms]
            labels += [f"{name} term {i}" for i in range(len(terms))]
        if not vectors:
            raise ValueError("this edit is empty: there is nothing to read")
        return torch.stack(vectors), labels

    def __add__(self, other: WeightEdit) -> WeightEdit:
        """The sum of two edits.

        Raises:
            ValueError: If they belong to different models, or were saved for different weights.
        """
        if not isinstance(other, WeightEdit):
            return NotImplemented
        if self.model is not other.model:
            raise ValueError("cannot add edits of different models; bind() them to the same one")
        factors = dict(self.factors)
        for name, g in other.factors.items():
            factors[name] = factors[name] + g if name in factors else g
        edit = self._with(factors)
        edit._sites = self._sites | other._sites
        edit._sharers = self._sharers | other._sharers
        edit._borne = other._borne | {
            name: borne & other._borne.get(name, borne) for name, borne in self._borne.items()
        }
        if self.made_for is not None and other.made_for is not None:
            edit.made_for = self.made_for.merged(other.made_for)
        else:
            edit.made_for = self.made_for or other.made_for
        return edit

    def __sub__(self, other: WeightEdit) -> WeightEdit:
        """This edit without another one, such as one of its directions.

        Raises:
            ValueError: As for sums.
        """
        if not isinstance(other, WeightEdit):
            return NotImplemented
        return self + -1 * other

    def __mul__(self, scalar: int | float | Float[Tensor, ""]) -> WeightEdit:
        """The edit times a number; scales the vectors that :meth:`residual_vectors` omits.

        Raises:
            ValueError: If the number is not finite.
        """
        if isinstance(scalar, Real | Tensor) and not math.isfinite(scalar):
            raise ValueError(f"an edit can only be multiplied by a finite number, got {scalar}")
        factors = {
            name: g * scalar if is_read_by_input(parse_site_name(name).kind) else (g.T * scalar).T
            for name, g in self.factors.items()
        }
        return self._with(factors)

    __rmul__ = __mul__

    def truncate(self, k: int) -> WeightEdit:
        """The nearest edit with at most ``k`` singular directions at every site.

        Raises:
            ValueError: When ``k`` is no positive integer.
        """
        if not is_integer(k) or k < 1:
            raise ValueError(f"k must be a positive integer, got {k!r}")
        return self._with(
            {name: g.truncate(min(k, len(g.vjps), *g.shape)) for name, g in self.factors.items()}
        )

    def direction(self, site: str, number: int = 0) -> WeightEdit:
        """One singular direction of one weight, as an edit of its own.

        Args:
            site: The site's name.
            number: Which one: 0 has the largest singular value.

        Raises:
            KeyError: When the edit does not change that weight.
            ValueError: When it has fewer directions there.

        Example:
            >>> name = next(iter(edit.factors))
            >>> without_it = edit - edit.direction(name)
        """
        if site not in self.factors:
            raise KeyError(f"{site!r} is not in this edit; it changes {', '.join(self.factors)}")
        U, S, Vh = self.factors[site].svd()
        if not is_integer(number) or not 0 <= number < len(S):
            raise ValueError(f"number must be an integer in [0, {len(S) - 1}], got {number!r}")
        i = slice(number, number + 1)
        return self._with({site: GradientFactors((U[:, i] * S[i]).mT, Vh[i])})

    def summary(self, k: int = 3) -> EditSummary:
        """Where the norm sits, effective ranks, and the tokens that come up most.

        Args:
            k: How many directions of each weight are read.

        Returns:
            Two data frames. ``sites``: one row for each weight, the largest norm first, with the
            columns ``site, weight, layer, norm``, ``energy_share`` (of the whole edit's squared
            norm), ``rank`` (numerical), ``effective_rank`` (the exponential of the entropy of the
            directions' shares) and ``top``, ``bottom``: the tokens at both ends of its first
            direction. ``tokens``: one row for each token that is among the first five at an end of
            a direction, with its ``side`` (``writes``: of weights that write to the residual stream
            or embed; ``reads``: of those that read it), ``n_directions``, the most first, and
            ``energy_share``: the share of the whole edit's energy in these directions.

        Raises:
            ValueError: When the edit is bound to no model or empty, or a weight has the residual
                stream on neither side.

        Example:
            >>> edit.summary().tokens.query("side == 'writes'").head(10)
        """
        return summary_of(self._require_model(), self, k)

    def save(self, path: str | Path) -> Path:
        """Write the edit to one safetensors file, with fingerprints of the weights it edits.

        Args:
            path: The file to write. Its folder must exist.

        Returns:
            The same path.

        Raises:
            RuntimeError: If the edit is applied, or another edit of its weights was applied after
                this one was made.
            ValueError: If the edit is bound to no model.
            OSError: If the file cannot be written.
        """
        if self._changes is not None:
            raise RuntimeError("an applied edit cannot be saved; revert() it first")
        for name, borne in self._borne.items():
            if not self._standing_changes(name) <= borne:
                raise RuntimeError(
                    f"another edit of {name} was applied after this one was made, so its "
                    "fingerprint would be wrong; revert() the other edit first"
                )
        model = self._require_model()
        tree = {
            "model": model_name(model),
            "weights": fingerprints(model, list(self.factors)),
            "factors": {
                name: {"inputs": g.inputs, "vjps": g.vjps} for name, g in self.factors.items()
            },
        }
        return tensor_files.write(Path(path), KIND, tree)

    def export(self, folder: str | Path) -> Path:
        """Write the edited model as a Hugging Face checkpoint, with its tokenizer.

        ``AutoModelForCausalLM.from_pretrained(folder)`` loads it. The model itself is as it was
        afterwards.

        Args:
            folder: Where to write; it is made if it is not there.

        Returns:
            The same folder.

        Raises:
            NotImplementedError: For a ``HookedTransformer``, processed weights and adapters, which
                are no part of a checkpoint; and as :meth:`apply`.
            ValueError, OSError: As :meth:`apply`, and when the folder cannot be written.

        Example:
            >>> edit.export("edited")
            >>> AutoModelForCausalLM.from_pretrained("edited")
        """
        model = self._require_model()
        with nullcontext() if self.is_applied else self.applied():
            return export_model(model, Path(folder))

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> WeightEdit:
        """Read an edit written by :meth:`save`.

        Args:
            path: The file.
            model: The model to bind the edit to. Without one, only the factors are available until
                :meth:`bind`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no edit or is damaged, or the model's sites, shapes or
                weights differ from those that the edit was saved for.

        Example:
            >>> edit.save("messi.safetensors")
            >>> loaded = WeightEdit.load("messi.safetensors", model)
            >>> loaded.apply()
        """
        tree = tensor_files.read(Path(path), KIND)
        try:
            factors = {name: GradientFactors(**g) for name, g in tree["factors"].items()}
            made_for = MadeFor(tree["model"], dict(tree["weights"]))
            if made_for.weights.keys() != factors.keys():
                raise ValueError("the weights are not those of the factors")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise tensor_files.damaged(Path(path), KIND, error) from error
        return cls(model, factors, made_for=made_for)

    def at_sites(self) -> dict[str, tuple[WeightSite, GradientFactors]]:
        """The sites of the edit and those with the same weight, each with its update.

        Raises:
            ValueError: If the edit is bound to no model.
            NotImplementedError: If another weight shares part of the memory of one of these.
        """
        self._require_model()
        found: dict[str, tuple[WeightSite, GradientFactors]] = {}
        for name, g in self.factors.items():
            for other in self._sharers[name]:
                here = _seen_from(other, self._sites[name], g)
                if other.name in found:
                    here = found[other.name][1] + here
                found[other.name] = (other, here)
        return found

    def _with(self, factors: dict[str, GradientFactors]) -> WeightEdit:
        """A copy of this edit with other factors."""
        edit = copy.copy(self)
        edit.factors, edit.report, edit._changes = factors, None, None
        return edit

    def _updates(self) -> Iterator[tuple[WeightSite, Tensor]]:
        """The update of each weight, in its own layout."""
        for name, (site, g) in self.at_sites().items():
            if self._is_first_of_its_ties(name):
                yield site, site.to_parameter_layout(g.dense())

    def _sites_in_memory_of(self, name: str) -> tuple[WeightSite, ...]:
        """The site, and all sites whose weight shares its memory."""
        site = self._sites[name]
        others = (self._sites[other] for other in site.in_storage_with)
        return site, *(other for other in others if shares_memory(site, other))

    def _is_first_of_its_ties(self, name: str) -> bool:
        """Whether this site is the first of the edit's sites that share its weight."""
        sharing = (
            first for first, sites in self._sharers.items() if name in [site.name for site in sites]
        )
        return next(sharing) == name

    def _standing_changes(self, name: str) -> frozenset[object]:
        return standing_changes(one for one in self._sharers[name] if one.packed is None)

    def _new_changes(self) -> WeightChanges:
        """The edit as weight changes, not yet made."""
        if self._changes is not None and self._changes.are_made:
            raise RuntimeError("this edit is already applied; revert() it first, or apply 2 * edit")
        if self._changes is not None:
            self._undo()
        return WeightChanges(self._updates())

    @contextmanager
    def _none_on_error(self) -> Iterator[None]:
        """Undo the edit on an exception, unless its weights are disputed.

        With three nested contexts there is no line where an interrupt, or a second one during the
        undoing, leaves a changed weight behind.
        """
        try:
            yield
        except BaseException:
            if self._changes is not None and not self._changes.are_disputed:
                self._undo()
            raise

    def _undo(self) -> None:
        if self._changes is not None:
            self._changes.undo()
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
                    f"factors: {name} is [{site.d_in}, {site.d_out}] in this model, but "
                    f"{list(g.shape)} in the edit"
                )
        if self.made_for is None:
            return
        for name, expected in self.made_for.weights.items():
            if fingerprint(self._sites[name].parameter) != expected:
                raise ValueError(
                    f"model: its {name} is not the one that this edit was saved for (from "
                    f"{self.made_for.model}): values, dtype or shape differ; revert the applied "
                    "edits, or load that model as it was"
                )


def _seen_from(other: WeightSite, site: WeightSite, update: GradientFactors) -> GradientFactors:
    """One site's update, expressed for another site whose weight shares the memory."""
    if other is site or is_same_matrix(site, other):
        return update
    if is_transposed(site, other):
        return update.T
    matrix = rearranged(update.dense(), site, other)
    return GradientFactors(torch.eye(len(matrix)).to(matrix), matrix)
