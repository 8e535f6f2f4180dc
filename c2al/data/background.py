"""An iterator that works ahead in a thread of its own."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.1
"""How soon a producer that waits for room notices that its consumer is gone."""


def in_background(source: Generator[T], ahead: int) -> Iterator[T]:
    """The items of `source`, made in a thread, at most `ahead` of them kept ready.

    An error in the thread is raised in the consumer. Leaving the iteration early stops the thread.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(source, ready, stop), name="c2al-reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        thread.join()


def _produce(
    source: Generator[T], ready: "queue.Queue[tuple[T] | BaseException | None]", stop: threading.Event
) -> None:
    def put(item: tuple[T] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    try:
        for value in source:
            if not put((value,)):
                return
        put(None)
    except BaseException as e:
        put(e)
    finally:
        source.close()
