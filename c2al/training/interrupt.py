"""Signals that end a job after the step in flight."""

import signal
from types import FrameType


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag, so that the step in flight ends and is saved."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "Interrupt":
        def receive(number: int, frame: FrameType | None) -> None:
            if self.received:  # a second signal means it
                raise KeyboardInterrupt
            self.received = True

        self._before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Raises KeyboardInterrupt for a signal that came too late to stop the block: what follows must not begin."""
        if self.received:
            raise KeyboardInterrupt
