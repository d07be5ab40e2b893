"""What one forward and one backward pass leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.factors import GradientFactors

FORMAT = "tl_backward.BackwardCache"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class BackwardCache(Mapping[str, GradientFactors]):
    """The gradient factors of every captured weight matrix, by site name.

    ``cache["blocks.5.mlp.W_out"]`` and ``cache["W_out", 5]`` are the same
    :class:`~tl_backward.GradientFactors`. It keeps no reference to the model and no autograd graph.

    Attributes:
        factors: The factors by site name, in the order of the model.
        tokens: The tokens of the prompt.
        str_tokens: The same as strings.
        positions: The positions that the rows of the factors belong to.
        target_ids: The target of the loss.
        loss: The loss that was differentiated, in nats.
        weights_processing: What TransformerLens has done to the weights that the gradients are
            with respect to, as far as they show it: ``"raw"``, or the steps by the names of its
            arguments, such as ``"fold_ln, center_writing_weights"``.
        behind_norms: By site name, the VJPs behind the post-norm of a weight that has one.
    """

    factors: dict[str, GradientFactors]
    tokens: Int[Tensor, "pos"]
    str_tokens: list[str]
    positions: Int[Tensor, "n"]
    target_ids: Int[Tensor, ""]
    loss: Float[Tensor, ""]
    weights_processing: str
    behind_norms: dict[str, Float[Tensor, "n d_model"]]

    def __getitem__(self, key: str | tuple[str, int | None]) -> GradientFactors:
        return self.factors[self._name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __repr__(self) -> str:
        return (
            f"BackwardCache({len(self)} weights, {len(self.positions)} of {len(self.tokens)} "
            f"positions, loss={self.loss.item():.4f})"
        )

    def residual_vjps(self, key: str | tuple[str, int | None]) -> Float[Tensor, "n d_model"]:
        """VJPs of what a weight writes, where it enters the residual stream.

        Behind a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) they are those at the norm's output,
        which read well in the vocabulary; the factors keep the VJPs at the weight's own output,
        which make up its gradient. Without such a norm the two are the same.

        Raises:
            KeyError: When the weight was not captured.
        """
        name = self._name(key)
        return self.behind_norms.get(name, self.factors[name].vjps)

    def bias_gradient(self, key: str | tuple[str, int | None]) -> Float[Tensor, "d_out"]:
        """Gradient of the bias beside a weight: the sum of the VJPs over the captured positions.

        Raises:
            KeyError: When the weight was not captured.
        """
        return self[key].vjps.flatten(0, -2).sum(0)

    def save(self, path: str | Path) -> Path:
        """Write the cache to one safetensors file, from which :meth:`load` restores it exactly.

        A tensor that several weights share, such as the input of ``W_in`` and ``W_gate``, is
        written once. The file appears under its name only when it is whole: a save that fails
        leaves an older file as it was.

        Args:
            path: The file to write. Its folder must exist.

        Returns:
            The same path.

        Raises:
            OSError: When the file cannot be written.

        Example:
            >>> cache.save("messi.safetensors")
            >>> BackwardCache.load("messi.safetensors")["W_out", 5].norm()
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        stored: dict[str, Tensor] = {}
        names: dict[tuple[object, ...], str] = {}

        def store(name: str, tensor: Tensor) -> str:
            """Add the tensor unless it is there already; the name that it has in the file."""
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in names:
                names[place] = name
                stored[name] = tensor.detach().to(
                    "cpu", copy=True, memory_format=torch.contiguous_format
                )
            return names[place]

        contents = {
            "factors": {
                site: [store(f"{site}.inputs", g.inputs), store(f"{site}.vjps", g.vjps)]
                for site, g in self.factors.items()
            },
            "behind_norms": {
                site: store(f"{site}.behind_norm", vjps) for site, vjps in self.behind_norms.items()
            },
            "tokens": store("tokens", self.tokens),
            "positions": store("positions", self.positions),
            "target_ids": store("target_ids", self.target_ids),
            "loss": store("loss", self.loss),
            "str_tokens": [_escape(token) for token in self.str_tokens],
            "weights_processing": self.weights_processing,
        }
        metadata = {"format": FORMAT, "version": VERSION, "contents": json.dumps(contents)}
        with TemporaryDirectory(prefix=".tl_backward-", dir=path.parent) as folder:
            whole = Path(folder, path.name)
            try:
                save_file(stored, whole, metadata)
            except SafetensorError as error:
                raise OSError(f"{path} could not be written: {error}") from error
            os.replace(whole, path)
        return path

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> BackwardCache:
        """Read a cache that :meth:`save` has written.

        Args:
            path: The file.
            device: Where the factors and the loss go. Tokens, positions and target stay on the
                CPU, as in a cache that was just captured.

        Returns:
            The cache with the same values, dtypes and order of weights. What was shared is shared.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file is truncated or damaged, is not a saved cache, or is in the
                format of a newer version of the package.

        Example:
            >>> BackwardCache.load("messi.safetensors", device="cuda")
        """
        path = Path(path)
        text, stored = _read(path)
        try:
            contents = json.loads(text)
            factors, behind_norms = contents["factors"], contents["behind_norms"]
            ids = {name: contents[name] for name in ("tokens", "positions", "target_ids")}
            expected = {
                *(name for pair in factors.values() for name in pair),
                *behind_norms.values(),
                *ids.values(),
                contents["loss"],
            }
            if expected != stored.keys():
                raise ValueError(
                    f"missing tensors: {sorted(expected - stored.keys())}, "
                    f"unknown ones: {sorted(stored.keys() - expected)}"
                )
            on_device = {
                name: stored[name].to(device) for name in expected.difference(ids.values())
            }
            return cls(
                factors={
                    site: GradientFactors(on_device[inputs], on_device[vjps])
                    for site, (inputs, vjps) in factors.items()
                },
                behind_norms={site: on_device[name] for site, name in behind_norms.items()},
                loss=on_device[contents["loss"]],
                **{field: stored[name] for field, name in ids.items()},
                str_tokens=[_unescape(token) for token in contents["str_tokens"]],
                weights_processing=contents["weights_processing"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is a damaged BackwardCache ({error!r}); save the cache again"
            ) from error

    def _name(self, key: str | tuple[str, int | None]) -> str:
        """The site name behind a name or ``(kind, layer)``."""
        if isinstance(key, str):
            names = [key] if key in self.factors else []
        else:
            kind, layer = key
            prefix = "" if layer is None else f"blocks.{layer}."
            names = [n for n in self.factors if n.startswith(prefix) and n.endswith(f".{kind}")]
        if len(names) != 1:
            problem = "is in several layers" if names else "was not captured"
            raise KeyError(f"{key!r} {problem}; there is {', '.join(names or self.factors)}")
        return names[0]


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The contents as JSON and the tensors, in memory of their own, of a saved cache."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is a safetensors file, but holds no BackwardCache; pass a file that "
                    "BackwardCache.save has written"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} is in version {metadata.get('version')} of its format, and this "
                    f"tl_backward reads version {VERSION}; upgrade tl_backward, or save the cache "
                    "again with this one"
                )
            stored = {name: file.get_tensor(name).clone() for name in names}
            return metadata.get("contents", ""), stored
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged, or no safetensors file ({error}); save the cache "
            "again, or pass a file that BackwardCache.save has written"
        ) from error


def _escape(text: str) -> str:
    """Text with Python's escapes: JSON alone would join two surrogates into one character."""
    return text.encode("unicode_escape").decode("ascii")


def _unescape(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape")
