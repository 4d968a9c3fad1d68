"""Writing records beside the next step: compressing them on the way would keep it waiting."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Does one job at a time in a thread of its own. What a job raises, the next `start` or `wait` raises, and `again` repeats it.

    Leaving the context waits for the last job; after an error its own failure is not raised on top.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="opd-records")
        self._job: Future[None] | None = None
        self._failed: Callable[[], None] | None = None
        self._doing: Callable[[], None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job once the one before is done, so that never more than one step's records are held."""
        self.wait()
        self._doing = job
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Return when nothing is left to do."""
        job, self._job = self._job, None
        if job is not None:
            try:
                job.result()
            except Exception:
                self._failed = self._doing
                raise

    def again(self) -> None:
        """Return when nothing is left to do, a job that failed included: it is tried once more, and raises what it raises then."""
        with contextlib.suppress(Exception):
            self.wait()
        job, self._failed = self._failed, None
        if job is not None:
            job()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()
