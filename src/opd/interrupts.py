"""SIGINT and SIGTERM while a run trains: the step at hand ends and is saved first."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from opd.checkpoint import Saver


class Interrupts:
    """`stop` is True from the first signal on, and the run ends after its current step.

    A second SIGINT raises KeyboardInterrupt at once, except while the weights change: then the step ends first, because otherwise
    no whole step could be saved. A third one always raises it.
    """

    def __init__(self, saver: Saver) -> None:
        self.stop = False
        self._saver = saver
        self._repeated = 0

    @contextmanager
    def handled(self) -> Iterator["Interrupts"]:
        """Handle the signals within the context; outside the main thread none is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, again = not self.stop, self.stop and number == signal.SIGINT
        self.stop = True
        self._repeated += again
        if first:
            text = f"\nfinishing step {self._saver.done + 1}; press Ctrl-C again to stop without it\n"
            # not through the console, which the signal may have interrupted; the terminal may be gone
            with suppress(OSError, ValueError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
        if again and (self._saver.learner.whole or self._repeated > 1):
            raise KeyboardInterrupt
