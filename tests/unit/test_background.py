"""Records that are written beside the next step: none is lost, and no failure is."""

import threading

import pytest

from opd.logging.run_folder import Background


def test_a_job_runs_beside_its_caller():
    go, done = threading.Event(), threading.Event()

    def job() -> None:
        assert go.wait(10)
        done.set()

    with Background() as background:
        background.start(job)
        assert not done.is_set()
        go.set()
        background.wait()
        assert done.is_set()


def test_jobs_end_in_order_and_one_at_a_time():
    seen: list[int] = []
    running = threading.Semaphore(1)

    def job(number: int) -> None:
        assert running.acquire(blocking=False)
        seen.append(number)
        running.release()

    with Background() as background:
        for number in range(50):
            background.start(lambda number=number: job(number))
    assert seen == list(range(50))


def _fail() -> None:
    raise OSError("no space")


def test_a_failure_is_raised_by_the_next_start():
    with Background() as background:
        background.start(_fail)
        with pytest.raises(OSError, match="no space"):
            background.start(lambda: None)
        background.wait()


def test_a_failure_of_the_last_job_is_raised_at_the_end():
    with pytest.raises(OSError, match="no space"), Background() as background:
        background.start(_fail)


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_waits_for_the_job_and_is_not_hidden_by_its_failure(fails: bool):
    done = threading.Event()

    def job() -> None:
        done.set()
        if fails:
            _fail()

    def stop() -> None:
        with Background() as background:
            background.start(job)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        stop()
    assert done.is_set()
