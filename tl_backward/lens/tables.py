"""A result as plain data: a data frame, and the tables that figures and pages draw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tl_backward.lens.readout import VALUE_COLUMNS, Readout, is_forward, is_weight_kind
from tl_backward.plotting.tables import Cell, LensTables, Table
from tl_backward.sites.kinds import reads_stream

if TYPE_CHECKING:
    import pandas as pd

    from tl_backward.lens.result import BackwardLensResult

INTEGERS = dict.fromkeys(("layer", "target_rank", "k", "token_id"), "Int64")


def data_frame(result: BackwardLensResult) -> pd.DataFrame:
    """See :meth:`BackwardLensResult.to_dataframe`."""
    import pandas as pd

    if result.is_batch:
        examples = [result.example(b) for b in range(len(result.positions))]
        frames = [example.to_dataframe() for example in examples]
        for b, (example, frame) in enumerate(zip(examples, frames, strict=True)):
            frame.insert(3, "example", b)
            if result.ranks_by_token and "target" not in frame:
                frame.insert(list(frame).index("target_rank"), "target", example.target)
        return pd.concat(frames, ignore_index=True)
    lines = [
        {"weight": kind, "label": label, "layer": layer, **line}
        for kind, readout in result.items()
        for i, (label, layer) in enumerate(zip(readout.labels, readout.layers, strict=True))
        for line in _lines(result, readout, i)
    ]
    frame = pd.DataFrame(lines)
    return frame.astype({name: kind for name, kind in INTEGERS.items() if name in frame})


def lens_tables(result: BackwardLensResult) -> LensTables:
    """The tables that figures and pages draw for one prompt.

    Raises:
        ValueError: For several prompts.
    """
    if result.is_batch:
        raise ValueError(
            "tables show one prompt: use result.example(b), or call the lens with batch_slice=b"
        )
    return LensTables(
        tables={kind: _table(result, kind) for kind in result},
        prompt_tokens=result.prompt_tokens,
        loss=float(result.loss),
        loss_target=None if result.loss_target is None else str(result.loss_target),
        d_vocab=result.d_vocab,
        value=VALUE_COLUMNS[result.return_type],
        has_targets=result.target_ids.numel() > 0,
        ranks_by_token=result.ranks_by_token,
        is_normalized=result.normalize,
        is_descent=result.direction == "descent",
    )


def _table(result: BackwardLensResult, kind: str) -> Table:
    readout = result[kind]
    is_weight = is_weight_kind(kind)
    positions = torch.as_tensor(result.positions).tolist()
    flipped = result.direction == "descent" and not is_forward(kind)
    targets = _targets(result, readout, len(positions))
    ranks = readout.target_ranks.reshape(*readout.norms.shape, -1).tolist()
    top_counts = is_forward(kind) or result.direction == "descent"
    scale = readout.vjp_norms.max().item()
    top, bottom = readout.top_tokens(), readout.bottom_tokens()
    empty = readout.zero_mask | (readout.vjp_norms == 0)
    hit_rank = 0 if top_counts else result.d_vocab - 1

    def cell(i: int, j: int) -> Cell | None:
        if empty[i, j]:
            return None
        vjp_norm = readout.vjp_norms[i, j].item()
        return Cell(
            level=(vjp_norm / scale) ** (1 / 3),
            is_hit=hit_rank in ranks[i][j],
            ranks=list(zip(targets[j], ranks[i][j], strict=True)),
            norm=readout.norms[i, j].item(),
            vjp_norm=vjp_norm,
            top=list(zip(top[i][j], readout.top_values[i, j].tolist(), strict=True)),
            bottom=list(zip(bottom[i][j], readout.bottom_values[i, j].tolist(), strict=True)),
            experts=_experts(result, readout.labels[i], j),
        )

    return Table(
        kind=kind,
        is_weight=is_weight,
        by_input=reads_stream(kind),
        top_counts=top_counts,
        ends=("least", "most") if flipped else ("most", "least"),
        positions=positions,
        tokens=[result.str_tokens[position] for position in positions],
        headers=_headers(readout) if is_weight else readout.labels,
        targets=targets,
        ranks=ranks,
        norms=readout.norms.tolist(),
        scale=scale,
        has_tokens=bool(readout.top_ids.shape[-1] and readout.bottom_ids.shape[-1]),
        cells=[[cell(i, j) for j in range(len(positions))] for i in range(len(readout.labels))],
        left_out=result.left_out.get(kind, []),
    )


def _headers(readout: Readout) -> list[str]:
    """The layers; several entries in one layer also get a name."""
    return [
        str(layer)
        if readout.layers.count(layer) == 1
        else f"{layer} {label.split('.', 2)[2].rpartition('.')[0]}"
        for layer, label in zip(readout.layers, readout.labels, strict=True)
    ]


def _experts(result: BackwardLensResult, label: str, j: int) -> list[tuple[int, float]]:
    """The experts of a token and their weights, largest first; none for a dense layer."""
    for name, routed in result.experts.items():
        if label.startswith(f"{name}."):
            pairs = zip(routed.experts[j].tolist(), routed.weights[j].tolist(), strict=True)
            return sorted(pairs, key=lambda pair: -pair[1])
    return []


def _targets(result: BackwardLensResult, readout: Readout, n_positions: int) -> list[list[str]]:
    """The targets at each position: the shared ones, or its own."""
    if not isinstance(result.target, list):
        return [[result.target]] * n_positions
    if readout.has_several_targets:
        return [result.target] * n_positions
    return [[target] for target in result.target]


def _lines(result: BackwardLensResult, readout: Readout, i: int) -> Iterator[dict[str, Any]]:
    value = VALUE_COLUMNS[result.return_type]
    several = readout.has_several_targets
    of_rows = result.target_ids.ndim == 1 and not several
    for j, position in enumerate(torch.as_tensor(result.positions).tolist()):
        is_zero = bool(readout.zero_mask[i, j])
        line = {
            "position": position,
            "str_token": result.str_tokens[position],
            "norm": float(readout.norms[i, j]),
            "vjp_norm": float(readout.vjp_norms[i, j]),
            "entropy": float(readout.entropy[i, j]),
            **({"target": result.target[j]} if of_rows else {}),
            "target_rank": None if several or is_zero else int(readout.target_ranks[i, j]),
        }
        if is_zero:
            yield line | dict.fromkeys(("end", "k", "token_id", "token")) | {value: math.nan}
            continue
        ends = [
            ("top", readout.top_ids[i, j], readout.top_values[i, j]),
            ("bottom", readout.bottom_ids[i, j], readout.bottom_values[i, j]),
            ("vocab", readout.vocab_ids[i, j], readout.vocab_values[i, j]),
        ]
        if several:
            ends.append(("target", result.target_ids, readout.target_values[i, j]))
        for end, ids, values in ends:
            for k, (token, v) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
                if end == "target":
                    line["target_rank"] = int(readout.target_ranks[i, j, k])
                yield line | {
                    "end": end,
                    "k": k,
                    "token_id": token,
                    "token": readout.vocabulary[token],
                    value: v,
                }
