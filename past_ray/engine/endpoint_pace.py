"""When the next request may be sent: a rate limit for all threads, and pauses an endpoint asks."""

import email.utils
import math
import threading
import time
from datetime import UTC, datetime


class Pace:
    """Hands out turns at least ``interval_s`` apart, in the order of the calls."""

    def __init__(self, interval_s: float) -> None:
        """Give the first turn at once."""
        self._interval_s = interval_s
        self._next_turn = 0.0
        self._paused_until = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait_for_turn(self) -> bool:
        """Sleep until it is the caller's turn; False once ``stop`` was called."""
        while True:
            with self._lock:
                turn = max(time.monotonic(), self._next_turn, self._paused_until)
                self._next_turn = turn + self._interval_s
            if not self.sleep(turn - time.monotonic()):
                return False
            # A pause may have begun meanwhile; the turn is then lost.
            if turn >= self._paused_until:
                return True

    def pause_all(self, seconds: float) -> None:
        """Let nobody have a turn before ``seconds`` have passed."""
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> bool:
        """Sleep, but not beyond ``stop``; False once that was called."""
        return not self._stopped.wait(max(0.0, seconds))

    def stop(self) -> None:
        """Wake everybody up, for good."""
        self._stopped.set()


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, or None if it asks nothing.

    The header holds seconds or a date; a date that has passed gives 0.

    Reference: HTTP semantics https://www.rfc-editor.org/rfc/rfc9110 section 10.2.3.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
