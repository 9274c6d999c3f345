"""`export` to DeciLM's form, also called Nemotron-NAS: a Llama whose blocks differ, which vLLM and llama.cpp's converter read.

Of each block the config's `block_configs` says how many query heads share a key, or that it has no attention (`no_op`), and how
wide its MLP is, as a multiple of the hidden size, or that it has none. Query heads are as many everywhere, and together as
large as the hidden size; neurons go by 256: what a block lacks is filled up with zeros, which change nothing.

K: groups of query heads that share a key, H: query heads of a group, D: features of a head, I: input features, O: output
features, N: neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.folder.writer import ShardWriter, assemble, write_json
from secateur.model.dialects import in_all_dialects, set_dtype
from secateur.model.source import SECTIONS, Source
from secateur.model.structure import find_blocks
from secateur.model.weights import ModelWeights, converted

DECILM = "decilm"
#: Families that compute as Llama does.
_FAMILIES = ("llama", "mistral")
_WHOLE = 256
_CODE = "configuration_decilm"
# vLLM reads what `block_configs` says as attributes.
_CONFIGURATION = '''"""The configuration of a DeciLM model: a Llama whose blocks differ, as `block_configs` says of each."""

from transformers import LlamaConfig


class Part(dict):
    """What is said of a block, or of a part of one: its keys are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **options):
        super().__init__(**options)
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
'''


@dataclass(frozen=True)
class _Block:
    """A block, as DeciLM has it.

    Attributes:
        name: of it.
        heads, keys: of its attention: query heads, and groups of them that share keys; 0: it has none.
        neurons: of its MLP; 0: it has none.
        all_heads: of every attention, as they are written.
        size: features of a head.
    """

    name: str
    heads: int
    keys: int
    neurons: int
    all_heads: int
    size: int

    @property
    def written_keys(self) -> int:
        """The least number of groups that can hold those of this block."""
        each = self.heads // self.keys
        return next(
            count
            for count in range(self.keys, self.all_heads + 1)
            if self.all_heads % count == 0 and self.all_heads // count >= each
        )

    @property
    def written_neurons(self) -> int:
        return math.ceil(self.neurons / _WHOLE) * _WHOLE

    def config(self, hidden: int) -> dict[str, Any]:
        """What `block_configs` says of it."""
        attention: dict[str, Any] = {
            "n_heads_in_group": self.all_heads // self.written_keys if self.heads else None,
            "no_op": not self.heads,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        }
        # Readers take the whole part of 2/3 of it times the hidden size, and the next multiple of 256.
        ffn: dict[str, Any] = {
            "ffn_mult": 3 * self.written_neurons / (2 * hidden) if self.neurons else None,
            "no_op": not self.neurons,
            "replace_with_linear": False,
            "sparsify": None,
        }
        return {"attention": attention, "ffn": ffn}

    def written(self, leaf: str, tensor: Tensor) -> Tensor | None:
        """A parameter, by its name within the block, filled up with zeros; None where there is no place for it."""
        part = leaf.partition(".")[0]
        if not (self.heads if part in ("self_attn", "input_layernorm") else self.neurons):
            if leaf.endswith("bias") and tensor.count_nonzero():
                raise UsageError(
                    f"{self.name}.{leaf} is all that is left of its module, and DeciLM has no place for it: give `to` secateur"
                )
            return None
        if part == "mlp":
            return self._neurons(leaf, tensor)
        return self._heads(leaf, tensor) if part == "self_attn" else tensor

    def _neurons(self, leaf: str, tensor: Tensor) -> Tensor:
        if "down_proj" in leaf:
            return tensor if tensor.ndim == 1 else _filled(tensor, (len(tensor), self.written_neurons))
        return _filled(tensor, (self.written_neurons, *tensor.shape[1:]))

    def _heads(self, leaf: str, tensor: Tensor) -> Tensor:
        keys, each = self.written_keys, self.all_heads // self.written_keys
        own = self.heads // self.keys
        if "o_proj" in leaf:
            if tensor.ndim == 1:
                return tensor
            x_OKHD = tensor.view(-1, self.keys, own, self.size)
            return _filled(x_OKHD, (len(tensor), keys, each, self.size)).flatten(1)
        if "q_proj" in leaf:
            x_KHDI = tensor.view(self.keys, own, self.size, *tensor.shape[1:])
            return _filled(x_KHDI, (keys, each, *x_KHDI.shape[2:])).flatten(0, 2)
        x_KDI = tensor.view(self.keys, self.size, *tensor.shape[1:])
        return _filled(x_KDI, (keys, *x_KDI.shape[1:])).flatten(0, 1)


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    found = tensor.new_zeros(shape)
    found[tuple(slice(size) for size in tensor.shape)] = tensor
    return found


def write_decilm(source: Source, skeleton: nn.Module, folder: Path) -> list[str]:
    """Write weights and config.

    Args:
        source: the model.
        skeleton: of it.
        folder: where to.

    Returns:
        What a user should know.

    Raises:
        UsageError: the model is none that DeciLM's form can say.
    """
    _check(source)
    weights = ModelWeights(source, skeleton)
    config = source.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    blocks = {
        name: _block(name, block, heads, hidden // heads) for name, block in find_blocks(skeleton).modules.items()
    }
    writer = ShardWriter(folder)
    before = after = 0
    for name in skeleton.state_dict():
        if name not in weights:
            continue
        tensor = weights[name]
        before += tensor.numel()
        owner = next((each for each in blocks if name.startswith(f"{each}.")), None)
        written = tensor if owner is None else blocks[owner].written(name.removeprefix(f"{owner}."), tensor)
        if written is not None:
            after += written.numel()
            writer.add(name, converted(name, written, None, ""))
    writer.flush()
    assemble(writer.files, folder, folder)
    _write_config(source, folder, list(blocks.values()), weights.untied)
    notes = [
        "vLLM opens it where it trusts a few lines of configuration, and llama.cpp's converter as it is; "
        f"secateur and transformers open {source.name} instead"
    ]
    if after > before:
        notes.append(
            f"{after / before - 1:.1%} of zeros were added, for DeciLM has {heads} query heads in every attention, and neurons "
            f"by {_WHOLE}: with `multiple` {_WHOLE}, and heads that go as whole attentions, there are none"
        )
    return notes


def _check(source: Source) -> None:
    config = source.config
    if config.model_type not in _FAMILIES or getattr(config, "sliding_window", None) is not None:
        raise UsageError(
            f"{source.name} cannot be written as {DECILM}: that is for models that compute as Llama does, of type "
            f"{' or '.join(_FAMILIES)} without a sliding window, and this one is of type {config.model_type!r}"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size * config.num_attention_heads != config.hidden_size:
        raise UsageError(
            f"{source.name} cannot be written as {DECILM}: its {config.num_attention_heads} heads of {size} features do not "
            f"make the hidden size {config.hidden_size}, and DeciLM's do"
        )


def _block(name: str, block: nn.Module, heads: int, size: int) -> _Block:
    shapes = {leaf: tuple(parameter.shape) for leaf, parameter in block.named_parameters()}
    own = shapes["self_attn.o_proj.weight"][1] // size
    keys = shapes["self_attn.k_proj.weight"][0] // size if own else 0
    return _Block(name, own, keys, shapes["mlp.down_proj.weight"][1], heads, size)


def _write_config(source: Source, folder: Path, blocks: list[_Block], untied: bool) -> None:
    content: dict[str, Any] = in_all_dialects(source.config)
    for key in SECTIONS:
        content.pop(key, None)
    set_dtype(content, None, source.dtype)
    hidden = source.config.hidden_size
    content |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{_CODE}.DeciLMConfig"},
        "intermediate_size": max([_WHOLE, *(block.written_neurons for block in blocks)]),
        "num_key_value_heads": max([1, *(block.written_keys for block in blocks if block.heads)]),
        "block_configs": [block.config(hidden) for block in blocks],
    }
    if untied:
        content["tie_word_embeddings"] = False
    write_json(folder / "config.json", content)
    (folder / f"{_CODE}.py").write_text(_CONFIGURATION, encoding="utf-8")
