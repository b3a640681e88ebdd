"""A pipeline: what an iterator gives is made ahead of its use, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tfkit.internal import checks

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item], prefetch: int = 4) -> Iterator[Item]:
    """Yields the items in their order while the next ones are made.

    An error of the maker is raised where the item would have come. If the reader stops early, so does the thread.

    Args:
        items: made by code that releases the interpreter's lock, if time is to be gained.
        prefetch: items that wait at most.

    >>> list(ahead(range(3)))
    [0, 1, 2]
    """
    waiting: queue.Queue = queue.Queue(checks.integer("prefetch", prefetch, 1))
    stopped = threading.Event()

    def put(thing: object) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(thing, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:
            put((None, error))
            return
        put((_END, None))

    thread = threading.Thread(target=work, daemon=True, name="tfkit-sampler")
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
