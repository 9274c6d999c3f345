"""What many tests share: tiny random models of many families, a tokenizer and text for them, and a cache of their own."""

import gc
import os
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import hypothesis
import pytest
import random_examples
import smollm2
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur import cli

VOCABULARY = 320
HIDDEN = 32
INNER = 64
POSITIONS = 64

# Groups of linears that read the same input, in the order in which they are reached.
_LLAMA_ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
_GATED = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
_LLAMA = [*_LLAMA_ATTENTION, *_GATED]
_PARALLEL_LLAMA = [
    [*_LLAMA_ATTENTION[0], *_GATED[0]],
    *_LLAMA_ATTENTION[1:],
    *_GATED[1:],
]
_NEOX = [
    [f"{part}"] for part in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
]
_FALCON_PARALLEL = [
    ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
    ["self_attention.dense"],
    ["mlp.dense_4h_to_h"],
]
_FALCON_SERIAL = [
    ["self_attention.query_key_value"],
    ["self_attention.dense"],
    ["mlp.dense_h_to_4h"],
    ["mlp.dense_4h_to_h"],
]

_LLAMA_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": None,
}
_LAYERS = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A family of models at its smallest.

    Attributes:
        config: name of its config class.
        options: of that class, besides the vocabulary and the special tokens.
        prefix: name of its list of blocks.
        groups: the linears of one block by common input, in the order of a forward pass.
    """

    config: str
    options: dict[str, Any]
    prefix: str = "model.layers"
    groups: list[list[str]] = field(default_factory=lambda: _LLAMA)

    @property
    def linears(self) -> set[str]:
        return {name for group in self.groups for name in group}


def _llama_like(config: str, groups: list[list[str]] = _LLAMA, **options: Any) -> Family:
    return Family(config, {**_LLAMA_SIZES, **options}, groups=groups)


FAMILIES = {
    "llama": _llama_like("LlamaConfig", tie_word_embeddings=False),
    "llama-tied": _llama_like("LlamaConfig", tie_word_embeddings=True),
    "mistral": _llama_like("MistralConfig", sliding_window=8),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen3": _llama_like("Qwen3Config", head_dim=16, tie_word_embeddings=True),
    "gemma": _llama_like("GemmaConfig", head_dim=8),
    "gemma2": _llama_like("Gemma2Config", head_dim=8, sliding_window=8, layer_types=_LAYERS),
    "gemma3": _llama_like("Gemma3TextConfig", head_dim=8, sliding_window=8, layer_types=_LAYERS),
    "phi3": _llama_like(
        "Phi3Config",
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        original_max_position_embeddings=POSITIONS,
    ),
    "starcoder2": _llama_like("Starcoder2Config", [*_LLAMA_ATTENTION, ["mlp.c_fc"], ["mlp.c_proj"]], use_bias=True),
    "cohere": _llama_like("CohereConfig", _PARALLEL_LLAMA),
    "olmo2": _llama_like("Olmo2Config"),
    "opt": Family(
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
        },
        "model.decoder.layers",
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.out_proj"],
            ["fc1"],
            ["fc2"],
        ],
    ),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
        "transformer.h",
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    ),
    "gpt-neox": Family(
        "GPTNeoXConfig",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
        },
        "gpt_neox.layers",
        _NEOX,
    ),
    "falcon": Family(
        "FalconConfig",
        {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4},
        "transformer.h",
        _FALCON_PARALLEL,
    ),
    "falcon-new": Family(
        "FalconConfig",
        {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
        "transformer.h",
        _FALCON_SERIAL,
    ),
    "bloom": Family("BloomConfig", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}, "transformer.h", _FALCON_SERIAL),
    "mpt": Family(
        "MptConfig",
        {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": POSITIONS},
        "transformer.blocks",
        [["attn.Wqkv"], ["attn.out_proj"], ["ffn.up_proj"], ["ffn.down_proj"]],
    ),
}


# For tests that would pass and fail for these as for others of their kind.
EVERY_KIND = [
    pytest.param(
        name,
        marks=[pytest.mark.slow]
        * (name in ("mistral", "qwen2", "gemma", "gemma2", "starcoder2", "olmo2", "falcon-new", "bloom")),
    )
    for name in FAMILIES
]

# What makes a model of each layout.
PACKED: dict[str, dict[str, Any]] = {
    "bitmap": {"prune": "magnitude", "sparsity": 0.5},
    "nm": {"prune": "magnitude", "pattern": "2:4"},
    "packed-int": {"quantize": "rtn", "bits": 4, "group_size": 16},
    "spqr": {"quantize": "spqr", "bits": 3, "group_size": 16, "outlier_share": 0.02},
    "codebook": {"quantize": "squeezellm", "bits": 3},
    "trellis": {"quantize": "trellis", "bits": 3},
    "ternary-dict": {"quantize": "ternary"},
    "sparse-int": {"prune": "magnitude", "sparsity": 0.5, "quantize": "rtn", "bits": 4, "group_size": 16},
    "low-rank": {"prune": "magnitude", "pattern": "2:4", "rank": 2},
}


# The files that take longest, the longest first.
LONGEST = (
    "test_smollm2", "test_gate_smollm2", "test_memory", "test_mixtures", "test_resume", "test_quantize_pipeline",
    "test_recipes", "test_sweep_command", "test_allocation", "test_hostile", "test_walk", "test_ranks", "test_saving",
    "test_verify", "test_triton", "test_per_layer", "test_match_dense", "test_fp8_blocks", "test_dialects", "test_quant",
)  # fmt: skip
# How long an example takes is the machine's to say, which may be busy.
hypothesis.settings.register_profile("secateur", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("secateur")


def pytest_configure(config: pytest.Config) -> None:
    """One thread per operation: more only get in each other's way at these sizes. And no test is cut off from power."""
    torch.set_num_threads(1)
    if not config.option.markexpr:
        random_examples.share = 1
    os.fsync = lambda handle: None  # what is written to a disk to be there after that takes a fifth of a small run


def pytest_collection_finish() -> None:
    """What is there by now stays, and is not looked through for garbage again and again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Grids are thinned out. The longest files come first: where several processes share the tests, none is left alone with
    one of them.
    """
    places: dict[tuple[Any, int], dict[str, int]] = defaultdict(dict)
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is not None and isinstance(item, pytest.Function):
            # One name for each list of values: `callspec.indices` has the number of the case for all of them.
            named = [(places[item.function, i], name) for i, name in enumerate(item.callspec._idlist)]
            if sum(values.setdefault(name, len(values)) for values, name in named) % mark.args[0]:
                item.add_marker(pytest.mark.slow)
    turn = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep sampled text out of the user's cache, and the hub out of everything."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def dense_backend() -> Iterator[None]:
    """Weights are unpacked as models are loaded: for tests that look at them."""
    with secateur.backend("dense"):
        yield


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `bench` goes over is a few megabytes, not what the cache of the machine would ask for."""
    for module in ("bench", "timing"):
        monkeypatch.setattr(f"secateur.speed.{module}.cache_bytes", lambda device: 2**18)


@pytest.fixture(scope="module")
def repository() -> Iterator[Path]:
    """The root of the repository, where the tests of the module run: `smollm2.py` names text below it."""
    before = Path.cwd()
    os.chdir(smollm2.ROOT)
    yield smollm2.ROOT
    os.chdir(before)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> smollm2.Shared:
    """`shared("name", make)`: what the first process of the test run that needs it makes, for all. Not to be written to."""
    base = tmp_path_factory.getbasetemp()
    # Each process of xdist has a folder in that of the run.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def find(name: str, make: Callable[[Path], object]) -> Path:
        found = root / name
        with FileLock(root / f"{name}.lock"):
            if not found.exists():
                unfinished = root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(found)
        return found

    return find


@pytest.fixture(scope="session")
def compressed(shared: smollm2.Shared) -> smollm2.Compressed:
    """`compressed("wanda")`: SmolLM2 by that recipe of `smollm2.py`, and the report. Not to be written to."""
    return lambda method: smollm2.compressed(shared, method)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: `code, stdout, stderr = says("compress", …)`."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, args)])
        capfd.readouterr()
        code = cli.run(cli.app)
        return code, *capfd.readouterr()

    return run


def prose(words: int, seed: int = 0) -> str:
    """Words in no order, with some punctuation."""
    draw = random.Random(seed)
    vocabulary = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "s", "ll", "ck")]
    return "".join(draw.choice(vocabulary) + draw.choice([" "] * 8 + [", ", ".\n"]) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens that begins a text with `<s>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([prose(2000)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def text_file(shared: smollm2.Shared) -> Path:
    """Calibration text of a good ten thousand tokens."""
    return shared("text.txt", lambda path: path.write_text(prose(6000, seed=1), encoding="utf-8"))


def config_of(family: str, **options: Any) -> Any:
    """The config of a family at its smallest, with other options where they are given."""
    found = FAMILIES[family]
    return getattr(transformers, found.config)(
        **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, **found.options, **options}
    )


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """Build a random model and save it as a folder: `build(folder, config, dtype=…, shard=…)`."""

    def make(folder: Path, config: Any, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms are not to be zeros and ones, nor blocks to add next to nothing.
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_of(shared: smollm2.Shared, build: MakeModel) -> MakeModel:
    """`model_of("llama")`: the folder of that family's tiny model. Shared by all tests: not to be written to."""

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        name = f"{family}-{crc32(repr((dtype, sorted(options.items()))).encode()):08x}"
        return shared(name, lambda folder: build(folder / "model", config_of(family, **options), dtype)) / "model"

    return make


@pytest.fixture
def own_model(model_of: MakeModel, tmp_path: Path) -> MakeModel:
    """The same as a copy that the test may spoil."""

    def make(family: str, **options: Any) -> Path:
        return Path(shutil.copytree(model_of(family, **options), tmp_path / f"own-{family}"))

    return make


@pytest.fixture(scope="session")
def family() -> dict[str, Family]:
    """All families by name."""
    return FAMILIES


@pytest.fixture(scope="session")
def packed_of(shared: smollm2.Shared, model_of: MakeModel, text_file: Path) -> MakeModel:
    """`packed_of("llama", "bitmap", torch.bfloat16)`: that family's tiny model, compressed. Not to be written to."""

    def make(family: str, layout: str, dtype: torch.dtype = torch.float32) -> Path:
        options = dict(PACKED[layout])
        quantize = {k: options.pop(k) for k in list(options) if k in ("bits", "group_size", "outlier_share")}
        recipe = secateur.Recipe(
            **options,
            quantization={**quantize},
            calibration=secateur.Calibration(source=str(text_file), samples=8, seq_len=32),
        )
        model = str(model_of(family, dtype=dtype))
        folder = shared(
            f"{family}-{layout}-{dtype}", lambda folder: secateur.compress(model, folder / "packed", recipe)
        )
        return folder / "packed"

    return make
