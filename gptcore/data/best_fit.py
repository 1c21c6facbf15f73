"""Packing of examples into rows: best-fit decreasing, which wastes little and depends on the lengths alone."""

from __future__ import annotations

import numpy as np

from gptcore.errors import UserError


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Items into rows of at most ``capacity``: the longest first, each into the fullest row that still takes it.

    ``lengths``: (items,) integers, 1 or more. Items of one length go in their order, and of rows equally full the one
    that became so last takes the next. At most 11/9 of the fewest possible rows plus 6/9 (Johnson 1973; Dósa 2007).

    Returns:
        For each row the numbers of its items, (items of the row,) int64.

    Raises:
        UserError: an item that is longer than ``capacity``, or shorter than 1.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > capacity))[0])
        raise UserError(f"packing: item {wrong} has length {lengths[wrong]}, expected 1 to {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some row has room for exactly r more
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return [np.array(row, np.int64) for row in rows]
