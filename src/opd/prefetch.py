"""A bounded buffer: things made by a thread of their own, at most so many ahead of who takes them."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Makes item `first`, `first` + 1, ... `last`, in order; item n once item n - ahead - 1 is `done`.

    With ahead = 0 an item is made when it is taken, by who takes it. What making raises, `take` raises. Leaving the context waits
    for the item that is being made, and drops it.
    """

    def __init__(self, make: Callable[[int], T], *, first: int, last: int, ahead: int) -> None:
        self._make = make
        self._ahead = ahead
        self._next = first
        self._last = last
        self._done = first - 1
        self._made: deque[T] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="opd-ahead", daemon=True) if ahead else None

    def take(self) -> T:
        """The next item, once it is there."""
        if self._thread is None:
            item = self._make(self._next)
            self._next += 1
            return item
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error is not None)
            if self._made:  # what was made before an error is still good
                return self._made.popleft()
            assert self._error is not None
            raise self._error

    def done(self, number: int) -> None:
        """What came of item `number` is there for those that follow."""
        with self._changed:
            self._done = number
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._next <= self._done + 1 + self._ahead)
                if self._stopped or self._next > self._last:
                    return
            try:
                item = self._make(self._next)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made.append(item)
                self._next += 1
                self._changed.notify_all()

    def __enter__(self) -> "Prefetch[T]":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
