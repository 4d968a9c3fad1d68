"""Writing records beside the next step: compressing them on the way would keep it waiting."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Does one job at a time in a thread of its own. What a job raises, the next `start` or `wait` raises.

    Leaving the context waits for the last job; after an error its own failure is not raised on top.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="opd-records")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job once the one before is done, so that never more than one step's records are held."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Return when nothing is left to do."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()
