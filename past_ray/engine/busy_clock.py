"""How long something was at work."""

import threading
import time


class BusyClock:
    """Adds up the time in which at least one piece of work was open; may be read at any time."""

    def __init__(self) -> None:
        """Start at 0 with nothing open."""
        self._lock = threading.Lock()
        self._num_open = 0
        self._since = 0.0
        self._total_s = 0.0

    @property
    def num_open(self) -> int:
        """Pieces of work that are open now."""
        return self._num_open

    @property
    def seconds(self) -> float:
        """Time with work open, until now."""
        with self._lock:
            open_s = time.perf_counter() - self._since if self._num_open else 0.0
            return self._total_s + open_s

    def open(self, count: int = 1) -> None:
        """Begin ``count`` pieces of work."""
        with self._lock:
            if self._num_open == 0:
                self._since = time.perf_counter()
            self._num_open += count

    def close(self, count: int = 1) -> None:
        """End ``count`` pieces of work."""
        with self._lock:
            self._num_open -= count
            if self._num_open == 0:
                self._total_s += time.perf_counter() - self._since
