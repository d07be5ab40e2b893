"""MEND's network, which maps a gradient's factors to an edit's (Mitchell et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from tl_backward._precision import full_precision

N_LAYERS = 2
FIRST_STEP_SIZE = 1e-4
EPSILON = 1e-7


class LowRankLayer(nn.Module):
    """``z + clamp(scale * (u v z + bias) + shift, 0)``, the identity at the start.

    The gradient of the clamp at 0 is 1, so that ``u``, which is zero at the start, learns. (That of
    ``torch.clamp`` is 1 in torch 2.13, and 0 in 2.15.)

    Args:
        width: Width of ``z``.
        rank: Inner width, at most ``width``.
        n_weights: Number of weights, each with its own scale and shift.
        generator: Generator of the random ``v``.
    """

    def __init__(self, width: int, rank: int, n_weights: int, generator: torch.Generator) -> None:
        super().__init__()
        inner = min(rank, width)
        self.u = nn.Parameter(torch.zeros(width, inner))
        self.v = nn.Parameter(torch.randn(inner, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_weights, width))
        self.shift = nn.Parameter(torch.zeros(n_weights, width))

    def forward(self, z: Float[Tensor, "row width"], weight: int) -> Float[Tensor, "row width"]:
        """Apply the layer for one of the weights."""
        inner = einsum(z, self.v, "row i, inner i -> row inner")
        added = einsum(inner, self.u, "row inner, o inner -> row o") + self.bias
        scaled = added * self.scale[weight] + self.shift[weight]
        return z + torch.where(scaled < 0, 0.0, scaled)


class GradientTransform(nn.Module):
    """Maps gradient factors to edit factors, for all weights of one shape.

    ``x`` and ``delta`` are normalised by their running means and deviations, concatenated, and
    passed through two low-rank layers.

    Args:
        d_in: Width of ``x``.
        d_out: Width of ``delta``.
        n_weights: Number of weights that share the network.
        rank: Inner width of its layers.
        generator: Generator of its initial parameters.
    """

    def __init__(
        self, d_in: int, d_out: int, n_weights: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            LowRankLayer(d_in + d_out, rank, n_weights, generator) for _ in range(N_LAYERS)
        )
        self.register_buffer("n_rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(d_in + d_out))
        self.register_buffer("sum_of_squares", torch.zeros(d_in + d_out))
        self.n_rows: Tensor
        self.mean: Tensor
        self.sum_of_squares: Tensor

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"]) -> None:
        """Update the running means and deviations."""
        rows = torch.cat([x, delta], dim=-1).to(self.mean)
        if not len(rows):
            return
        total = self.n_rows + len(rows)
        away = rows.mean(0) - self.mean
        within = (rows - rows.mean(0)).square().sum(0)
        self.sum_of_squares += within + away.square() * self.n_rows * len(rows) / total
        self.mean += away * len(rows) / total
        self.n_rows.copy_(total)

    def forward(
        self, x: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"], weight: int
    ) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
        """Map the factors of a gradient to those of an edit, for one of the weights.

        Raises:
            ValueError: If fewer than two rows were observed.
        """
        if self.n_rows < 2:
            raise ValueError(
                f"only {int(self.n_rows)} rows were observed; normalising needs at least two"
            )
        deviation = (self.sum_of_squares / (self.n_rows - 1)).sqrt()
        rows = torch.cat([x, delta], dim=-1).to(self.mean)
        z = (rows - self.mean) / (deviation + EPSILON)
        for layer in self.layers:
            z = layer(z, weight)
        new_x, new_delta = z.split([x.shape[-1], delta.shape[-1]], dim=-1)
        return new_x, new_delta


class MendNetworks(nn.Module):
    """One transform per weight shape, and one step size, of any sign, per weight.

    Attributes:
        step_sizes: Factors of ``delta~``.

    Args:
        shapes: ``(d_in, d_out)`` of each weight.
        rank: Inner width of the layers.
        seed: Seed of the initial parameters.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._names = [f"{d_in} x {d_out}" for d_in, d_out in shapes]
        self._numbers = [self._names[:i].count(name) for i, name in enumerate(self._names)]
        self.transforms = nn.ModuleDict(
            {
                name: GradientTransform(*shape, self._names.count(name), rank, generator)
                for name, shape in dict(zip(self._names, shapes, strict=True)).items()
            }
        )
        self.step_sizes = nn.Parameter(torch.full((len(shapes),), FIRST_STEP_SIZE))

    def observe(
        self, i: int, x: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"]
    ) -> None:
        """Update the running means and deviations of the ``i``-th weight's shape."""
        self._transform(i).observe(x, delta)

    def forward(
        self, i: int, x: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"]
    ) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
        """The factors of the edit of the ``i``-th weight."""
        with full_precision(x.device):
            new_x, new_delta = self._transform(i)(x, delta, self._numbers[i])
        return new_x, self.step_sizes[i] * new_delta

    def _transform(self, i: int) -> GradientTransform:
        transform = self.transforms[self._names[i]]
        assert isinstance(transform, GradientTransform)
        return transform
