"""The capture of the residual stream: what to record, and the result built from the records."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tl_backward.cache.residual import NODES, Residual
from tl_backward.cache.rows import Rows, by_text
from tl_backward.capture._backward_hooks import CalledAgain
from tl_backward.capture.recorder import Recorder, vjp_between
from tl_backward.sites import FoundSites, Model, Tap, residual_points
from tl_backward.sites.names import layer_of


@dataclass(frozen=True)
class Watched:
    """The attention outputs that :func:`watch_residual` records."""

    z_of_layer: dict[int, str]
    n_layers: int
    n_heads: int
    per_head: bool


def watch_residual(
    recorder: Recorder, model: Model, found: FoundSites, after: int | None, per_head: bool
) -> Watched:
    """Record the residual stream: all of it, or only the layers after the layer ``after``."""
    first = -1 if after is None else after + 1
    n_layers = found.n_layers
    for name, point in residual_points(model).items():
        layer = layer_of(name)
        block = n_layers if name.endswith("hook_resid_post") else -1 if layer is None else layer
        if block < first:
            continue
        middle = name.endswith("hook_resid_mid")
        shared = name == "blocks.0.hook_resid_pre"  # later blocks of Gemma 4 and Zamba 2 read it
        recorder.keep_place(Tap(point, "input"), name, on_a_branch=middle, own_branch=shared)
        if not middle:
            recorder.keep_value(Tap(point, "output"), name, copy=not name.endswith(NODES))
    z_of_layer = {}
    for site in found.sites:
        is_attention = site.name == f"blocks.{site.layer}.attn.W_O"
        if is_attention and site.layer is not None and site.layer >= first:
            z_of_layer[site.layer] = name = f"blocks.{site.layer}.attn.hook_z"
            recorder.keep_place(site.x_tap(), name, on_a_branch=True)
            recorder.keep_value(site.x_tap(), name)
    return Watched(z_of_layer, n_layers, model.cfg.n_heads, per_head)


def needs_graph(recorder: Recorder, watched: Watched) -> bool:
    """Whether :func:`residual_from` needs further backward passes through the graph."""
    return watched.per_head or bool(_parallel(recorder, watched))


def residual_from(
    recorder: Recorder, watched: Watched, vjps: dict[Any, list[Tensor]], rows: Rows
) -> Residual:
    """Build the recorded residual stream. Blocks that run several times are left out.

    Raises:
        CalledAgain: If a backward hook sits between the beginning of a block and its attention
            output.
    """
    once = {
        name: vjps[name]
        for name, places in recorder.places.items()
        if isinstance(name, str) and len(places) == 1
    }
    heads = {}
    if watched.per_head:
        for block, z in watched.z_of_layer.items():
            if {z, f"blocks.{block}.hook_resid_pre"} <= once.keys():
                parts = _each_head(once[z][0], watched.n_heads, rows)
                heads[block] = torch.stack(
                    [rows.of([_through(recorder, block, z, p)]) for p in parts]
                )
    attention = {}
    for block, z in _parallel(recorder, watched).items():
        with suppress(CalledAgain):
            attention[block] = rows.of([_through(recorder, block, z, once[z][0])])
    return Residual(
        n_layers=watched.n_layers,
        n_heads=watched.n_heads,
        lengths=rows.lengths(),
        vjps={name: rows.of(vjp) for name, vjp in once.items()},
        activations={
            name: rows.of(recorder.values(name))
            for name in once
            if not name.endswith("hook_resid_mid")
        },
        attention=attention,
        heads=heads,
    )


def _parallel(recorder: Recorder, watched: Watched) -> dict[int, str]:
    """The attention outputs of parallel blocks (those without a middle) that run once."""

    def runs_once(name: str) -> bool:
        return len(recorder.places[name]) == 1

    return {
        block: z
        for block, z in watched.z_of_layer.items()
        if runs_once(z)
        and runs_once(f"blocks.{block}.hook_resid_pre")
        and not recorder.places[f"blocks.{block}.hook_resid_mid"]
    }


def _through(recorder: Recorder, block: int, z: str, vjp: Tensor) -> Tensor:
    """The part of the VJP before block ``block`` that flows through its attention."""
    (later,), (earlier,) = recorder.places[z], recorder.places[f"blocks.{block}.hook_resid_pre"]
    return vjp_between(later, vjp, earlier)


def _each_head(vjp: Tensor, n_heads: int, rows: Rows) -> list[Tensor]:
    """For each head, the VJP at ``hook_z`` with all other heads zeroed."""
    heads = rearrange(
        by_text(vjp, len(rows.starts)), "batch pos (head d) -> batch pos head d", head=n_heads
    )
    one_hot = rearrange(torch.eye(n_heads).to(vjp), "one head -> one head 1")
    return [(heads * one).reshape(vjp.shape) for one in one_hot]
