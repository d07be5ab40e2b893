"""Attribution patching: node scores from the activations of two runs and the VJPs of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from einops import reduce

from tl_backward.cache.residual import NODES, Residual
from tl_backward.sites.names import layer_of

if TYPE_CHECKING:
    import pandas as pd


def attribution(clean: Residual, corrupt: Residual, positions: list[list[int]]) -> pd.DataFrame:
    """``(clean activation - corrupt activation) . corrupt VJP`` of every node."""
    import pandas as pd

    clean.require_all_layers()
    corrupt.require_all_layers()
    nodes = [(b, position) for b, of_text in enumerate(positions) for position in of_text]
    lines = []
    for name in corrupt.activations.keys() & corrupt.vjps.keys() & clean.activations.keys():
        if not name.endswith(NODES):
            continue
        kind, n_heads = _node(name, corrupt.n_heads)
        product = (clean.activations[name] - corrupt.activations[name]) * corrupt.vjps[name]
        scores = reduce(product, "... pos (head d) -> (... pos) head", "sum", head=n_heads or 1)
        for (example, position), of_heads in zip(nodes, scores.tolist(), strict=True):
            for head, score in enumerate(of_heads):
                place = (layer_of(name), head if n_heads else None, position)
                lines.append((example, kind, *place, score))
    columns = ["example", "kind", "layer", "head", "position", "score"]
    table = pd.DataFrame(lines, columns=columns).astype({"layer": "Int64", "head": "Int64"})
    return table.sort_values(
        columns[:1] + columns[2:5] + ["kind"], na_position="first", ignore_index=True
    )


def _node(name: str, n_heads: int) -> tuple[str, int | None]:
    """Node kind, by TransformerLens 4.3's name, and number of heads at a HookPoint."""
    if name.endswith("hook_z"):
        return "attn_head_out", n_heads
    return ("mlp_out" if name.endswith("hook_mlp_out") else "embed"), None
