"""Sharing a loaded model out between devices, the CPU's memory and disk, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from secateur.errors import UsageError, one_line
from secateur.plugin.packed_modules import SHARED_OUT, hide_sizes, main_device, show_sizes


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model go, as transformers' `from_pretrained` takes it.

    Attributes:
        device_map: `auto`, `balanced`, `balanced_low_0` or `sequential`; the name of a device; or module names, each with a
            device, `cpu` or `disk`.
        max_memory: device, or `cpu` → bytes, or text such as `10GiB`, for the first four.
        offload_folder: where the dense weights go whose place is the disk.
    """

    device_map: str | Mapping[str, Any]
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: str | Path | None = None

    @property
    def main_device(self) -> torch.device:
        """Where most of the model computes."""
        try:
            return main_device(self.device_map)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"device_map {self.device_map!r} cannot be used: {one_line(error)}") from error


def dispatch(model: Any, placement: Placement) -> None:
    """Put the parts of a model that lies in the CPU's memory in their places; packed linears are to follow.

    Raises:
        UsageError: accelerate does not take the device map, or a part goes to disk and there is no folder for it.
    """
    try:
        device_map = _device_map(model, placement)
        if "disk" in device_map.values() and placement.offload_folder is None:
            raise UsageError(
                "a part of the model goes to disk: name a folder for it, offload_folder=…, or let more of it into memory"
            )
        dispatch_model(
            model, device_map, offload_dir=placement.offload_folder, skip_keys=model._skip_keys_device_placement
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot be shared out between devices: {one_line(error)}") from error


def _device_map(model: Any, placement: Placement) -> dict[str, Any]:
    asked = placement.device_map
    if isinstance(asked, Mapping):
        return dict(asked)
    if asked not in SHARED_OUT:
        return {"": placement.main_device}
    whole = sorted(model._no_split_modules or ())
    memory = None if placement.max_memory is None else dict(placement.max_memory)
    linears = show_sizes(model)
    try:
        if asked != "sequential":
            memory = get_balanced_memory(
                model, memory, no_split_module_classes=whole, low_zero=asked == "balanced_low_0"
            )
        found: dict[str, Any] = infer_auto_device_map(model, memory, no_split_module_classes=whole)
        return found
    finally:
        hide_sizes(linears)
