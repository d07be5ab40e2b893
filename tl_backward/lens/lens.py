"""The logit lens of the backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_backward._integers import as_ranges, is_integer
from tl_backward._precision import stable_norm
from tl_backward._user_warnings import warn_user
from tl_backward.cache import BackwardCache
from tl_backward.cache.residual import SliceInput
from tl_backward.cache.rows import Positions
from tl_backward.capture import CaptureOptions, run_with_backward_cache
from tl_backward.capture.tokens import Prompt, Target, decode_each
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
    residual_side,
)
from tl_backward.lens._targets import Targets, TargetTokens, targets_for
from tl_backward.lens._vocabulary import ReturnType
from tl_backward.lens.readout import Readout, is_forward, is_weight_kind
from tl_backward.lens.result import BackwardLensResult
from tl_backward.sites import FoundSites, Model, find_sites, layer_numbers, require_model
from tl_backward.sites.kinds import READ_BY_INPUT, READ_BY_VJP, reads_stream
from tl_backward.translators import Translator


class BackwardLogitLens:
    """Reads gradients and what they are made of in the model's own vocabulary.

    Calling it reads weights, and the VJPs of the residual stream; the methods read other vectors
    in the same way.

    Args:
        model: A TransformerLens model in eval mode.

    Raises:
        TypeError: When it is no TransformerLens model.

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
        """Run the model forward and backward once and read what arrives at its weights.

        The arguments are those of TransformerLens's forward lens (``logit_lens``) where they mean
        the same.

        Args:
            prompt: Text or token ids, of one prompt or of several.
            target: What is differentiated towards, as in :func:`run_with_backward_cache`.
            cache: What such a run has left, instead of a prompt.
            weights: Kinds of weights to read.
            residual: Read VJPs of the residual stream, too: ``"accumulated"``, ``"decomposed"`` or
                what every head adds, ``"heads"``; ``result["accumulated"]`` and so on.
            incl_mid: Whether the accumulated ones include the middle of blocks. The forward stream
                is kept without it.
            forward: Read the residual stream of the forward pass of the same run, too: the logit
                lens beside its mirror image, in ``result["forward"]``.
            layers: Layers to read; negative ones count from the last. Of the residual stream these
                are the entries such as ``3_pre``, ``3_attn_out`` or ``L3H0``, and those of no layer
                (``final_post``, ``unembed``) stay; the whole backward pass is run for it. Default:
                all, of a cache all that it has.
            positions: Positions to read: an index, a slice or a list (a tuple is a slice), or
                TransformerLens's ``Slice``. Of a cache, of the positions that it has. Default: all.
            batch_slice: Prompts of a batch to read, in the same way; an index drops the axis.
            vjps: Which VJPs to read where a post-norm follows the weight (Gemma 2 and 3, OLMo 2,
                GLM-4 ...): those behind the norm, at the residual stream, or those at the
                weight's own output. Elsewhere the two are the same.
            lens: A translator ``f(vectors, layer) -> vectors`` of the ``[(batch), pos, d_model]``
                vectors of one layer, applied before the norm; :mod:`tl_backward.translators` has
                some. ``layer`` is that of the weight, or the number in a label such as ``3_pre``,
                and None for others.
            apply_ln: Whether to apply the model's final norm.
            normalize: Scale every vector to unit length first (the normalised logit lens, App H).
            vocab: Tokens whose values to keep, in ``vocab_values``, instead of the ends: strings or
                ids.
            targets: Tokens whose ranks and values to keep: one, several for every row, or in a
                tensor one for each row, aligned with the ``[batch, pos]`` that are read from the
                right. Default: the target's. Of a target of several tokens, a position that
                predicts one of them has that token, and any other position the first.
            return_type: What values are: log-probabilities, logits or probabilities.
            top_k: How many of the most probable tokens to keep. Default: 10, or none with
                ``vocab``.
            bottom_k: How many of the least probable ones. Default: as many.
            direction: ``"descent"`` has at the top what a descent step moves towards: for VJPs the
                other end of the same readout. Inputs ``x_i`` are read as they are.
            chunk_size: Rows that are unembedded at once.
            run: ``loss_fn`` instead of a target, ``prepend_bos``, ``padding_side``, ``fwd_hooks``
                and ``bwd_hooks``, as in :func:`run_with_backward_cache`.

        Raises:
            ValueError: When an argument is out of range, when ``vocab`` and ``top_k`` are both
                given, or both a cache and what a run needs, when the cache is of another model or
                lacks what is asked for, and as :func:`run_with_backward_cache` does.
            TypeError: When prompt, cache, weights, lens or tokens are something else.
            NotImplementedError: For blocks that run several times in one forward pass.

        Warns:
            UserWarning: When layers have no site of a weight, as where experts replace the MLP;
                ``result.left_out`` has them. And as :func:`run_with_backward_cache` does.
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
        if cache is None:
            below = residual is not None or forward  # the stream before the first layer
            cache = self._capture(
                prompt,
                target,
                run,
                weights=kinds,
                layers=None if below else layers,
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
        left_out = _left_out(found, kinds, numbers)
        readouts = {}
        for kind in kinds:
            names = _captured_names(found, cache, kind, layers)
            vectors = {name: residual_side(cache, name, vjps) for name in names}
            norms = [stable_norm(selection.rows(cache[name].vjps), dim=-1).cpu() for name in names]
            readouts[kind] = replace(reader.read(kind, vectors), vjp_norms=torch.stack(norms))
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
            vectors: What to read; the first axis is that of ``labels``.
            labels: What the entries are. Default: their numbers.
            targets: As in :meth:`__call__`; a tensor is aligned with ``[entry, ...]`` from the
                right.
            options: ``lens`` (which gets the layer of a label such as ``3_pre``, and None for
                others), ``apply_ln``, ``normalize``, ``vocab``, ``return_type``, ``top_k``,
                ``bottom_k``, ``direction`` and ``chunk_size``, as in :meth:`__call__`.

        Raises:
            TypeError: When the vectors are no floating-point tensor.
            ValueError: When the vectors have another width, are none or not finite, and as
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
            raise ValueError(f"{len(labels)} labels are given for {len(vectors)} entries")
        wanted = targets_for(self.model, targets, vectors.shape[:-1])
        return read_vectors(self.model, "vectors", labels, vectors.detach(), wanted, checked)

    def singular_vectors(
        self,
        cache: BackwardCache,
        weight: str,
        layer: int | None,
        k: int = 1,
        **options: Unpack[ReadKeywords],
    ) -> Readout:
        """The singular vectors on the residual side of a weight's gradient.

        Left ones of what reads the residual stream, right ones of what writes to it, the largest
        singular value first. A singular vector has no sign of its own: the top and the bottom of
        its readout may change places.

        Args:
            cache: From :func:`run_with_backward_cache`.
            weight: The kind of weight.
            layer: Its layer; None for an embedding.
            k: How many.
            options: As in :meth:`read`.

        Raises:
            ValueError: When there are fewer, and as :meth:`__call__`.
            KeyError: When the weight was not captured.
        """
        name = self._site_name(cache, weight, layer)
        U, S, Vh = cache[name].svd()
        if not is_integer(k) or not 1 <= k <= len(S):
            raise ValueError(f"k must be an integer in [1, {len(S)}], got {k!r}")
        vectors = U.mT[:k] if reads_stream(weight) else Vh[:k]
        return self.read(vectors, [f"{name} singular {i}" for i in range(k)], **options)

    def neurons(
        self,
        cache: BackwardCache,
        weight: str,
        layer: int | None,
        neurons: int | Sequence[int],
        **options: Unpack[ReadKeywords],
    ) -> Readout:
        """Single neurons of a weight's gradient, each a vector of the residual side (Eq 9, 10).

        Columns of the gradient of what reads the residual stream, ``sum_i x_i delta_i[j]``, and
        rows of what writes to it, ``sum_i x_i[j] delta_i``.

        Args:
            cache: From :func:`run_with_backward_cache`.
            weight: The kind of weight.
            layer: Its layer; None for an embedding.
            neurons: The index or indices ``j``.
            options: As in :meth:`read`.

        Raises:
            ValueError: When a neuron does not exist, and as :meth:`__call__`.
            KeyError: When the weight was not captured.
        """
        name = self._site_name(cache, weight, layer)
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
        """The cache of a run of its own."""
        if prompt is None:
            raise ValueError("pass a prompt and a target, or a cache")
        if isinstance(prompt, BackwardCache):
            raise TypeError("prompt is a BackwardCache; pass it as cache=")
        _, cache = run_with_backward_cache(self.model, prompt, target, **what, **run)
        return cache

    def _site_name(self, cache: BackwardCache, weight: str, layer: int | None) -> str:
        """The one weight whose gradient has vectors of the residual stream on one side."""
        found = find_sites(self.model)
        require_same_model(self.model, found, cache)
        if weight not in ("W_E", "W_pos") and not is_weight_kind(weight):
            raise ValueError(
                f"weight={weight!r} neither reads the residual stream nor writes to it"
            )
        sites = found.select(weight, layer)
        if len(sites) > 1:
            raise ValueError(f"layer={layer!r}: {weight} is in {len(sites)} layers; pass one")
        return sites[0].name

    def _target_names(
        self, targets: Iterable[Int[Tensor, "_"]], given: Any
    ) -> dict[str, tuple[int, ...]]:
        """Token ids by the strings that they were given as, if they were, and by their own."""
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
    """Reads the selected rows of vectors; those that several weights share are read once."""

    def __init__(
        self, model: Model, selection: Selection, targets: Targets, options: ReadoutOptions
    ) -> None:
        self._model, self._selection = model, selection
        self._targets, self._options = targets, options
        self._done: list[tuple[bool, Tensor, Readout]] = []

    def read(self, kind: str, vectors: Mapping[str, Float[Tensor, "*batch n d_model"]]) -> Readout:
        """The readout of the vectors under some labels, on the device of the first."""
        labels, each = list(vectors), [self._selection.rows(of) for of in vectors.values()]
        stack = torch.stack([of.to(each[0].device) for of in each])
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
    """The kinds of weights that are asked for, if they and the rest can be read."""
    if weights is None:
        raise TypeError("weights must be kinds such as ('W_in', 'W_out'), or () for none")
    kinds = [weights] if isinstance(weights, str) else list(weights)
    for kind in kinds:
        if kind in ("W_E", "W_pos", "W_U"):
            raise ValueError(
                f"weights={kind!r} is not between two residual streams; the lens reads "
                f"{', '.join(READ_BY_INPUT + READ_BY_VJP)}"
            )
        if "." in kind and not is_weight_kind(kind):
            raise ValueError(
                f"weights={kind!r} has the residual stream on neither side; of LoRA adapters the "
                f"lens reads lora_A of {', '.join(READ_BY_INPUT)} and lora_B of "
                f"{' and '.join(READ_BY_VJP)}"
            )
    if vjps not in ("residual", "output"):
        raise ValueError(f"vjps must be 'residual' or 'output', got {vjps!r}")
    if residual not in (None, "accumulated", "decomposed", "heads"):
        raise ValueError(
            f"residual must be 'accumulated', 'decomposed' or 'heads', got {residual!r}"
        )
    if incl_mid and residual != "accumulated":
        raise ValueError(
            "incl_mid=True is for residual='accumulated'; the middle of the forward stream is "
            "not kept"
        )
    if not kinds and residual is None and not forward:
        raise ValueError("weights is empty and residual None: there is nothing to read")
    return kinds


def _require_no_run(**given: Any) -> None:
    """Raise when a cache is read and something is given that only a run can use."""
    useless = [name for name, value in given.items() if value is not None and value != ()]
    if useless:
        raise ValueError(
            "pass either a prompt or a cache; the run of a cache is over, so leave out "
            f"{', '.join(useless)}"
        )


def _captured_names(
    found: FoundSites, cache: BackwardCache, kind: str, layers: int | Iterable[int] | None
) -> list[str]:
    """The sites of one kind in the layers that are asked for; by default those in the cache."""
    wanted = [site.name for site in found.select(kind, layers)]
    names = [name for name in wanted if name in cache]
    if not names or (layers is not None and names != wanted):
        missing = next(name for name in wanted if name not in cache)
        raise ValueError(f"weights={kind!r}, layers={layers!r}: {missing} is not in the cache")
    return names


def _left_out(
    found: FoundSites, kinds: Sequence[str], layers: Collection[int] | None
) -> dict[str, list[int]]:
    """By kind, the layers that were asked for and have no site of it, with a warning."""
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
            f"weights: not read, as there is no site: {which}; tl_backward.coverage(model) says why"
        )
    return left_out
