"""Lens results of any size, with made-up tokens and numbers."""

from __future__ import annotations

import torch

from tl_backward.lens.readout import Readout
from tl_backward.lens.result import BackwardLensResult

LAYERS = [1, 4, 6]
POSITIONS = [0, 2, 3, 5]
PROMPT = ["<bos>", "Old", " Rome", "\n", "is", " in"]
D_VOCAB = 1000


def readout(kind: str, layers: list[int], n_positions: int, top_k: int = 2) -> Readout:
    """Every token is named after its place: `W_out 0.3 top1` is layer index 0, position index 3."""
    n_layers = len(layers)
    shape = (n_layers, n_positions, top_k)
    ids = torch.arange(2 * n_layers * n_positions * top_k).view(2, *shape)
    names = [
        f"{kind} {i}.{j} {end}{k}"
        for end in ("top", "bottom")
        for i in range(n_layers)
        for j in range(n_positions)
        for k in range(top_k)
    ]
    return Readout(
        kind=kind,
        labels=[f"blocks.{layer}.mlp.{kind}" for layer in layers],
        layers=layers,
        top_ids=ids[0],
        top_values=-0.25 - ids[0],
        bottom_ids=ids[1],
        bottom_values=-0.5 - ids[1],
        target_ranks=torch.arange(n_layers * n_positions).view(n_layers, n_positions) + 500,
        target_values=torch.full((n_layers, n_positions), -9.0),
        vocab_ids=torch.zeros(n_layers, n_positions, 0, dtype=torch.long),
        vocab_values=torch.zeros(n_layers, n_positions, 0),
        entropy=torch.full((n_layers, n_positions), 3.0),
        norms=torch.full((n_layers, n_positions), 7.0),
        vjp_norms=torch.linspace(0.001, 1, n_layers * n_positions).view(n_layers, n_positions),
        zero_mask=torch.zeros(n_layers, n_positions, dtype=torch.bool),
        vocabulary=dict(enumerate(names)),
    )


def result_of(*readouts: Readout) -> BackwardLensResult:
    return BackwardLensResult(
        readouts={readout.kind: readout for readout in readouts},
        str_tokens=PROMPT,
        positions=torch.tensor(POSITIONS),
        target_ids=torch.tensor(3),
        target=" <b>",
        target_names={" <b>": (3,)},
        target_positions=torch.tensor([5]),
        loss=torch.tensor(4.0),
        loss_target=" <b>",
        loss_target_ids=[3],
        d_vocab=D_VOCAB,
        normalize=False,
        return_type="log_probs",
        direction="gradient",
        weights_processing="raw",
    )


def small(kind: str = "W_out") -> Readout:
    return readout(kind, LAYERS, len(POSITIONS))


def contrast(one: torch.Tensor, other: torch.Tensor) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: torch.Tensor) -> float:
        linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
