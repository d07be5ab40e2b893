"""What training writes, between two looks at it, and what one more step would write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward._integers import is_integer
from tl_backward._precision import upcast, upcast_dtype
from tl_backward.cache import BackwardCache
from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.tokens import Target
from tl_backward.editing import WeightEdit
from tl_backward.editing._difference import leading_directions
from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLogitLens, EditReadout
from tl_backward.plotting.watch_figures import WatchStep, watch_figure, watch_page
from tl_backward.sites import WeightSite, all_modules, find_sites
from tl_backward.sites.adapters import adapted, applied_adapters, base_layer
from tl_backward.sites.hugging_face import fused_modules
from tl_backward.training._twin import bridge_of, refresh

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


class Observation(NamedTuple):
    """One look at a training run.

    Attributes:
        step: When.
        losses: The loss of each probe, in nats.
        would_write: What a step down the gradient of the probes would write, sum over them, by its
            leading directions; None where the gradient is exactly zero.
        written: What was written since the last look; None at the first, and where nothing was.
        written_norms: By site, the Frobenius norm of all that was written since the last look.
    """

    step: int
    losses: list[float]
    would_write: EditReadout | None
    written: EditReadout | None
    written_norms: dict[str, float]


class TrainingWatch:
    """Reads a model while it is trained, in any loop: call :meth:`observe` now and then.

    It looks through a bridge of its own, in eval mode, whose weights are those of the model in
    training. Nothing of the model, its gradients or the random state changes. Of LoRA training what
    is read is the change of the whole ``W + scale A B``: that of the two matrices together.

    Args:
        model: The transformers model in training, or the ``PeftModel`` around it.
        tokenizer: Its tokenizer.
        prompts: Probes: what the model reads at each look.
        targets: What the gradient of a step goes towards, as in
            :func:`tl_backward.run_with_backward_cache`.
        weights: Kinds of weights to watch.
        layers: Layers to watch. Default: all.
        k: How many directions of each weight to read.
        top_k: How many tokens at each end of them.
        prepend_bos: As in :func:`tl_backward.run_with_backward_cache`.

    Attributes:
        observations: What was seen so far.

    Raises:
        ImportError: Where TransformerLens has no ``TransformerBridge``.
        TypeError: When there is no tokenizer.
        ValueError: When a weight or layer does not exist, none of them is trained, or prompts and
            targets do not fit.
        NotImplementedError: When the model is sharded or quantised, or its adapters are no LoRA.

    Example:
        >>> watch = TrainingWatch(hf_model, tokenizer, "Lionel Messi plays for", " Paris")
        >>> for step, batch in enumerate(batches):
        ...     train_on(hf_model, batch)
        ...     seen = watch.observe(step)
        >>> watch.to_dataframe().query("k == 0")
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: str | Sequence[str],
        targets: Target,
        *,
        weights: str | Iterable[str] = "W_out",
        layers: int | Iterable[int] | None = None,
        k: int = 1,
        top_k: int = 5,
        prepend_bos: bool | None = None,
    ) -> None:
        if tokenizer is None:
            raise TypeError("tokenizer is None; pass the model's own, to read its vocabulary")
        if not is_integer(k) or k < 1:
            raise ValueError(f"k must be a positive integer, got {k!r}")
        self.prompts, self.targets = prompts, targets
        self.k, self.top_k, self.prepend_bos = k, top_k, prepend_bos
        self.observations: list[Observation] = []
        with torch.random.fork_rng(_devices(model)):
            self.model = bridge_of(model, tokenizer)
        found = find_sites(self.model)
        trained = _trained(self.model, found.select(weights, layers))
        if not trained:
            raise ValueError(
                f"weights={weights!r}, layers={layers!r}: none of these is trained, nor has an "
                "adapter that is"
            )
        self._trained = trained
        self._every_site = found.sites
        self._before: list[Snapshot] | None = None

    def observe(self, step: int) -> Observation:
        """Look at the model now.

        Args:
            step: What the look is filed under.

        Raises:
            ValueError: When a weight or gradient is not finite, and as
                :func:`tl_backward.run_with_backward_cache`.
        """
        refresh(self.model)
        for one in self._trained:
            one.require_finite()
        with torch.random.fork_rng(_devices(self.model)):
            losses, cache = run_with_backward_cache(
                self.model,
                self.prompts,
                self.targets,
                weights=list(dict.fromkeys(kind for one in self._trained for kind in one.kinds)),
                layers=_layers(self._trained),
                prepend_bos=self.prepend_bos,
            )
            gradient = {one.site.name: one.step_down(cache) for one in self._trained}
            before, now = self._before, [one.snapshot() for one in self._trained]
            written: dict[str, GradientFactors] = {}
            norms: dict[str, float] = {}
            for one, then in zip(self._trained, before or (), strict=before is not None):
                kept, norms[one.site.name] = one.written_since(then, self.k)
                if kept is not None:
                    written[one.site.name] = kept
            observation = Observation(
                step,
                losses.reshape(-1).tolist(),
                self._read(gradient),
                self._read(written),
                norms,
            )
        self._before = now
        self.observations.append(observation)
        return observation

    def to_dataframe(self) -> pd.DataFrame:
        """One row per look, direction and token.

        Columns: ``step``, ``what`` (``written`` or ``would_write``), and those of
        :meth:`EditReadout.to_dataframe`.
        """
        import pandas as pd

        frames = [
            read.to_dataframe().assign(step=seen.step, what=what)
            for seen in self.observations
            for what in ("written", "would_write")
            if (read := getattr(seen, what)) is not None
        ]
        if not frames:
            return pd.DataFrame(columns=["step", "what"])
        whole = pd.concat(frames, ignore_index=True)
        return whole[["step", "what", *(name for name in whole if name not in ("step", "what"))]]

    def plot(self) -> Figure:
        """A plotly figure, layers x weights, with a slider over the looks.

        Raises:
            ImportError: Without the extra ``plot``.
            ValueError: When nothing was seen yet.
        """
        return watch_figure(self._steps())

    def to_html(self, path: str | Path) -> Path:
        """Write the figure as one self-contained page.

        Returns:
            The path of the page.

        Raises:
            ImportError: Without the extra ``plot``.
            ValueError: When nothing was seen yet.
        """
        path = Path(path)
        path.write_text(watch_page(self._steps()), encoding="utf-8")
        return path

    def _read(self, factors: dict[str, GradientFactors]) -> EditReadout | None:
        edit = WeightEdit(self.model, factors, sites=self._every_site)
        if not any(g.norm() > 0 for g in edit.factors.values()):
            return None
        return BackwardLogitLens(self.model).edit(edit, k=self.k, top_k=self.top_k)

    def _steps(self) -> list[WatchStep]:
        return [
            WatchStep(
                seen.step,
                sum(seen.losses) / len(seen.losses),
                None if seen.written is None else seen.written.table(),
                None if seen.would_write is None else seen.would_write.table(),
            )
            for seen in self.observations
        ]


class Snapshot(NamedTuple):
    """What a weight was, on the CPU.

    Attributes:
        weight: The matrix itself, if it is trained.
        adapters: Both matrices of every adapter that is, scaled.
    """

    weight: Tensor | None
    adapters: list[GradientFactors]


class Adapter(NamedTuple):
    """A LoRA adapter beside a weight.

    Attributes:
        name: Its name.
        layer: The layer of ``peft`` that has it.
    """

    name: str
    layer: Any

    @property
    def scale(self) -> float:
        """What its product is multiplied by."""
        return float(self.layer.scaling[self.name])

    @property
    def A(self) -> Float[Tensor, "r d_in"]:
        """Its first matrix."""
        return self.layer.lora_A[self.name].weight.detach()

    @property
    def B(self) -> Float[Tensor, "r d_out"]:
        """Its second one."""
        return self.layer.lora_B[self.name].weight.detach().mT

    def product(self) -> GradientFactors:
        """What it adds to the weight, in float32 at least."""
        return GradientFactors(upcast(self.A), self.scale * upcast(self.B))


class TrainedWeight(NamedTuple):
    """A weight that training changes, by itself or by adapters.

    Attributes:
        site: Where it is.
        itself: Whether the weight itself is trained.
        adapters: The adapters beside it that are.
    """

    site: WeightSite
    itself: bool
    adapters: list[Adapter]

    @property
    def kinds(self) -> list[str]:
        """The kinds of sites whose gradients make up a step."""
        ends = [end for one in self.adapters for end in _ends(one.name)]
        return [self.site.kind] * self.itself + [f"{self.site.kind}.{end}" for end in ends]

    def require_finite(self) -> None:
        """Raise when training has gone astray.

        Raises:
            ValueError: Naming the weight.
        """
        own = [self.site.parameter] if self.itself else []
        for tensor in (*own, *(matrix for one in self.adapters for matrix in (one.A, one.B))):
            if not torch.stack(tensor.detach().aminmax()).isfinite().all():
                raise ValueError(f"{self.site.name} has values that are not finite")

    def step_down(self, cache: BackwardCache) -> GradientFactors:
        """What a step of size 1 down the gradient adds, to first order.

        Of an adapter ``s A B`` it is ``-s (dA B + A dB)``.
        """
        terms = [-1 * _flat(cache[self.site.name])] if self.itself else []
        for adapter in self.adapters:
            of_A, of_B = (_flat(cache[f"{self.site.name}.{end}"]) for end in _ends(adapter.name))
            A, B = adapter.A.to(of_A.inputs), adapter.B.to(of_A.inputs)
            terms.append(-adapter.scale * GradientFactors(of_A.inputs, of_A.vjps @ B))
            terms.append(-adapter.scale * GradientFactors(of_B.inputs @ A, of_B.vjps))
        return _sum(terms)

    def snapshot(self) -> Snapshot:
        """The weight as it is now."""
        own = self.site.parameter.detach().to("cpu", copy=True) if self.itself else None
        products = [one.product() for one in self.adapters]
        return Snapshot(
            own,
            [GradientFactors(g.inputs.to("cpu", copy=True), g.vjps.cpu()) for g in products],
        )

    def written_since(self, then: Snapshot, k: int) -> tuple[GradientFactors | None, float]:
        """What was written, and its norm: the leading directions, or of adapters all of it."""
        now = [one.product() for one in self.adapters]
        before = [
            GradientFactors(was.inputs.to(g.device), was.vjps.to(g.device))
            for was, g in zip(then.adapters, now, strict=True)
        ]
        terms = [*now, *(-1 * was for was in before)]
        if then.weight is None:
            whole = _sum(terms)
            norm = float(whole.norm())
            return (whole if norm else None), norm
        weight = self.site.parameter.detach()
        dtype = upcast_dtype(weight.dtype)
        D = torch.zeros(self.site.d_in, self.site.d_out, dtype=dtype, device=weight.device)
        stored = self.site.to_parameter_layout(D)
        stored.add_(weight).sub_(then.weight.to(weight.device))
        for g in terms:
            D += g.dense()
        kept, of_site = leading_directions(self.site.name, D, k)
        return kept, of_site.norm


def _trained(model: Any, sites: Sequence[WeightSite]) -> list[TrainedWeight]:
    """Those of the sites whose weights, or adapters, require gradients."""
    layers = {id(base_layer(layer)): layer for _, layer in adapted(all_modules(model))}
    sources = {id(part): one.module for one in fused_modules(model) for part, _ in one.columns}
    found = []
    for site in sites:
        module, _ = site.holder
        if "lora_" in site.kind:
            continue
        source = sources.get(id(module))
        parameter = site.parameter if source is None else source.weight
        layer = layers.get(id(module))
        adapters = [] if layer is None else [Adapter(one, layer) for one in applied_adapters(layer)]
        trained = [one for one in adapters if _is_trained(one)]
        if parameter.requires_grad or trained:
            found.append(TrainedWeight(site, bool(parameter.requires_grad), trained))
    return found


def _is_trained(adapter: Adapter) -> bool:
    if adapter.name not in adapter.layer.lora_A:
        raise NotImplementedError(
            f"the adapter {adapter.name!r} of an embedding has no site; leave W_E out of weights="
        )
    matrices = adapter.layer.lora_A[adapter.name], adapter.layer.lora_B[adapter.name]
    return any(matrix.weight.requires_grad for matrix in matrices)


def _ends(adapter: str) -> tuple[str, str]:
    """How sites name the matrices of an adapter."""
    suffix = "" if adapter == "default" else f".{adapter}"
    return f"lora_A{suffix}", f"lora_B{suffix}"


def _layers(trained: Sequence[TrainedWeight]) -> list[int] | None:
    """The layers to capture; None where a weight is outside the blocks."""
    layers = [one.site.layer for one in trained]
    inside = sorted({layer for layer in layers if layer is not None})
    return None if None in layers else inside


def _flat(g: GradientFactors) -> GradientFactors:
    """The gradient of the whole batch, in float32 at least."""
    return GradientFactors(
        rearrange(upcast(g.inputs), "... d_in -> (...) d_in"),
        rearrange(upcast(g.vjps), "... d_out -> (...) d_out"),
    )


def _sum(terms: Sequence[GradientFactors]) -> GradientFactors:
    whole = terms[0]
    for term in terms[1:]:
        whole = whole + term
    return whole


def _devices(model: Any) -> list[torch.device]:
    """Where random states are besides that of the CPU."""
    devices = {parameter.device for parameter in model.parameters()}
    return [device for device in devices if device.type == "cuda"]
