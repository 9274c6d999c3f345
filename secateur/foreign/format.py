"""What others write: how a folder is recognised by its config, and which of its weights are packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from secateur.core.discovery import Table
from secateur.formats.layouts.packed_weight import PackedWeight

#: Entry points of this group are modules of other packages, which register formats as ours do.
GROUP = "secateur.foreign"


class Foreign(ABC):
    """A format of checkpoint folders that is not ours. How its weights become ours is told by the decoders of `packed_weights`.

    Attributes:
        quant_method: what `quantization_config` calls it.
        reads: what is read of it, in words that an error ends in.
        card: how a folder in this format is opened, for its model card; "" where none is written.
        opening: the same where transformers does not open it, in the place of the lines by which it does.
        library: what the hub calls that which opens it.
    """

    quant_method: ClassVar[str]
    reads: ClassVar[str]
    card: ClassVar[str] = ""
    opening: ClassVar[str] = ""
    library: ClassVar[str] = "transformers"

    @classmethod
    def section(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a `config.json` says about weights in this format; None where it says nothing of the kind."""
        found = config.get("quantization_config")
        return found if isinstance(found, Mapping) and found.get("quant_method") == cls.quant_method else None

    @classmethod
    @abstractmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        """The packed weights of such a checkpoint, by their names.

        Args:
            stored: its tensors by name, such as `….up_proj.weight_packed`.
            section: what `section` found.

        Raises:
            CheckpointError: the section makes no sense, does not fit the tensors, or says what is not read here.
        """


FOREIGN: Table[type[Foreign]] = Table(["secateur.foreign"], GROUP, "formats", {})
_F = TypeVar("_F", bound=type[Foreign])


def foreign(cls: _F) -> _F:
    """Register a format."""
    FOREIGN[cls.quant_method] = cls
    return cls
