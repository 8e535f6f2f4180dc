"""Signals that end a job after the step in flight."""

import signal
from types import FrameType

import torch

from c2al.distributed.process import World
from c2al.errors import InterruptError, TerminateError


class Interrupt:
    """Turns SIGINT and SIGTERM into a number that is looked at, so that the step in flight ends and is saved.

    A KeyboardInterrupt that it raises has the signal's number, from which `c2al` makes its exit code.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal that came first; 0: none."""

    def __enter__(self) -> "Interrupt":
        def receive(number: int, frame: FrameType | None) -> None:
            if self.received:  # a second signal means it
                raise KeyboardInterrupt(number)
            self.received = number

        self._before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, InterruptError):
            # Launchers send SIGTERM to all ranks when the first has ended. The others end by themselves, and
            # that signal must not cut off their last words and their exit code.
            signal.signal(signal.SIGTERM, lambda *_: None)  # SIG_IGN would be inherited by processes started later

    def told(self, world: World) -> int:
        """The signal that any rank received, on every rank; 0: none. Collective. SIGTERM where there are several."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        told_2 = world.all_sum(torch.tensor([float(self.received == n) for n in numbers]))
        return max((n for n, told in zip(numbers, told_2.tolist(), strict=True) if told), default=0)

    def pass_on(self) -> None:
        """Raises KeyboardInterrupt for a signal that came too late to stop the block: what follows must not begin."""
        if self.received:
            raise KeyboardInterrupt(self.received)


def interruption(number: int, message: str) -> InterruptError:
    """The error that ends training after the signal `number`."""
    return (TerminateError if number == signal.SIGTERM else InterruptError)(message)
