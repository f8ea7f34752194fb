"""A run's end: a wall-clock limit, or SIGTERM. What was measured by then is reported."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator

AGAIN = 0.5  # seconds
REPORT_SHARE, REPORT_SECONDS = 0.1, 30.0  # of a limit is kept for the report, and at most so much


class Ended(BaseException):
    """The run is to end. No Exception, which a group that fails is taken for."""


class Limit:
    """Ends what runs inside of `running` when `seconds` are over or SIGTERM comes.

    The part of the limit that the report takes is not for measuring.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self.reason = ""  # why nothing more is measured; empty while something may be
        self.killed = False  # by SIGTERM
        self.end = time.monotonic() + seconds  # of the whole run
        for_report = min(REPORT_SHARE * seconds, REPORT_SECONDS)
        self._until = self.end - for_report
        self._inside = False
        self._process = os.getpid()

    @property
    def left(self) -> float:
        """Seconds in which something may still be measured."""
        return max(self._until - time.monotonic(), 0.0)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listens to SIGTERM and to the clock."""
        before = {s: signal.signal(s, self._end) for s in (signal.SIGTERM, signal.SIGALRM)}
        if self.seconds < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for which, handler in before.items():
                # `timeout` tells the process and then its group, and the report is to be written.
                told = self.killed and which == signal.SIGTERM
                signal.signal(which, signal.SIG_IGN if told else handler)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is in here gets `Ended`, at once if the end has come already."""
        self._inside = True
        try:
            if self.reason:
                raise Ended
            yield
        finally:
            self._inside = False

    def _end(self, which: int, _: object) -> None:
        if os.getpid() != self._process:  # a compiler's worker, forked with this handler
            os._exit(128 + which)
        if which == signal.SIGTERM:
            self.killed = True
        if not self.reason:
            over = f"the limit of {self.seconds:g} s was reached"
            self.reason = "the run was told to end" if self.killed else over
        if self._inside:
            # A finaliser or a callback of C code swallows what is raised in it: until it gets out
            # of there, it comes again.
            signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
            raise Ended
