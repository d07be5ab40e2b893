"""One thread at a time has its hooks on a model; others wait for their turn."""

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
        """Whether nobody is there any more who would end it."""
        return self.undo() is None or not self.thread.is_alive()


_turns: weakref.WeakKeyDictionary[nn.Module, _Turn] = weakref.WeakKeyDictionary()
"""Whose turn it is, by model.

A dictionary and not locks: an interrupt next to a lock's ``acquire`` or ``release`` can leave it
locked for good, while here the owner is known, and a turn's end can be repeated.
"""


def take_turn(model: Any, undo: Undo) -> None:
    """Wait until no other thread has a turn at the model, and keep others off until it is undone.

    A thread that has a turn already goes on with it. A turn that interrupts have kept from being
    undone is undone first.
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
