"""This process among those that train one run together (`trainer=ddp`): its number, and what they agree on.

In one process everything here does nothing.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The number of this process; 0 is the first."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def agreed(value: T) -> T:
    """The first process's value, in all of them; they wait for each other here."""
    if not _together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def one_says(*flags: bool) -> list[bool]:
    """For each flag whether it is set in any process, in all of them; they wait for each other here."""
    if not _together():
        return list(flags)
    box = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return [bool(flag) for flag in box]


def gather(rows: list[T]) -> list[T]:
    """The rows of all processes, in each of them."""
    if not _together():
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
