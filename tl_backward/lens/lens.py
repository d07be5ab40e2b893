"""The logit lens of the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_backward._integers import as_ranges, is_integer
from tl_backward._user_warnings import warn_user
from tl_backward.cache import BackwardCache
from tl_backward.cache.residual import SliceInput
from tl_backward.cache.rows import Positions
from tl_backward.capture import CaptureOptions, run_with_backward_cache
from tl_backward.capture.tokens import Prompt, Target, decode_each
from tl_backward.lens._entries import entries_of, entry_of_expert
from tl_backward.lens._options import (
    ReadKeywords,
    ReadoutKeywords,
    ReadoutOptions,
    VocabularyTokens,
    readout_options,
)
from tl_backward.lens._reading import layer_of_entry, read_vectors
from tl_backward.lens._selection import (
    Selection,
    parts_of_residual,
    require_same_model,
)
from tl_backward.lens._targets import Targets, TargetTokens, targets_for
from tl_backward.lens._vocabulary import ReturnType
from tl_backward.lens.edits import (
    EditReadout,
    Factored,
    directions_of,
    edit_readout,
    label_of,
)
from tl_backward.lens.readout import Readout, is_forward, is_weight_kind
from tl_backward.lens.result import BackwardLensResult, RoutedTokens
from tl_backward.sites import FoundSites, Model, find_sites, layer_numbers, require_model
from tl_backward.sites.kinds import READ_BY_INPUT, READ_BY_VJP, reads_stream
from tl_backward.sites.names import parse_site_name
from tl_backward.translators import Translator


class BackwardLogitLens:
    """Reads gradients, and the vectors they are built from, in the model's own vocabulary.

    Calling the lens reads weights and the VJPs of the residual stream. The methods read other
    vectors in the same way.

    Args:
        model: A TransformerLens model in eval mode.

    Raises:
        TypeError: If ``model`` is not a TransformerLens model.

    Example:
        >>> lens = BackwardLogitLens(model)
        >>> result = lens("Lionel Messi plays for", " Paris")
        >>> result["W_out"].bottom_tokens()[20][-1][0]   # " Paris" in SmolLM2: layer 20, last token
    """

    def __init__(self, model: Model) -> None:
        require_model(model)
        self.model = model

    def __call__(
        self,
        prompt: Prompt | None = None,
        target: Target | None = None,
        *,
        cache: BackwardCache | None = None,
        weights: str | Iterable[str] = ("W_in", "W_out"),
        residual: Literal["accumulated", "decomposed", "heads"] | None = None,
        incl_mid: bool = False,
        forward: bool = False,
        layers: int | Iterable[int] | None = None,
        expert: int | None = None,
        positions: Positions = None,
        batch_slice: SliceInput = None,
        vjps: Literal["residual", "output"] = "residual",
        lens: Translator | None = None,
        apply_ln: bool = True,
        normalize: bool = False,
        vocab: VocabularyTokens | None = None,
        targets: TargetTokens | None = None,
        return_type: ReturnType = "log_probs",
        top_k: int | None = None,
        bottom_k: int | None = None,
        direction: Literal["gradient", "descent"] = "gradient",
        chunk_size: int = 64,
        **run: Unpack[CaptureOptions],
    ) -> BackwardLensResult:
        """Run one forward and one backward pass and read the inputs and VJPs of the weights.

        Arguments that TransformerLens's forward lens (``logit_lens``) also has keep their meaning.

        Args:
            prompt: Text or token ids of one prompt or several.
            target: The target to differentiate towards, as in :func:`run_with_backward_cache`.
            cache: The cache of an earlier run, instead of a prompt.
            weights: Kinds of weights to read.
            residual: Also read VJPs of the residual stream: ``"accumulated"``, ``"decomposed"``, or
                ``"heads"`` for the part that each head adds; see ``result["accumulated"]`` etc.
            incl_mid: Whether ``"accumulated"`` includes the middle of blocks. The forward stream
                never does.
            forward: Also read the residual stream of the same run's forward pass, i.e. the usual
                logit lens, into ``result["forward"]``.
            layers: Layers to read; negative ones count from the last. In the residual stream they
                select entries such as ``3_pre``, ``3_attn_out`` or ``L3H0``; entries without a
                layer (``final_post``, ``unembed``) are always read, and the whole backward pass
                runs. Default: all, with ``cache=`` all captured layers.
            expert: Read only this expert, at the tokens routed to it. Default: all experts of a
                token together, which share their input and whose VJPs at W_out are one vector times
                the routing weights (see ``result.experts``).
            positions: Positions to read: an index, a slice or a list (a tuple is a slice), or
                TransformerLens's ``Slice``. With ``cache=``, indexes the cached positions.
                Default: all.
            batch_slice: Prompts of a batch to read, in the same form; an index drops the axis.
            vjps: Which VJPs to read where a post-norm follows the weight (Gemma 2 and 3, OLMo 2,
                GLM-4 ...): those after the norm, at the residual stream, or those at the weight's
                own output. Elsewhere the two are equal.
            lens: A translator ``f(vectors, layer) -> vectors`` for the ``[(batch), pos, d_model]``
                vectors of one layer, applied before the norm; see :mod:`tl_backward.translators`.
                ``layer`` is the weight's layer, or the number in a label such as ``3_pre``, and
                None elsewhere.
            apply_ln: Whether to apply the model's final norm.
            normalize: Scale every vector to unit length first (the normalised logit lens, App H).
            vocab: Strings or ids of the tokens whose values to keep in ``vocab_values``, instead of
                the top and bottom tokens.
            targets: Tokens whose ranks and values to keep: one, several shared by all rows, or a
                tensor with one per row, aligned from the right with the ``[batch, pos]`` rows.
                Default: the target's. With a target of several tokens, a position that predicts
                one of them gets that token; any other position gets the first.
            return_type: Type of the values: log-probabilities, logits or probabilities.
            top_k: Number of most probable tokens to keep. Default: 10, or none with ``vocab``.
            bottom_k: Number of least probable tokens to keep. Default: ``top_k``.
            direction: ``"descent"`` puts at the top the tokens that a descent step moves towards,
                by swapping the ends of the VJPs' readouts. Inputs ``x_i`` are read unchanged.
            chunk_size: Number of rows to unembed at once.
            run: ``loss_fn`` instead of a target, ``prepend_bos``, ``padding_side``, ``fwd_hooks``
                and ``bwd_hooks``, as in :func:`run_with_backward_cache`.

        Raises:
            ValueError: If an argument is out of range; if ``vocab`` is combined with ``top_k``, or
                ``cache`` with arguments of a run; if the cache comes from another model or lacks
                what is to be read; and as :func:`run_with_backward_cache`.
            TypeError: If prompt, cache, weights, lens or tokens have the wrong type.
            NotImplementedError: For blocks that run several times in one forward pass.

        Warns:
            UserWarning: If layers have no site of a weight, e.g. where a mixer replaces attention
                (listed in ``result.left_out``); and as :func:`run_with_backward_cache`.
        """
        options = readout_options(
            self.model,
            lens=lens,
            apply_ln=apply_ln,
            normalize=normalize,
            vocab=vocab,
            return_type=return_type,
            top_k=top_k,
            bottom_k=bottom_k,
            direction=direction,
            chunk_size=chunk_size,
        )
        kinds = _readable_kinds(weights, vjps, residual, incl_mid, forward)
        found = find_sites(self.model)
        _require_residual_side(kinds, found)
        if cache is None:
            needs_all_layers = residual is not None or forward  # the whole residual stream
            cache = self._capture(
                prompt,
                target,
                run,
                weights=kinds,
                layers=None if needs_all_layers else layers,
                positions=positions,
                per_head=residual == "heads",
            )
            positions = None
        else:
            _require_no_run(prompt=prompt, target=target, **run)
            require_same_model(self.model, found, cache)
        selection = Selection(cache, batch_slice, positions)
        wanted = targets_for(self.model, targets, selection.shape, selection.targets)
        reader = _Reader(self.model, selection, wanted, options)
        numbers = layer_numbers(self.model.cfg.n_layers, layers)
        _require_expert(found, kinds, numbers, expert)
        left_out = _left_out(found, kinds, numbers, expert)
        readouts, labels = {}, list[str]()
        for kind in kinds:
            names = _captured_names(found, cache, kind, layers)
            if expert is None:
                entries = entries_of(cache, names, kind, vjps, self.model.cfg.d_model)
            else:
                names = [name for name in names if parse_site_name(name).expert == expert]
                entries = {
                    name: entry_of_expert(cache, name, vjps, self.model.cfg.d_model)
                    for name in names
                }
            vectors = {name: entry.vectors for name, entry in entries.items()}
            norms = [
                selection.rows(rearrange(entry.vjp_norms, "... -> ... 1"))[..., 0].cpu()
                for entry in entries.values()
            ]
            readouts[kind] = replace(reader.read(kind, vectors), vjp_norms=torch.stack(norms))
            labels += entries
        if residual is not None:
            parts = parts_of_residual(cache, residual, incl_mid, numbers)
            readouts[residual] = reader.read(residual, parts)
        if forward:
            readouts["forward"] = reader.read("forward", cache.residual.forward_stream(numbers))
        return BackwardLensResult(
            readouts=readouts,
            str_tokens=selection.whole(selection.str_tokens),
            positions=selection.whole(selection.positions),
            target_ids=wanted.shown,
            target=self._strings(wanted.shown),
            target_names=(
                self._target_names(selection.target_ids, target)
                if targets is None
                else self._target_names(wanted.shown.reshape(-1, 1), targets)
            ),
            target_positions=selection.whole(selection.target_positions),
            loss=selection.loss.cpu(),
            loss_target=self._loss_target(selection),
            loss_target_ids=selection.whole([ids.tolist() for ids in selection.target_ids]),
            d_vocab=int(self.model.cfg.d_vocab),
            normalize=normalize,
            return_type=return_type,
            direction=direction,
            weights_processing=cache.weights_processing,
            left_out=left_out,
            experts={
                name: RoutedTokens(
                    selection.rows(routing.experts, padding=-1).cpu(),
                    selection.rows(routing.weights).cpu(),
                )
                for name, routing in cache.routings.items()
                if any(label.startswith(f"{name}.") for label in labels)
            },
        )

    def read(
        self,
        vectors: Float[Tensor, "entry *lead d_model"],
        labels: Sequence[str] | None = None,
        *,
        targets: TargetTokens | None = None,
        **options: Unpack[ReadoutKeywords],
    ) -> Readout:
        """Read any vectors of width ``d_model``, such as steering vectors or an edit's.

        Args:
            vectors: The vectors; the first axis matches ``labels``.
            labels: Names of the entries. Default: their indices.
            targets: As in :meth:`__call__`; a tensor is aligned with ``[entry, ...]`` from the
                right.
            options: ``lens`` (called with the layer of a label such as ``3_pre``, otherwise None),
                ``apply_ln``, ``normalize``, ``vocab``, ``return_type``, ``top_k``, ``bottom_k``,
                ``direction`` and ``chunk_size``, as in :meth:`__call__`.

        Raises:
            TypeError: If ``vectors`` is not a floating-point tensor.
            ValueError: If ``vectors`` is empty, not finite or of another width; and as
                :meth:`__call__`.
        """
        checked = readout_options(self.model, **options)
        d_model = self.model.cfg.d_model
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            got = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"vectors must be a floating-point tensor, got {got}")
        if vectors.ndim < 2 or vectors.shape[-1] != d_model or not vectors.numel():
            raise ValueError(
                f"vectors must be [entry, ..., {d_model}] with at least one entry, got "
                f"{list(vectors.shape)}"
            )
        labels = [str(i) for i in range(len(vectors))] if labels is None else list(labels)
        if len(labels) != len(vectors):
            raise ValueError(f"labels holds {len(labels)} names for {len(vectors)} entries")
        wanted = targets_for(self.model, targets, vectors.shape[:-1])
        return read_vectors(self.model, "vectors", labels, vectors.detach(), wanted, checked)

    def singular_vectors(
        self,
        cache: BackwardCache,
        weight: str,
        layer: int | None,
        k: int = 1,
        expert: int | None = None,
        **options: Unpack[ReadKeywords],
    ) -> Readout:
        """Read the singular vectors on the residual-stream side of a weight's gradient.

        These are the left ones if the weight reads the residual stream and the right ones if it
        writes to it, largest singular value first. Their sign is arbitrary, so the top and the
        bottom of a readout may be swapped.

        Args:
            cache: From :func:`run_with_backward_cache`.
            weight: The kind of weight.
            layer: Its layer; None for an embedding.
            k: Number of singular vectors.
            expert: Expert, in a mixture of experts.
            options: As in :meth:`read`.

        Raises:
            ValueError: If the gradient has fewer than ``k``; and as :meth:`__call__`.
            KeyError: If the weight was not captured.
        """
        name = self._site_name(cache, weight, layer, expert)
        U, S, Vh = cache[name].svd()
        if not len(S):
            raise ValueError(f"{name} has an empty gradient: no token is routed to it")
        if not is_integer(k) or not 1 <= k <= len(S):
            raise ValueError(f"k must be an integer in [1, {len(S)}], got {k!r}")
        vectors = U.mT[:k] if reads_stream(weight) else Vh[:k]
        return self.read(vectors, [f"{name} singular {i}" for i in range(k)], **options)

    def edit(self, edit: Factored, k: int = 3, **options: Unpack[ReadKeywords]) -> EditReadout:
        """The leading singular directions of an edit at every site, at both ends.

        Args:
            edit: A :class:`WeightEdit`: a fine-tune's difference, an adapter, an optimiser step.
            k: How many directions of each weight; fewer where its rank is lower.
            options: As in :meth:`read`.

        Returns:
            The readout, with a data frame, a figure and a page; :class:`EditReadout` says which end
            goes with which input.

        Raises:
            ValueError: When the edit is empty, not finite or of another model, when one of its
                weights has the residual stream on neither side, and as :meth:`read`.

        Example:
            >>> lens.edit(edit).to_dataframe().query("k == 0")
        """
        directions, norms = directions_of(self.model, find_sites(self.model), edit, k)
        if not directions:
            raise ValueError("edit: it adds exactly zero, so there is nothing to read")
        device = directions[0].vector.device
        readout = self.read(
            torch.stack([one.vector.to(device) for one in directions]),
            [label_of(one) for one in directions],
            **options,
        )
        return edit_readout(directions, norms, readout, options.get("return_type", "log_probs"))

    def neurons(
        self,
        cache: BackwardCache,
        weight: str,
        layer: int | None,
        neurons: int | Sequence[int],
        expert: int | None = None,
        **options: Unpack[ReadKeywords],
    ) -> Readout:
        """Read single neurons of a weight's gradient in the residual stream (Eq 9, 10).

        A neuron is a column of the gradient, ``sum_i x_i delta_i[j]``, if the weight reads the
        residual stream, and a row, ``sum_i x_i[j] delta_i``, if it writes to it.

        Args:
            cache: From :func:`run_with_backward_cache`.
            weight: The kind of weight.
            layer: Its layer; None for an embedding.
            neurons: The index or indices ``j``.
            expert: Expert, in a mixture of experts.
            options: As in :meth:`read`.

        Raises:
            ValueError: If a neuron does not exist; and as :meth:`__call__`.
            KeyError: If the weight was not captured.
        """
        name = self._site_name(cache, weight, layer, expert)
        neurons = list(neurons) if isinstance(neurons, Iterable) else [neurons]
        g = cache[name]
        g = g if reads_stream(weight) else g.T
        wrong = [j for j in neurons if not 0 <= j < g.shape[1]]
        if wrong:
            raise ValueError(f"neurons={wrong}: {weight} has neurons 0 to {g.shape[1] - 1}")
        one_hot = torch.zeros(g.shape[1], len(neurons), device=g.vjps.device)
        one_hot[neurons, range(len(neurons))] = 1
        labels = [f"{name} neuron {j}" for j in neurons]
        return self.read((g @ one_hot).mT, labels, **options)

    def _capture(
        self, prompt: Prompt | None, target: Target | None, run: CaptureOptions, **what: Any
    ) -> BackwardCache:
        """Run the model and return the cache."""
        if prompt is None:
            raise ValueError("pass a prompt and a target, or a cache")
        if isinstance(prompt, BackwardCache):
            raise TypeError("prompt is a BackwardCache; pass it as cache=")
        _, cache = run_with_backward_cache(self.model, prompt, target, **what, **run)
        return cache

    def _site_name(
        self, cache: BackwardCache, weight: str, layer: int | None, expert: int | None
    ) -> str:
        """The name of a single site that reads or writes the residual stream."""
        found = find_sites(self.model)
        require_same_model(self.model, found, cache)
        if weight not in ("W_E", "W_pos") and not is_weight_kind(weight):
            raise ValueError(
                f"weight={weight!r} neither reads the residual stream nor writes to it"
            )
        sites = [site for site in found.select(weight, layer) if site.expert == expert]
        layers = {site.layer for site in sites}
        if len(layers) > 1:
            raise ValueError(f"layer={layer!r}: {weight} is in {len(layers)} layers; pass one")
        if len(sites) != 1:
            raise ValueError(
                f"expert={expert!r}: layer {layer} has {len(sites)} weights {weight} for it; see "
                "weight_sites()"
            )
        return sites[0].name

    def _target_names(
        self, targets: Iterable[Int[Tensor, "_"]], given: Any
    ) -> dict[str, tuple[int, ...]]:
        """Token ids keyed by their decoded strings, and by the strings the user passed."""
        ids = [tuple(of_target.tolist()) for of_target in targets]
        given = [given] * len(ids) if isinstance(given, str) else given
        pairs = zip(given, ids, strict=False) if isinstance(given, Sequence) else ()
        own = {"".join(decode_each(self.model, one)): one for one in sorted(set(ids)) if one}
        return own | {name: one for name, one in pairs if isinstance(name, str)}

    def _loss_target(self, selection: Selection) -> Any:
        if selection.targets is None:
            return None
        each = ["".join(decode_each(self.model, ids.tolist())) for ids in selection.target_ids]
        return selection.whole(each)

    def _strings(self, ids: Int[Tensor, "..."]) -> Any:
        unique = ids.unique().tolist()
        decoded = dict(zip(unique, decode_each(self.model, unique), strict=True))

        def named(ids: Any) -> Any:
            return decoded[ids] if isinstance(ids, int) else [named(inner) for inner in ids]

        return named(ids.tolist())


class _Reader:
    """Reads the selected rows of vectors; vectors that several weights share are read once."""

    def __init__(
        self, model: Model, selection: Selection, targets: Targets, options: ReadoutOptions
    ) -> None:
        self._model, self._selection = model, selection
        self._targets, self._options = targets, options
        self._done: list[tuple[bool, Tensor, Readout]] = []

    def read(self, kind: str, vectors: Mapping[str, Float[Tensor, "*batch n d_model"]]) -> Readout:
        """Read vectors keyed by label, on the device of the first."""
        labels, rows = list(vectors), [self._selection.rows(v) for v in vectors.values()]
        stack = torch.stack([entry.to(rows[0].device) for entry in rows])
        forward = is_forward(kind)
        for same_direction, other, readout in self._done:
            if same_direction == forward and torch.equal(other, stack):
                layers = [layer_of_entry(label) for label in labels]
                return replace(readout, kind=kind, labels=labels, layers=layers)
        readout = read_vectors(self._model, kind, labels, stack, self._targets, self._options)
        self._done.append((forward, stack, readout))
        return readout


def _readable_kinds(
    weights: str | Iterable[str],
    vjps: str,
    residual: str | None,
    incl_mid: bool,
    forward: bool,
) -> list[str]:
    """The requested kinds of weights, after checking that everything requested can be read."""
    if weights is None:
        raise TypeError("weights must name kinds such as ('W_in', 'W_out'), or be () for none")
    kinds = [weights] if isinstance(weights, str) else list(weights)
    for kind in kinds:
        if kind in ("W_E", "W_pos", "W_U"):
            raise ValueError(
                f"weights={kind!r} is not inside a block; the lens reads "
                f"{', '.join(READ_BY_INPUT + READ_BY_VJP)}"
            )
    if vjps not in ("residual", "output"):
        raise ValueError(f"vjps must be 'residual' or 'output', got {vjps!r}")
    if residual not in (None, "accumulated", "decomposed", "heads"):
        raise ValueError(
            f"residual must be 'accumulated', 'decomposed' or 'heads', got {residual!r}"
        )
    if incl_mid and residual != "accumulated":
        raise ValueError(
            "incl_mid=True needs residual='accumulated'; the cache does not keep the middle of the "
            "forward stream"
        )
    if not kinds and residual is None and not forward:
        raise ValueError("nothing to read: weights is empty and residual is None")
    return kinds


def _require_residual_side(kinds: Sequence[str], found: FoundSites) -> None:
    """Refuse the kinds of the model that neither read the residual stream nor write to it."""
    every = dict.fromkeys(site.kind for site in found.sites)
    for kind in kinds:
        if kind in every and not is_weight_kind(kind):
            raise ValueError(
                f"weights={kind!r} neither reads nor writes the residual stream; in this model the "
                f"lens reads {', '.join(one for one in every if is_weight_kind(one))}"
            )


def _require_no_run(**given: Any) -> None:
    """Raise if arguments of a run are given together with a cache."""
    unusable = [name for name, value in given.items() if value is not None and value != ()]
    if unusable:
        raise ValueError(
            "pass either a prompt or a cache; a cache needs no run, so leave out "
            f"{', '.join(unusable)}"
        )


def _captured_names(
    found: FoundSites, cache: BackwardCache, kind: str, layers: int | Iterable[int] | None
) -> list[str]:
    """The sites of one kind in the requested layers; by default all in the cache."""
    wanted = [site.name for site in found.select(kind, layers)]
    names = [name for name in wanted if name in cache]
    if not names or (layers is not None and names != wanted):
        missing = next(name for name in wanted if name not in cache)
        raise ValueError(f"weights={kind!r}, layers={layers!r}: {missing} is not in the cache")
    return names


def _require_expert(
    found: FoundSites, kinds: Sequence[str], layers: Collection[int] | None, expert: int | None
) -> None:
    """Raise if the expert does not exist."""
    if expert is None:
        return
    for kind in kinds:
        experts = {site.expert for site in found.select(kind, layers) if site.expert is not None}
        if not is_integer(expert) or expert not in experts:
            has = f"experts {as_ranges(experts)}" if experts else "no experts"
            raise ValueError(f"expert={expert!r}: {kind} has {has} in these layers")


def _left_out(
    found: FoundSites,
    kinds: Sequence[str],
    layers: Collection[int] | None,
    expert: int | None,
) -> dict[str, list[int]]:
    """Warn about requested layers without a site, and return them by kind."""
    if expert is not None:
        return {}
    asked_for = range(found.n_layers) if layers is None else layers
    left_out = {
        kind: sorted({*asked_for} - {site.layer for site in found.select(kind)}) for kind in kinds
    }
    left_out = {kind: missing for kind, missing in left_out.items() if missing}
    if left_out:
        which = "; ".join(
            f"{kind} in layer{'s' * (len(missing) > 1)} {as_ranges(missing)}"
            for kind, missing in left_out.items()
        )
        warn_user(
            f"weights: skipped for lack of a site: {which}; tl_backward.coverage(model) says why"
        )
    return left_out
