"""What the weights of each kind read and write.

Attention and MLPs have TransformerLens's kinds: ``W_Q``, ``W_K``, ``W_V``, ``W_O``, ``W_in``,
``W_gate`` and ``W_out``. Other parts of a block have names after those in their papers:

=====================  =============================================================================
part                   kinds
=====================  =============================================================================
state-space mixer      ``W_in_proj``, ``W_x``, ``W_out_proj`` (Mamba; Mamba 2 has no ``W_x``)
short convolution      ``W_in_proj``, ``W_out_proj`` (LFM2)
linear attention       ``W_Q_linear``, ``W_K_linear``, ``W_V_linear``, ``W_A`` (decay), ``W_B``
                       (step size), ``W_Z`` (output gate), ``W_out_proj``; where the layer joins
                       them, ``W_QKV``, ``W_QKVZ`` and ``W_BA`` (Gated DeltaNet)
latent attention       ``W_DQ``, ``W_UQ``: queries down and up; ``W_DKV``: the latent of keys and
                       values, with the rotary key beside it; ``W_UKV``: ``W_UK`` and ``W_UV``, head
                       by head; ``W_KV``: a key that is the value, too
attention's own gate   ``W_G``
RWKV                   ``W_R_time``, ``W_K_time``, ``W_V_time``, ``W_O_time`` (time mixing),
                       ``W_R_channel``, ``W_K_channel``, ``W_V_channel`` (channel mixing)
Griffin                ``W_linear_x``, ``W_linear_y``, ``W_linear_out``
=====================  =============================================================================

Any other linear layer is named after its module: ``W_per_layer_projection``.
"""

from __future__ import annotations

from tl_backward.sites.names import parse_site_name

READ_BY_INPUT = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
"""Kinds that read the residual stream: their inputs ``x_i`` are vectors of it (Eq 9)."""
ROUTERS = ("W_router", "W_shared_gate")
"""Kinds in a mixture of experts that also read the stream: the router, and the gate of the shared
experts' output."""
READ_BY_VJP = ("W_O", "W_out")
"""Kinds that write to it: their VJPs ``delta_i`` are vectors of it (Eq 10)."""

OTHERS_READ_BY_INPUT = (
    *("W_in_proj", "W_DQ", "W_DKV", "W_KV", "W_G"),
    *("W_QKV", "W_QKVZ", "W_BA", "W_Q_linear", "W_K_linear", "W_V_linear", "W_A", "W_B", "W_Z"),
    *("W_R_time", "W_K_time", "W_V_time", "W_R_channel", "W_K_channel"),
    *("W_linear_x", "W_linear_y"),
)
"""The same beside attention and MLPs. RWKV mixes in the stream of the token before."""
OTHERS_READ_BY_VJP = ("W_out_proj", "W_O_time", "W_linear_out")


def reads_stream(kind: str) -> bool:
    """Whether the input of a weight is the residual stream: of ``W_in``, and ``W_in.lora_A``."""
    weight, _, adapter = kind.partition(".")
    return weight in READ_BY_INPUT + ROUTERS + OTHERS_READ_BY_INPUT and adapter.partition(".")[
        0
    ] in ("", "lora_A")


def writes_stream(kind: str) -> bool:
    """Whether a weight adds to the residual stream: ``W_out``, and ``W_out.lora_B``."""
    weight, _, adapter = kind.partition(".")
    return weight in READ_BY_VJP + OTHERS_READ_BY_VJP and adapter.partition(".")[0] in (
        "",
        "lora_B",
    )


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
