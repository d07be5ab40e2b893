"""The logit lens of the backward pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_backward.cache import BackwardCache
from tl_backward.capture import Hooks, run_with_backward_cache
from tl_backward.integers import is_integer
from tl_backward.lens_result import (
    READ_BY_INPUT,
    READ_BY_VJP,
    READ_FORWARD,
    VALUE_COLUMNS,
    BackwardLensResult,
    Readout,
)
from tl_backward.objectives import Loss
from tl_backward.readout import ReturnType, read_vocabulary
from tl_backward.residual import SliceInput
from tl_backward.rows import Positions, kept_positions, plain_index, selected
from tl_backward.sites import (
    Model,
    layer_numbers,
    require_model,
    unembed,
    weight_sites,
    weights_processing,
)
from tl_backward.tokens import Prompt, Target, decode_each, each_token_id
from tl_backward.translators import Translator

TOP_K = 10


@dataclass(frozen=True)
class _Options:
    """How vectors are read, after all checks."""

    apply_ln: bool
    normalize: bool
    lens: Translator | None
    vocab: Int[Tensor, "v"]
    return_type: ReturnType
    top_k: int
    bottom_k: int
    direction: Literal["gradient", "descent"]
    chunk_size: int


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
        >>> result["W_out"].bottom_tokens()[20][-1][0]   # layer 20, last token
        ' Paris'
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
        loss_fn: Loss | None = None,
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
        vocab: str | int | Sequence[str | int] | Int[Tensor, "v"] | None = None,
        targets: str | int | Sequence[Any] | Int[Tensor, "..."] | None = None,
        return_type: ReturnType = "log_probs",
        top_k: int | None = None,
        bottom_k: int | None = None,
        direction: Literal["gradient", "descent"] = "gradient",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        chunk_size: int = 64,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
    ) -> BackwardLensResult:
        """Run the model forward and backward once and read what arrives at its weights.

        The arguments are those of TransformerLens's forward lens (``logit_lens``) where they mean
        the same.

        Args:
            prompt: Text or token ids, of one prompt or of several.
            target: What is differentiated towards, as in :func:`run_with_backward_cache`.
            cache: What such a run has left, instead of a prompt.
            loss_fn: Instead of a target, as in :func:`run_with_backward_cache`.
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
                right. Default: the (first) token of the target.
            return_type: What values are: log-probabilities, logits or probabilities.
            top_k: How many of the most probable tokens to keep. Default: 10, or none with
                ``vocab``.
            bottom_k: How many of the least probable ones. Default: as many.
            direction: ``"descent"`` has at the top what a descent step moves towards: for VJPs the
                other end of the same readout. Inputs ``x_i`` are read as they are.
            prepend_bos: As in ``model.to_tokens``. Default: the model's own setting.
            padding_side: As in :func:`run_with_backward_cache`.
            chunk_size: Rows that are unembedded at once.
            fwd_hooks: As in :func:`run_with_backward_cache`.
            bwd_hooks: The same.

        Raises:
            ValueError: When an argument is out of range, when ``vocab`` and ``top_k`` are both
                given, or both a cache and what a run needs, when the cache is of another model or
                lacks what is asked for, and as :func:`run_with_backward_cache` does.
            TypeError: When prompt, cache, weights, lens or tokens are something else.
            NotImplementedError: For blocks that run several times in one forward pass.
        """
        options = self._options(
            apply_ln, normalize, lens, vocab, return_type, top_k, bottom_k, direction, chunk_size
        )
        if weights is None:
            raise TypeError("weights must be kinds such as ('W_in', 'W_out'), or () for none")
        weights = [weights] if isinstance(weights, str) else list(weights)
        for kind in ("W_E", "W_pos", "W_U"):
            if kind in weights:
                raise ValueError(
                    f"weights={kind!r} is not between two residual streams; the lens reads "
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
                "incl_mid=True is for residual='accumulated'; the middle of the forward stream is "
                "not kept"
            )
        if not weights and residual is None and not forward:
            raise ValueError("weights is empty and residual None: there is nothing to read")
        if isinstance(prompt, BackwardCache):
            raise TypeError("prompt is a BackwardCache; pass it as cache=")
        numbers = layer_numbers(self.model.cfg.n_layers, layers)
        cut: Positions = positions
        if cache is None:
            if prompt is None:
                raise ValueError("pass a prompt and a target, or a cache")
            below = residual is not None or forward  # the stream before the first layer
            _, cache = run_with_backward_cache(
                self.model,
                prompt,
                target,
                loss_fn=loss_fn,
                weights=weights or "W_out",
                layers=None if below else layers,
                positions=positions,
                per_head=residual == "heads",
                prepend_bos=prepend_bos,
                padding_side=padding_side,
                fwd_hooks=fwd_hooks,
                bwd_hooks=bwd_hooks,
            )
            cut = None
        else:
            of_a_run = {
                "prompt": prompt,
                "target": target,
                "loss_fn": loss_fn,
                "prepend_bos": prepend_bos,
                "padding_side": padding_side,
                "fwd_hooks": fwd_hooks or None,
                "bwd_hooks": bwd_hooks or None,
            }
            useless = [name for name, value in of_a_run.items() if value is not None]
            if useless:
                raise ValueError(
                    "pass either a prompt or a cache; the run of a cache is over, so leave out "
                    f"{', '.join(useless)}"
                )
            self._require_same_model(cache)
        texts = _Texts(cache, batch_slice, cut)
        wanted = self._targets(targets, texts.shape, texts.first_targets)
        done: list[tuple[bool, Tensor, Readout]] = []

        def read(kind: str, labels: list[str], vectors: list[Tensor]) -> Readout:
            """Vectors that several weights share are read once."""
            stack = torch.stack([texts.rows(v).to(vectors[0].device) for v in vectors])
            forward = kind in READ_FORWARD
            same = (
                readout
                for same_direction, other, readout in done
                if same_direction == forward and torch.equal(other, stack)
            )
            readout = next(same, None)
            if readout is None:
                readout = self._read(kind, labels, stack, wanted, options)
                done.append((forward, stack, readout))
            layers = [_layer_of(label) for label in labels]
            return replace(readout, kind=kind, labels=labels, layers=layers)

        readouts = {}
        for kind in weights:
            names = self._names(cache, kind, layers)
            readout = read(kind, names, [_residual_side(cache, name, vjps) for name in names])
            norms = [texts.rows(cache[name].vjps).norm(dim=-1).cpu() for name in names]
            readouts[kind] = replace(readout, vjp_norms=torch.stack(norms))
        if residual is not None:
            parts = _parts_of_residual(cache, residual, incl_mid, numbers)
            readouts[residual] = read(residual, [*parts], [*parts.values()])
        if forward:
            parts = cache.residual.forward_stream(numbers)
            readouts["forward"] = read("forward", [*parts], [*parts.values()])
        return BackwardLensResult(
            readouts=readouts,
            str_tokens=texts.whole(texts.str_tokens),
            positions=texts.whole(texts.positions),
            target_ids=wanted.shown,
            target=self._strings(wanted.shown),
            target_names=(
                self._target_names(texts.target_ids[:, :1], target)
                if targets is None
                else self._target_names(wanted.shown, targets)
            ),
            loss=texts.loss.cpu(),
            loss_target=self._loss_target(texts),
            d_vocab=int(self.model.cfg.d_vocab),
            normalize=normalize,
            return_type=return_type,
            direction=direction,
            weights_processing=cache.weights_processing,
        )

    def read(
        self,
        vectors: Float[Tensor, "entry *lead d_model"],
        labels: Sequence[str] | None = None,
        *,
        targets: str | int | Sequence[Any] | Int[Tensor, "..."] | None = None,
        lens: Translator | None = None,
        apply_ln: bool = True,
        normalize: bool = False,
        vocab: str | int | Sequence[str | int] | Int[Tensor, "v"] | None = None,
        return_type: ReturnType = "log_probs",
        top_k: int | None = None,
        bottom_k: int | None = None,
        direction: Literal["gradient", "descent"] = "gradient",
        chunk_size: int = 64,
    ) -> Readout:
        """Read any vectors of width ``d_model``, such as steering vectors or an edit's.

        Args:
            vectors: What to read; the first axis is that of ``labels``.
            labels: What the entries are. Default: their numbers.
            targets: Tokens whose ranks and values to keep: one, several for every row, or in a
                tensor one for each row, aligned with ``[entry, ...]`` from the right.
            lens: A translator, as in :meth:`__call__`; it gets the layer of a label such as
                ``3_pre``, and None for others.
            apply_ln: As in :meth:`__call__`.
            normalize: The same.
            vocab: The same.
            return_type: The same.
            top_k: The same.
            bottom_k: The same.
            direction: The same.
            chunk_size: The same.

        Raises:
            TypeError: When the vectors are no floating-point tensor.
            ValueError: When the vectors have another width, are none or not finite, and as
                :meth:`__call__`.
        """
        options = self._options(
            apply_ln, normalize, lens, vocab, return_type, top_k, bottom_k, direction, chunk_size
        )
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
        wanted = self._targets(targets, vectors.shape[:-1])
        return self._read("vectors", labels, vectors.detach(), wanted, options)

    def singular_vectors(
        self, cache: BackwardCache, weight: str, layer: int | None, k: int = 1, **options: Any
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
        vectors = U.mT[:k] if weight in READ_BY_INPUT else Vh[:k]
        return self.read(vectors, [f"{name} singular {i}" for i in range(k)], **options)

    def neurons(
        self,
        cache: BackwardCache,
        weight: str,
        layer: int | None,
        neurons: int | Sequence[int],
        **options: Any,
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
        g = g if weight in READ_BY_INPUT else g.T
        wrong = [j for j in neurons if not 0 <= j < g.shape[1]]
        if wrong:
            raise ValueError(f"neurons={wrong}: {weight} has neurons 0 to {g.shape[1] - 1}")
        one_hot = torch.zeros(g.shape[1], len(neurons), device=g.vjps.device)
        one_hot[neurons, range(len(neurons))] = 1
        labels = [f"{name} neuron {j}" for j in neurons]
        return self.read((g @ one_hot).mT, labels, **options)

    def _site_name(self, cache: BackwardCache, weight: str, layer: int | None) -> str:
        """The one weight whose gradient has vectors of the residual stream on one side."""
        self._require_same_model(cache)
        if weight == "W_U":
            raise ValueError("weight='W_U' neither reads the residual stream nor writes to it")
        sites = weight_sites(self.model, weight, layer)
        if len(sites) > 1:
            raise ValueError(f"layer={layer!r}: {weight} is in {len(sites)} layers; pass one")
        return sites[0].name

    def _options(
        self,
        apply_ln: bool,
        normalize: bool,
        lens: Translator | None,
        vocab: str | int | Sequence[str | int] | Int[Tensor, "v"] | None,
        return_type: ReturnType,
        top_k: int | None,
        bottom_k: int | None,
        direction: Literal["gradient", "descent"],
        chunk_size: int,
    ) -> _Options:
        d_vocab = int(self.model.cfg.d_vocab)
        if vocab is not None and (top_k is not None or bottom_k is not None):
            raise ValueError("pass vocab, or top_k and bottom_k, not both")
        ids = each_token_id(self.model, "vocab", [] if vocab is None else vocab)
        if ids.ndim > 1 or (vocab is not None and not ids.numel()):
            raise ValueError(f"vocab must be one or several tokens in one axis, got {vocab!r}")
        ids = ids.reshape(-1)
        top = (TOP_K if vocab is None else 0) if top_k is None else top_k
        bottom = top if bottom_k is None else bottom_k
        for name, k, least in (("top_k", top, int(top_k is not None)), ("bottom_k", bottom, 0)):
            if not is_integer(k) or not least <= k <= d_vocab:
                raise ValueError(
                    f"{name} must be an integer in [{least}, {d_vocab}], the vocabulary, got {k!r}"
                )
        if not is_integer(chunk_size) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
        if lens is not None and not callable(lens):
            raise TypeError(
                f"lens must be a function f(vectors, layer) -> vectors, got {lens!r}; for a "
                "JacobianLens pass tl_backward.translators.through_jacobian_lens(it)"
            )
        if return_type not in VALUE_COLUMNS:
            raise ValueError(
                f"return_type must be 'logits', 'log_probs' or 'probs', got {return_type!r}"
            )
        if direction not in ("gradient", "descent"):
            raise ValueError(f"direction must be 'gradient' or 'descent', got {direction!r}")
        return _Options(
            apply_ln, normalize, lens, ids, return_type, top, bottom, direction, chunk_size
        )

    def _require_same_model(self, cache: BackwardCache) -> None:
        if not isinstance(cache, BackwardCache):
            raise TypeError(
                "cache must be a BackwardCache, as run_with_backward_cache returns it, got "
                f"{type(cache).__name__}"
            )
        cfg, layers = self.model.cfg, cache.residual.n_layers
        tokens = cache.tokens if isinstance(cache.tokens, list) else [cache.tokens]
        last = int(torch.cat([*tokens, cache.target_ids.flatten()]).max())
        sites = {site.name: site for site in weight_sites(self.model)}
        differences = [
            f"its {name} is {g.shape}"
            for name, g in cache.items()
            if name not in sites or g.shape != (sites[name].d_in, sites[name].d_out)
        ]
        differences += [f"it has {layers} layers"] * (layers != cfg.n_layers)
        differences += [f"it holds the token id {last}"] * (last >= cfg.d_vocab)
        if differences:
            raise ValueError(f"cache is of another model: {differences[0]}, which this one has not")
        processing = weights_processing(self.model)
        if cache.weights_processing != processing:
            raise ValueError(
                f"cache is of other weights: they were {cache.weights_processing}, and those of "
                f"the model are {processing}; capture it again"
            )

    def _names(
        self, cache: BackwardCache, kind: str, layers: int | Iterable[int] | None
    ) -> list[str]:
        """The sites of one kind in the layers that are asked for; by default those in the cache."""
        wanted = [site.name for site in weight_sites(self.model, kind, layers)]
        names = [name for name in wanted if name in cache]
        if not names or (layers is not None and names != wanted):
            missing = next(name for name in wanted if name not in cache)
            raise ValueError(f"weights={kind!r}, layers={layers!r}: {missing} is not in the cache")
        return names

    def _targets(
        self, targets: Any, rows: Sequence[int], of_prompts: Int[Tensor, "*batch"] | None = None
    ) -> _Targets:
        """Those that are asked for, or else those of the prompts, for rows ``[*batch, pos]``."""
        if targets is None and of_prompts is not None:
            return _Targets(of_prompts, of_prompts[..., None, None], several=False)
        ids = each_token_id(self.model, "targets", [] if targets is None else targets)
        if isinstance(targets, Tensor) and targets.ndim:
            of_rows = _for_rows(ids, rows)
            return _Targets(of_rows, of_rows.unsqueeze(-1), several=False)
        return _Targets(ids, ids.reshape(-1), several=ids.ndim == 1)

    def _target_names(self, ids: Int[Tensor, "..."], given: Any) -> dict[str, int]:
        """Token ids by the strings that they were given as, if they were, and by their own."""
        flat = ids.flatten().tolist()
        unique = sorted(set(flat))
        given = [given] * len(flat) if isinstance(given, str) else given
        pairs = zip(given, flat, strict=False) if isinstance(given, Sequence) else ()
        own = dict(zip(decode_each(self.model, unique), unique, strict=True))
        return own | {name: token for name, token in pairs if isinstance(name, str)}

    def _loss_target(self, texts: _Texts) -> Any:
        if texts.first_targets is None:
            return None
        targets = [ids[ids >= 0].tolist() for ids in texts.target_ids[texts.chosen]]
        return texts.whole(["".join(decode_each(self.model, ids)) for ids in targets])

    def _strings(self, ids: Int[Tensor, "..."]) -> Any:
        unique = ids.unique().tolist()
        decoded = dict(zip(unique, decode_each(self.model, unique), strict=True))

        def named(ids: Any) -> Any:
            return decoded[ids] if isinstance(ids, int) else [named(inner) for inner in ids]

        return named(ids.tolist())

    def _read(
        self,
        kind: str,
        labels: list[str],
        vectors: Float[Tensor, "entry *lead d_model"],
        targets: _Targets,
        options: _Options,
    ) -> Readout:
        layers = [_layer_of(label) for label in labels]
        norms = vectors.norm(dim=-1)
        zero_mask = norms == 0
        if options.lens is not None:
            each = zip(vectors, layers, strict=True)
            vectors = torch.stack([_translated(options.lens, of, layer) for of, layer in each])
        ids = targets.per_row.expand(*vectors.shape[:-1], -1)
        rows = vectors[~zero_mask]
        if options.normalize:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        if not rows.isfinite().all():
            by_lens = "" if options.lens is None else " that lens returned"
            raise ValueError(f"{kind}: the vectors{by_lens} are not finite")
        turned = options.direction == "descent" and kind not in READ_FORWARD
        ends = (options.top_k, options.bottom_k)
        top_k, bottom_k = ends[::-1] if turned else ends
        read = read_vocabulary(
            rows,
            partial(unembed, self.model, apply_ln=options.apply_ln),
            ids[~zero_mask.cpu()],
            top_k=top_k,
            bottom_k=bottom_k,
            vocab=options.vocab,
            return_type=options.return_type,
            chunk_size=options.chunk_size,
        )
        if turned:
            read = read.reversed(int(self.model.cfg.d_vocab))

        def scatter(values: Tensor) -> Tensor:
            empty = torch.nan if values.is_floating_point() else -1
            whole = values.new_full((*zero_mask.shape, *values.shape[1:]), empty)
            whole[zero_mask.logical_not().to(values.device)] = values
            return whole.cpu()

        def of_targets(values: Tensor) -> Tensor:
            return scatter(values) if targets.several else scatter(values.squeeze(-1))

        every = (read.top_ids.cpu(), read.bottom_ids.cpu(), options.vocab, targets.per_row)
        kept = torch.cat([x.flatten() for x in every]).unique().tolist()
        return Readout(
            kind=kind,
            labels=labels,
            layers=layers,
            top_ids=scatter(read.top_ids),
            top_values=scatter(read.top_values),
            bottom_ids=scatter(read.bottom_ids),
            bottom_values=scatter(read.bottom_values),
            target_ranks=of_targets(read.target_ranks),
            target_values=of_targets(read.target_values),
            vocab_ids=scatter(options.vocab.expand(len(rows), -1)),
            vocab_values=scatter(read.vocab_values),
            entropy=scatter(read.entropy),
            norms=norms.cpu(),
            vjp_norms=norms.cpu(),
            zero_mask=zero_mask.cpu(),
            vocabulary=dict(zip(kept, decode_each(self.model, kept), strict=True)),
        )


@dataclass(frozen=True)
class _Targets:
    """Whose ranks are wanted: as the result shows them, and for every row.

    Several are for all rows; otherwise there is one for all, for each prompt or for each row.
    """

    shown: Int[Tensor, "..."]
    per_row: Int[Tensor, "... t"]
    several: bool


class _Texts:
    """The prompts and positions of a cache that are read."""

    def __init__(self, cache: BackwardCache, batch_slice: SliceInput, positions: Positions) -> None:
        batched = isinstance(cache.tokens, list)
        if batch_slice is not None and not batched:
            raise ValueError("batch_slice selects from several prompts, but there is only one")
        every = cache.positions if isinstance(cache.positions, list) else [cache.positions]
        self._lengths = [len(of_text) for of_text in every]
        has = "this batch has prompts"
        self.chosen = selected(batch_slice, len(every), "batch_slice", has).tolist()
        self._kept = [
            kept_positions(positions, self._lengths[b], b if batched else None) for b in self.chosen
        ]
        self._single = not batched or isinstance(plain_index(batch_slice), int)
        self.positions = [every[b][kept] for b, kept in zip(self.chosen, self._kept, strict=True)]
        self.str_tokens = [
            cache.str_tokens[b] if batched else cache.str_tokens for b in self.chosen
        ]
        n_rows = max(map(len, self._kept))
        self.shape = [n_rows] if self._single else [len(self._kept), n_rows]
        self.loss = self.whole(cache.loss.reshape(-1)[self.chosen])
        self.target_ids = cache.target_ids.reshape(len(every), -1)
        has_targets = self.target_ids.shape[1] > 0
        self.first_targets = self.whole(self.target_ids[self.chosen, 0]) if has_targets else None

    def whole(self, each: Any) -> Any:
        """What there is for each prompt, or that of the only one."""
        return each[0] if self._single else each

    def rows(self, tensor: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*chosen pos d"]:
        """The rows that are read, filled up with zeros behind the end of shorter texts."""
        if tensor.ndim == 3:
            texts: Sequence[Tensor] = tensor.unbind(0)
        elif len(tensor) == sum(self._lengths):
            texts = tensor.split(self._lengths)
        else:
            raise NotImplementedError(
                "the lens reads weights that are used once in a forward pass, and the blocks of "
                "this model run several times"
            )
        chosen = [texts[b][kept] for b, kept in zip(self.chosen, self._kept, strict=True)]
        return chosen[0] if self._single else pad_sequence(chosen, batch_first=True)


def _for_rows(targets: Int[Tensor, "..."], rows: Sequence[int]) -> Int[Tensor, "..."]:
    """Targets that are aligned with rows from the right, one for every row."""
    if targets.ndim == len(rows) + 1 and len(targets) == 1:
        targets = targets[0]
    try:
        return targets.expand(*rows)
    except RuntimeError as error:
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not fit to the rows, {list(rows)}; they "
            "are aligned from the right, and one for each prompt is [batch, 1]"
        ) from error


def _residual_side(
    cache: BackwardCache, name: str, vjps: Literal["residual", "output"]
) -> Float[Tensor, "*batch n d_model"]:
    """What a weight is read by."""
    if name.rpartition(".")[2] in READ_BY_INPUT:
        return cache[name].inputs
    return cache.residual_vjps(name) if vjps == "residual" else cache[name].vjps


def _parts_of_residual(
    cache: BackwardCache, which: str, incl_mid: bool, layers: Collection[int] | None
) -> dict[str, Tensor]:
    residual = cache.residual
    if which == "accumulated":
        return residual.accumulated(None, incl_mid, mlp_input=False, layers=layers)
    if which == "decomposed":
        return residual.decomposed(
            None, mlp_input=False, mode="all", incl_embeds=True, layers=layers
        )
    return residual.by_head(None, incl_remainder=False, layers=layers)


def _translated(
    lens: Translator, vectors: Float[Tensor, "*rows d_model"], layer: int | None
) -> Float[Tensor, "*rows d_model"]:
    translated = lens(vectors, layer)
    shape = getattr(translated, "shape", None)
    if shape != vectors.shape:
        got = translated if shape is None else f"the shape {list(shape)}"
        raise ValueError(
            f"lens returned {got} for vectors of shape {list(vectors.shape)}; it must return "
            "vectors of the same shape"
        )
    return translated


def _layer_of(label: str) -> int | None:
    """The layer in a site's name or in a label such as ``3_pre``, ``3_mlp_out`` or ``L3H0``."""
    found = re.match(r"blocks\.(\d+)\.|(\d+)_|L(\d+)H", label)
    return int(next(filter(None, found.groups()))) if found else None
