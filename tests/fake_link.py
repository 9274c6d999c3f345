"""A device of its own that is the CPU: its copies happen as late as they may, or as early."""

from dataclasses import dataclass, field

import torch

CPU = torch.device("cpu")


@dataclass(eq=False)
class FakeEvent:
    link: object
    number: int = 0

    def synchronize(self):
        self.link.run_until(self)


@dataclass
class FakeLink:
    """`copies` are pairs of a buffer's number and the number of the mark that was waited for."""

    late: bool
    device: torch.device = CPU
    copies: list = field(default_factory=list)
    buffers: list = field(default_factory=list)
    marks: int = 0
    _queue: list = field(default_factory=list)

    def pinned(self, size):
        return torch.empty(size, dtype=torch.uint8).fill_(255)

    def buffer(self, size):
        self.buffers.append(self.pinned(size))
        return self.buffers[-1]

    def copy(self, target, source, after):
        event = FakeEvent(self)
        number = [each.data_ptr() for each in self.buffers].index(target.data_ptr())
        self.copies.append((number, after and after.number))
        self._queue.append((event, target, source))
        if not self.late:
            self.run_until(event)
        return event

    def mark(self):
        self.marks += 1
        return FakeEvent(self, self.marks)

    def wait(self, event):
        self.run_until(event)

    def run_until(self, event):
        """All copies up to that one: they are one after the other."""
        while any(each[0] is event for each in self._queue):
            _, target, source = self._queue.pop(0)
            target.copy_(source)
