"""What the weights of each kind read and write."""

from __future__ import annotations

from tl_backward.sites.names import parse_site_name

READ_BY_INPUT = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
"""Kinds that read the residual stream: their inputs ``x_i`` are vectors of it (Eq 9)."""
ROUTERS = ("W_router", "W_shared_gate")
"""Kinds in a mixture of experts that also read the stream: the router, and the gate of the shared
experts' output."""
READ_BY_VJP = ("W_O", "W_out")
"""Kinds that write to it: their VJPs ``delta_i`` are vectors of it (Eq 10)."""


def reads_stream(kind: str) -> bool:
    """Whether the input of a weight is the residual stream: of ``W_in``, and ``W_in.lora_A``."""
    weight, _, adapter = kind.partition(".")
    return weight in READ_BY_INPUT + ROUTERS and adapter.partition(".")[0] in ("", "lora_A")


def writes_stream(kind: str) -> bool:
    """Whether a weight adds to the residual stream: ``W_out``, and ``W_out.lora_B``."""
    weight, _, adapter = kind.partition(".")
    return weight in READ_BY_VJP and adapter.partition(".")[0] in ("", "lora_B")


def is_read_by_input(kind: str) -> bool:
    """Whether the side of the residual stream is the weight's input."""
    return reads_stream(kind) or kind == "W_U"


def require_beside_the_stream(name: str) -> None:
    """Refuse a site with the residual stream on neither side.

    Raises:
        ValueError: Naming it.
    """
    kind = parse_site_name(name).kind
    if not (reads_stream(kind) or writes_stream(kind) or kind in ("W_E", "W_pos", "W_U")):
        raise ValueError(
            f"{name} neither reads nor writes the residual stream, so it has no readout"
        )
