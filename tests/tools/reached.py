"""Running one test of a pytest session, and which functions of a file it runs."""

import sys
import threading
import types
from typing import Any

import pytest


def passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test with all hooks; whether nothing of it failed."""
    failed: list[Any] = []
    item.session.testsfailed = 0
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    failed += [True] * item.session.testsfailed
    return not failed


class Reached:
    """Which functions of a file a test runs, those of its file's fixtures included: they may be made for an earlier test."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._calls: dict[str, set[str]] = {}
        self._fixtures: dict[str, set[str]] = {}
        self._now: set[str] = set()

    def passes(self, item: pytest.Item, following: pytest.Item | None) -> bool:
        mine = self._calls[item.nodeid] = set()
        before = self._fixtures.setdefault(item.nodeid.split("::")[0], set())
        call = item.runtest

        def runtest() -> None:
            self._now = mine
            call()

        item.runtest = runtest  # type: ignore[method-assign]
        self._now = before
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            return passes(item, following)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _trace(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename == self._path:
            self._now.add(frame.f_code.co_qualname)

    def owners(self) -> dict[str, list[str]]:
        return {name: sorted(mine | self._fixtures[name.split("::")[0]]) for name, mine in self._calls.items()}
