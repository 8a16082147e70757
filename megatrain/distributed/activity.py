"""The current activity of a rank, as its watchdog reports it.

Recording an activity stores a few attributes. Formatting happens only when a watchdog asks. The
main thread of a rank writes, and so do autograd's threads while the main thread waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol


class Group(Protocol):
    """The participants of a collective."""

    @property
    def name(self) -> str: ...
    @property
    def ranks(self) -> Sequence[int]: ...


class WorldGroup(NamedTuple):
    """All ranks, for collectives that run before the mesh exists."""

    ranks: Sequence[int]
    name: str = "world"


class RankActivity:
    """The step, the action and the collective that a rank is in.

    Attributes:
        count: incremented by every change; a rank whose count is constant makes no progress.
        step: the current or last step; 0 before the first.
        doing: an object whose `str` names the action.
        source: the rank whose message this rank waits for; -1 if it waits for none.
        current_collective: the name and the group of the collective that the rank is in.
        open_ended: True in phases of unknown length, such as reading a checkpoint, that record
            few actions. There, CPU time and I/O of the process count as progress too.
    """

    __slots__ = ("_shared", "count", "current_collective", "doing", "open_ended", "source", "step")

    def __init__(self, shared: Any = None) -> None:
        """Starts in the open-ended phase "starting".

        Args:
            shared: an object whose `value` is kept equal to the step, for the parent process.
        """
        self.count = 0
        self.step = 0
        self.doing: object = "starting"
        self.source = -1
        self.current_collective: tuple[str, Group] | None = None
        self.open_ended = True
        self._shared = shared

    def begin_step(self, step: int) -> None:
        """Records the start of a step, which ends an open-ended phase."""
        self.step = step
        self.open_ended = False
        if self._shared is not None:
            self._shared.value = step
        self.set("beginning the step")

    def set_phase(self, description: str) -> None:
        """Records the start of an open-ended phase."""
        self.open_ended = True
        self.set(description)

    def set(self, doing: object) -> None:
        """Records an action."""
        self.doing = doing
        self.source = -1
        self.count += 1

    def set_waiting_for(self, message: object, source: int) -> None:
        """Records that this rank waits for `message` from rank `source`."""
        self.doing = message
        self.source = source
        self.count += 1

    def enter_collective(self, name: str, group: Group) -> None:
        """Records the start of a collective. The current action is kept."""
        self.current_collective = (name, group)
        self.count += 1

    def leave_collective(self) -> None:
        """Records the end of the collective."""
        self.current_collective = None

    @contextmanager
    def collective(self, name: str, group: Group) -> Iterator[None]:
        """Records a collective around a block. Costs a microsecond more than enter and leave."""
        self.enter_collective(name, group)
        yield
        self.leave_collective()

    @property
    def waits_for(self) -> Sequence[int]:
        """The ranks that must act before this rank can continue."""
        collective = self.current_collective
        if collective is not None:
            return collective[1].ranks if len(collective[1].ranks) > 1 else ()
        return (self.source,) if self.source >= 0 else ()

    def describe(self) -> str:
        """Returns the activity as text, such as `recv F3 from rank 1`."""
        collective = self.current_collective
        if collective is not None:
            return f"{collective[0]} {collective[1].name} ({self.doing})"
        return f"recv {self.doing} from rank {self.source}" if self.source >= 0 else str(self.doing)
