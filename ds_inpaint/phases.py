"""Where the time of some work goes, measured from outside: methods are wrapped while it is measured, and only then."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

Around = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes another method of a method."""


class Phases:
    """Seconds of phases that may lie within one another; a phase is charged without those within it."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """``synchronize`` waits for the device; it is called where a phase begins or ends."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._open: list[str] = []
        self._since = 0.0

    def __contains__(self, name: str) -> bool:
        """Whether the phase is open."""
        return name in self._open

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge this context to a phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def calls(self, name: Callable[[], str]) -> Around:
        """Charge every call of a method to the phase that ``name`` gives as it begins."""

        def around(call: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(call)
            def timed(*given: Any, **named: Any) -> Any:
                with self.phase(name()):
                    return call(*given, **named)

            return timed

        return around

    def borders(self, name: str) -> Around:
        """Charge the way into and out of a context that a method returns to a phase, but not what happens within."""

        def around(call: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
            @wraps(call)
            @contextmanager
            def timed(*given: Any, **named: Any) -> Iterator[Any]:
                with ExitStack() as stack:
                    with self.phase(name):
                        value = stack.enter_context(call(*given, **named))
                    yield value
                    with self.phase(name):
                        stack.close()

            return timed

        return around


@contextmanager
def wrapped(methods: Sequence[tuple[type, str, Around]]) -> Iterator[None]:
    """Within this context methods of classes, also those of existing objects, are what is made of them.

    Args:
        methods: a class, the name of a method that it defines itself, and what is put around it.
    """
    with ExitStack() as stack:
        for owner, name, around in methods:
            plain = vars(owner)[name]
            stack.callback(setattr, owner, name, plain)
            setattr(owner, name, around(plain))
        yield
