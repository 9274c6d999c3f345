"""What brings weights from the host's memory to a device while that computes."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A moment on a device."""

    def synchronize(self) -> None:
        """Return when it has come."""
        ...


class Link(Protocol):
    """Copies beside what a device computes.

    Attributes:
        device: that computes.
    """

    device: torch.device

    def pinned(self, size: int) -> Tensor:
        """Bytes of the host that the device can copy from by itself."""
        ...

    def buffer(self, size: int) -> Tensor:
        """Bytes of the device."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        """Begin to copy bytes of the host to the device once `after` has come; when that is done."""
        ...

    def mark(self) -> Event:
        """When all has been computed that was asked for until now."""
        ...

    def wait(self, event: Event) -> None:
        """Have what is asked for from now on computed when that has come."""
        ...


class CudaLink:
    """A stream of its own, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Event:
        # Buffers may have been made in inference mode, which other threads are not in.
        with torch.cuda.stream(self._stream), torch.inference_mode():
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._record(self._stream)

    def mark(self) -> Event:
        return self._record(torch.cuda.current_stream(self.device))

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def _record(self, stream: Any) -> Event:
        event: Any = torch.cuda.Event()
        event.record(stream)
        found: Event = event
        return found


def link_to(device: torch.device) -> Link | None:
    """What brings weights to a device; None to the CPU, which computes on the host's memory."""
    return None if device.type == "cpu" else CudaLink(device)
