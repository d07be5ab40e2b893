"""Records for a sweep, and a function of them that notes its calls."""

from __future__ import annotations

LENGTHS = [3, 9, 1, 4, 4, 7, 2, 9, 5, 1, 8]


RECORDS = [{"prompt": "x" * n, "id": i} for i, n in enumerate(LENGTHS)]


def count_characters(model: int, batch: list[dict]) -> list[list[dict]]:
    """As many rows as the id modulo 3, so none for some records."""
    return [
        [{"n": model * len(record["prompt"]), "k": k} for k in range(record["id"] % 3)]
        for record in batch
    ]


class Calls:
    """``count_characters`` that notes the ids it was called with, and fails at one call.

    Neither makes another function of it: it has no state that ``pickle`` would store.
    """

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[int] = []
        self.fail_at, self.error = fail_at, error

    def __getstate__(self) -> dict:
        return {}

    def __call__(self, model: int, batch: list[dict]) -> list[list[dict]]:
        self.batches.append([record["id"] for record in batch])
        if len(self.batches) - 1 == self.fail_at:
            raise self.error
        self.finished += self.batches[-1]
        return count_characters(model, batch)
