"""What the weights of each kind read and write."""

from __future__ import annotations

READ_BY_INPUT = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
"""Kinds that read the residual stream: their inputs ``x_i`` are vectors of it (Eq 9)."""
READ_BY_VJP = ("W_O", "W_out")
"""Kinds that write to it: their VJPs ``delta_i`` are vectors of it (Eq 10)."""
