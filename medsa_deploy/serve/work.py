"""Work of all users → a bounded number of threads and of waiting jobs; every job can be cancelled.

Clicks come before long work, and long work never takes the last thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any

from .refusals import BusyError, CancelledError

STOPPING = "the server is stopping: connect again in a moment"
MEAN_WEIGHT = 0.1


class Job:
    """One piece of work; `future` holds its result."""

    def __init__(self, work: Callable[[Job], Any], *, long: bool) -> None:
        self.work, self.long = work, long
        self.future: Future[Any] = Future()
        self._error: Exception | None = None

    def cancel(self, error: Exception | None = None) -> None:
        """Make the next `check` raise; by default because nobody waits for the answer."""
        self._error = self._error or error or CancelledError("the request was cancelled")

    def check(self) -> None:
        """Raise if the job is cancelled: work calls it often."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Do the work, unless it was cancelled while it waited."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.check()
            self.future.set_result(self.work(self))
        except BaseException as e:
            self.future.set_exception(e)


class WorkPool:
    """Threads that do jobs; a context manager, whose end cancels what runs and waits.

    >>> with WorkPool(threads=2, most_waiting=8) as pool:
    ...     pool.submit(lambda job: 6 * 7).future.result()
    42
    """

    def __init__(self, *, threads: int, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self._most_long = max(1, threads - 1)
        self._clicks: deque[Job] = deque()
        self._long: deque[Job] = deque()
        self._running: set[Job] = set()
        self._mean_seconds = 0.1
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"worker {i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> WorkPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that no thread has begun."""
        return len(self._clicks) + len(self._long)

    @property
    def running(self) -> int:
        """Jobs in work."""
        return len(self._running)

    def submit(self, work: Callable[[Job], Any], *, long: bool = False) -> Job:
        """Queue a job; BusyError if too many wait."""
        job = Job(work, long=long)
        with self._changed:
            if self._stopped:
                raise BusyError(STOPPING)
            if self.waiting >= self.most_waiting:
                seconds = self._mean_seconds * self.waiting / len(self._threads)
                raise BusyError(
                    f"{self.waiting} requests are waiting: try again",
                    retry_after=min(60, 1 + round(seconds)),
                )
            (self._long if long else self._clicks).append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Take no more jobs, and cancel those there are."""
        with self._changed:
            self._stopped = True
            for job in (*self._running, *self._clicks, *self._long):
                job.cancel(BusyError(STOPPING))
            self._changed.notify_all()

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            start = monotonic()
            job.run()
            with self._changed:
                self._running.discard(job)
                self._mean_seconds += MEAN_WEIGHT * (monotonic() - start - self._mean_seconds)
                self._changed.notify()

    def _next(self) -> Job | None:
        """The job to do next; None once the pool has stopped and nothing is left."""
        with self._changed:
            while True:
                long_running = sum(job.long for job in self._running)
                job = None
                if self._clicks:
                    job = self._clicks.popleft()
                elif self._long and (long_running < self._most_long or self._stopped):
                    job = self._long.popleft()
                if job is not None:
                    self._running.add(job)
                    return job
                if self._stopped:
                    return None
                self._changed.wait()
