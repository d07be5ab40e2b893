"""Threads take turns at a model: one at a time has its hooks on it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from tl_backward._undo import Undo, take_back

SECONDS_BETWEEN_LOOKS = 0.001


class _Turn(NamedTuple):
    thread: threading.Thread
    undo: weakref.ref[Undo]
    steps: list[Callable[[], object]]

    def was_left(self) -> bool:
        """Whether nothing is left that would end the turn."""
        return self.undo() is None or not self.thread.is_alive()


_turns: weakref.WeakKeyDictionary[nn.Module, _Turn] = weakref.WeakKeyDictionary()
"""The current turn at each model.

This is a dictionary, not a lock: an interrupt near ``acquire`` or ``release`` can leave a lock
locked forever, whereas here the owner is known and ending a turn can be repeated.
"""


def take_turn(model: Any, undo: Undo) -> None:
    """Wait for the turn at a model, and keep other threads out until it is undone.

    A thread that already has the turn keeps it. An abandoned turn, which interrupts kept from being
    undone, is undone first.
    """
    turn = _Turn(threading.current_thread(), weakref.ref(undo), undo.steps)
    undo.add(_end, model, turn)
    while (holder := _turns.setdefault(model, turn)) is not turn:
        if holder.was_left():
            take_back(holder.steps)
            _end(model, holder)
        elif holder.thread is turn.thread:
            return
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _end(model: nn.Module, turn: _Turn) -> None:
    if _turns.get(model) is turn:
        del _turns[model]
