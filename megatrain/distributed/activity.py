"""What a rank is doing now, noted where it does it and read by its watchdog (watchdog/).

A note is a few attributes that are stored: nothing is formatted, timed or sent until someone asks. A rank's main thread
writes them, and autograd's threads, which run while it waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol


class Group(Protocol):
    """Who takes part in a collective, and what the line of them is called."""

    @property
    def name(self) -> str: ...
    @property
    def ranks(self) -> Sequence[int]: ...


class WorldGroup(NamedTuple):
    """All ranks, before there is a grid."""

    ranks: Sequence[int]
    name: str = "world"


class RankActivity:
    """A rank's notes.

    Attributes:
        count: changes with every note: a rank whose count stands still does not get on.
        step: that is being done, or was last; 0 before the first.
        doing: anything whose words say it.
        source: the rank whose message is waited for, -1 when none is.
        collective: that the rank is in, as its name and who takes part.
        open_ended: of a phase whose length nobody can tell, such as reading a checkpoint, in which few notes are made: that
            the process computes or reads counts as getting on too.
    """

    __slots__ = ("_shared", "collective", "count", "doing", "open_ended", "source", "step")

    def __init__(self, shared: Any = None) -> None:
        """`shared` has a `value` that is kept equal to the step, for who started this rank."""
        self.count = self.step = 0
        self.doing: object = "starting"
        self.source = -1
        self.collective: tuple[str, Group] | None = None
        self.open_ended = True
        self._shared = shared

    def begin_step(self, step: int) -> None:
        self.step, self.open_ended = step, False
        if self._shared is not None:
            self._shared.value = step
        self.note("beginning the step")

    def phase(self, words: str) -> None:
        """An open-ended phase."""
        self.open_ended = True
        self.note(words)

    def note(self, doing: object) -> None:
        self.doing, self.source = doing, -1
        self.count += 1

    def receive(self, message: object, source: int) -> None:
        """From here on it is waited for."""
        self.doing, self.source = message, source
        self.count += 1

    def enter(self, verb: str, peers: Group) -> None:
        """A collective begins; what the rank was doing stays noted."""
        self.collective = (verb, peers)
        self.count += 1

    def leave(self) -> None:
        self.collective = None

    @contextmanager
    def within(self, verb: str, peers: Group) -> Iterator[None]:
        """A collective of several calls, or one where a microsecond does not matter."""
        self.enter(verb, peers)
        yield
        self.leave()

    @property
    def waits_for(self) -> Sequence[int]:
        """The ranks that must do something before this one gets on."""
        collective = self.collective
        if collective is not None:
            return collective[1].ranks if len(collective[1].ranks) > 1 else ()
        return (self.source,) if self.source >= 0 else ()

    def words(self) -> str:
        collective = self.collective
        if collective is not None:
            return f"{collective[0]} {collective[1].name} ({self.doing})"
        return f"recv {self.doing} from rank {self.source}" if self.source >= 0 else str(self.doing)
