"""Second moments of W_out's inputs over a sample of text, and keys whitened by them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_backward import tensor_files
from tl_backward._precision import full_precision, upcast, upcast_dtype
from tl_backward.capture.batch import batch_of_tokens
from tl_backward.capture.bos import prepends_bos
from tl_backward.capture.tokens import prompt_tokens
from tl_backward.editing._expert_outputs import dense_matrices, output_matrices
from tl_backward.editing._made_for import fingerprints, model_name
from tl_backward.editing.runs import weight_inputs
from tl_backward.sites import Model, WeightSite, require_eval_mode, weight_sites

KIND = "KeyStatistics"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Uncentred second moments of the inputs of some weights.

    Attributes:
        second_moments: ``C``, the mean of ``x^T x`` over all tokens of the sample, by site name.
        n_tokens: Number of tokens in the sample.
        ridge: Added to the diagonal of ``C`` before inversion, in units of its mean. The published
            ROME and MEMIT add nothing.
        model: Name of the model, if known.
        prepend_bos: Whether the texts of the sample began with a BOS token; None for token ids, or
            if unknown.

    Example:
        >>> KeyStatistics({"blocks.5.mlp.W_out": C}, n_tokens=100_000, ridge=0.0)
    """

    second_moments: dict[str, Float[Tensor, "d_in d_in"]]
    n_tokens: int
    ridge: int | float
    model: str | None = None
    prepend_bos: bool | None = None
    _factors: dict[str, Float[Tensor, "d_in d_in"]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __repr__(self) -> str:
        return f"KeyStatistics({', '.join(self.second_moments)}; {self.n_tokens} tokens)"

    def __getstate__(self) -> dict[str, Any]:
        """All but what is computed from it, so that use makes no other statistics of them."""
        return vars(self) | {"_factors": {}}

    def whitened(self, name: str, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """The keys ``|x|^2 C^-1 x / (x^T C^-1 x)`` of some inputs.

        The rank-1 update with this key adds the same to the weight's output for ``x`` itself as
        with the plain key ``x``, ``|x|^2`` times the value, and the least possible mean square to
        the outputs for the sample's inputs. It is ROME's key (there scaled to add the value once),
        with a ridge.

        Args:
            name: The site.
            x: Inputs of its weight.

        Raises:
            ValueError: If there are no statistics for this site.
        """
        exact = x.to(device="cpu", dtype=torch.float64)
        keys = self.solve(name, exact)
        scale = exact.square().sum(-1, keepdim=True) / (exact * keys).sum(-1, keepdim=True)
        return (keys * scale).to(x)

    def solve(self, name: str, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """``C^-1 x`` of some inputs, with the ridge, in float64 on the CPU.

        Args:
            name: The site.
            x: Inputs of its weight.

        Raises:
            ValueError: If there are no statistics for this site, or ``C`` is singular.
        """
        exact = x.to(device="cpu", dtype=torch.float64)
        return torch.cholesky_solve(exact.mT, self._factor(name)).mT

    def null_space(
        self, name: str, *, fraction: float | None = None, threshold: float | None = None
    ) -> Float[Tensor, "d_in d_in"]:
        """The projector onto directions that are rare in the sample's inputs, in float64.

        These are the eigenvectors of ``C`` with the smallest eigenvalues; a projected update hardly
        changes the outputs for the sample's inputs. The ridge is not used.

        Args:
            name: The site.
            fraction: Share of all eigenvectors to keep, rounded down. AlphaEdit keeps about 0.7.
            threshold: Instead of a share, keep eigenvalues strictly below this bound. AlphaEdit's
                code uses 0.02, for the scale of Llama 3's inputs.

        Raises:
            ValueError: If there are no statistics for this site, both or neither of ``fraction``
                and ``threshold`` are given, or no or all eigenvectors would be kept.
        """
        if (fraction is None) == (threshold is None):
            raise ValueError("pass either fraction or threshold")
        eigenvalues, eigenvectors = torch.linalg.eigh(self._second_moment(name).double())
        if threshold is None:
            n_kept = math.floor((fraction or 0.0) * len(eigenvalues))
        else:
            n_kept = int((eigenvalues < threshold).sum())
        if not 0 < n_kept < len(eigenvalues):
            raise ValueError(
                f"fraction={fraction}, threshold={threshold} keeps {n_kept} of the "
                f"{len(eigenvalues)} eigenvectors of {name}; keep some, but not all. The "
                f"eigenvalues are {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}"
            )
        kept = eigenvectors[:, :n_kept]
        return kept @ kept.mT

    def require_for(self, model: Model, sites: Sequence[WeightSite]) -> None:
        """Raise unless these statistics cover the inputs of some weights of a model.

        Raises:
            ValueError: If one is missing, has another width, or comes from another model.
        """
        if self.model is not None and _short(self.model) != _short(model_name(model)):
            raise ValueError(
                f"statistics come from {self.model}, but this model is {model_name(model)}; make "
                "them with key_statistics(model, texts, layer)"
            )
        for site in sites:
            shape = tuple(self._second_moment(site.name).shape)
            if shape != (site.d_in, site.d_in):
                raise ValueError(
                    f"statistics of {site.name} have the shape {list(shape)}, but its inputs have "
                    f"width {site.d_in}; they come from another model"
                )

    def _second_moment(self, name: str) -> Float[Tensor, "d_in d_in"]:
        if name not in self.second_moments:
            raise ValueError(
                f"statistics has no entry for {name}, only for {', '.join(self.second_moments)}; "
                "make one with key_statistics(model, texts, layer)"
            )
        return self.second_moments[name]

    def _factor(self, name: str) -> Float[Tensor, "d_in d_in"]:
        """The Cholesky factor of the second moment with the ridge, in float64."""
        if name not in self._factors:
            exact = self._second_moment(name).double().clone()
            exact.diagonal().add_(self.ridge * exact.diagonal().mean())
            factor, failure = torch.linalg.cholesky_ex(exact)
            pivots = factor.diagonal().square()
            rounding = len(exact) * torch.finfo(exact.dtype).eps
            if failure or not pivots.min() > rounding * exact.diagonal().max():
                raise ValueError(
                    f"statistics: the second moment of the inputs of {name} is singular with "
                    f"ridge={self.ridge}; use a larger ridge, or more text than {self.n_tokens} "
                    "tokens"
                )
            self._factors[name] = factor
        return self._factors[name]

    def save(self, path: str | Path, model: Model) -> Path:
        """Write the statistics to one safetensors file.

        Args:
            path: The file to write. Its folder must exist.
            model: The model of the statistics; the file stores fingerprints of its weights.

        Raises:
            OSError: If the file cannot be written.
        """
        tree = {
            "n_tokens": self.n_tokens,
            "ridge": self.ridge,
            "prepend_bos": self.prepend_bos,
            "model": model_name(model),
            "weights": fingerprints(model, list(self.second_moments)),
            "second_moments": self.second_moments,
        }
        return tensor_files.write(Path(path), KIND, tree)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> KeyStatistics:
        """Read statistics written by :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else, or the statistics belong to
                other weights than this model's.
        """
        tree = tensor_files.read(Path(path), KIND)
        try:
            n_tokens, ridge, moments = tree["n_tokens"], tree["ridge"], tree["second_moments"]
            expected: Mapping[str, str] = tree["weights"]
            made_for = tree["model"]
        except (KeyError, TypeError) as error:
            raise tensor_files.damaged(Path(path), KIND, error) from error
        names = [site.name for site in weight_sites(model) if site.name in expected]
        if fingerprints(model, names) != expected:
            raise ValueError(
                f"{path} has the statistics of {made_for}, but this model has other weights "
                f"({', '.join(expected)}); revert the applied edits, or remove the file"
            )
        ordered = {name: moments[name] for name in names}
        return cls(ordered, n_tokens, ridge, made_for, tree.get("prepend_bos"))


def require_statistics(statistics: Any, model: Model, sites: Sequence[WeightSite]) -> None:
    """As :meth:`KeyStatistics.require_for`, of what may be no statistics at all.

    Raises:
        TypeError: When they are none.
        ValueError: As there.
    """
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(
            "statistics must be KeyStatistics, as key_statistics(model, texts, layer) makes them, "
            f"got {type(statistics).__name__}"
        )
    statistics.require_for(model, sites)


def _short(name: str) -> str:
    """A model's name without its author, which a local folder or TransformerLens may omit."""
    return name.rpartition("/")[2].lower()


def key_statistics(
    model: Model,
    texts: Iterable[Any],
    layer: int | Sequence[int],
    *,
    ridge: int | float = 0.01,
    path: str | Path | None = None,
    batch_size: int = 16,
    prepend_bos: bool | None = None,
) -> KeyStatistics:
    """The second moments of W_out's inputs over a sample of text, for ``key="whitened"``.

    Every batch runs once, up to the last of the layers. Shows a progress bar after two seconds.

    Args:
        model: A TransformerLens model in eval mode.
        texts: Texts, or token ids of texts; truncated to the model's context.
        layer: The layer, or several.
        ridge: Added to the diagonal before inversion, in units of the mean of the diagonal. It
            keeps rare directions of the sample from dominating the key.
        path: A safetensors file. If it exists, the statistics are read from it without running any
            text; otherwise they are written to it.
        batch_size: Number of texts in one forward pass.
        prepend_bos: Whether texts begin with a BOS token; token ids are taken as they are. Default:
            as the tokenizer does.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ValueError: For no text, a layer that does not exist, a negative ridge, a model in training
            mode, or a file at ``path`` that belongs to other weights or layers, or to another
            setting of ``prepend_bos``.
        TypeError, NotImplementedError: As :func:`weight_sites`.

    Example:
        >>> statistics = key_statistics(model, texts, layer=24, path="layer24.safetensors")
        >>> forward_pass_shift(model, prompt, " Paris", layer=24, lr=0.1, key="whitened",
        ...                    statistics=statistics)
    """
    sites = dense_matrices(output_matrices(weight_sites(model, "W_out", layer)))
    require_eval_mode(model)
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a number of at least 0, got {ridge}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    every = [texts] if isinstance(texts, str) else list(texts)
    bos = prepends_bos(model, prepend_bos) if any(isinstance(t, str) for t in every) else None
    if path is not None and Path(path).exists():
        loaded = KeyStatistics.load(path, model)
        if loaded.second_moments.keys() != {site.name for site in sites}:
            raise ValueError(
                f"path: {path} has the statistics of {', '.join(loaded.second_moments)}, not of "
                f"layer={layer!r}; pass another path"
            )
        if bos is not None and loaded.prepend_bos is not bos:
            raise ValueError(
                f"path: {path} has statistics with prepend_bos={loaded.prepend_bos}, but texts now "
                f"begin {'with' if bos else 'without'} a BOS token; pass another path"
            )
        return replace(loaded, ridge=ridge)
    if not every:
        raise ValueError("texts is empty; pass at least one text")
    tokens = [ids[: model.cfg.n_ctx] for ids in prompt_tokens(model, every, bos)]
    tokens.sort(key=len)
    moments = {site.name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64) for site in sites}
    starts = range(0, len(tokens), batch_size)
    for start in tqdm(starts, desc="key statistics", delay=2, leave=False):
        batch = batch_of_tokens(model, tokens[start : start + batch_size])
        for name, x in weight_inputs(model, sites, batch).items():
            assert isinstance(x, Tensor)
            rows = upcast(x[batch.mask.to(x.device)])
            with full_precision(rows.device):
                moments[name] += (rows.mT @ rows).cpu()
    n_tokens = sum(map(len, tokens))
    dtype = upcast_dtype(model.cfg.dtype)
    statistics = KeyStatistics(
        {name: (total / n_tokens).to(dtype) for name, total in moments.items()},
        n_tokens,
        ridge,
        model_name(model),
        bos,
    )
    if path is not None:
        statistics.save(path, model)
    return statistics
