"""What transformers reads of the `quantization_config` of a secateur folder."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.formats.stored_weights import QUANT_METHOD, parse_quantization_config, quantization_config
from secateur.gates.section import SECTION, parse_section
from secateur.mixture.skipping import KEY as SKIP
from secateur.mixture.skipping import parse_skip
from secateur.plugin.block_widths import KEY, parse_widths, with_widths


class SecateurConfig(QuantizationConfigMixin):
    """The `quantization_config` of a secateur folder: a layout version, layouts by patterns of module names, and more."""

    def __init__(
        self,
        layout_version: Any = None,
        modules: Any = None,
        widths: Any = None,
        activations: Any = None,
        expert_skip: Any = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.layout_version = layout_version
        self.modules = modules
        self.widths = parse_widths({KEY: widths})
        self.activations = parse_section(activations)
        self.expert_skip = parse_skip({SKIP: expert_skip})
        self.entries = parse_quantization_config({"layout_version": layout_version, "modules": modules})

    def to_dict(self) -> dict[str, Any]:
        section = quantization_config(self.modules)
        if self.activations is not None:
            section[SECTION] = self.activations.to_dict()
        if self.expert_skip is not None:
            section[SKIP] = self.expert_skip
        return with_widths(section, self.widths)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
