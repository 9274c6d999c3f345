"""What the user asked for, as plain values that can be written down and read back.

Whether a method of that name exists, and whether it fits the model, is the pipeline's to check before work starts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from secateur.core.options import given_options
from secateur.errors import UsageError
from secateur.experts.kept_experts import KeptExperts
from secateur.recipes.methods import OPTIONS_KEY, with_shares
from secateur.recipes.recipe_text import DuplicateKeyError, dump, parse, read_limited
from secateur.recipes.recipe_values import SHARES, checked, differing
from secateur.shares import parse_share

#: Which tokens the statistics of an expert are of.
EXPERT_INPUTS = ("routed", "gate", "all")
#: The keys for matrices that have a row for each token; and their bits where they are left as they are, also by a search.
TABLES, UNTOUCHED = ("embeddings", "head"), 16
#: Within what a search makes one choice for all linears of experts.
SHARED_IN = ("expert", "layer")


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics are gathered on.

    Attributes:
        source: `self`, `docs`, a path, `wikitext2`, `c4`, or `hub-id[:config][:split]`.
        samples, seq_len: how many windows of how many tokens; None takes 128 × 2048 (16 × 512 for the demo model), within
            what the model's positions allow.
        expert_tokens: of a mixture of experts, how many tokens each expert sees at least: those that the router would send to
            it next, where it sends fewer; 0: none of them; None: 256, or one for every four inputs.
        expert_inputs: which tokens an expert's statistics are of: `routed` (those that the router sends to it), `gate` (the
            same, each by the weight that the router gives it), or `all`.
        expert_balance: of a mixture that writes its own text, how many windows it writes for each that is kept: the one that
            evens out how often its experts are chosen.
        seed: of whatever is drawn.
        text_field: where the text of a JSON line or table row stands.
        bos: whether every window begins with the token that the tokenizer puts before a text, where it puts one; and every
            window of text that the model writes begins as that text does.
    """

    source: str = "self"
    samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    text_field: str = "text"
    bos: bool = True
    expert_tokens: int | None = None
    expert_inputs: str = "routed"
    expert_balance: int = 1

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("the source of the calibration text is empty: name one, such as self or docs")
        for name in ("samples", "seq_len"):
            value = getattr(self, name)
            least = 2 if name == "seq_len" else 1  # one token alone has no context
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}: it must be at least {least}")
        if self.expert_tokens is not None and self.expert_tokens < 0:
            raise UsageError(f"`expert_tokens` is {self.expert_tokens}: it must be at least 0")
        if self.expert_balance < 1:
            raise UsageError(f"`expert_balance` is {self.expert_balance}: it must be at least 1")
        if self.expert_balance > 1 and self.source != "self":
            raise UsageError("`expert_balance` is for text that the model writes: leave it out, or take `source` self")
        if self.expert_inputs not in EXPERT_INPUTS:
            raise UsageError(
                f"`expert_inputs` {self.expert_inputs!r} is not known: it can be {', '.join(EXPERT_INPUTS)}"
            )


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear, where they differ; with nothing it is left alone.

    Attributes:
        sparsity: share of its weights to remove; None prunes nothing.
        bits: of its codes.
        quantize: name of the quantization method, with its own defaults, where it is another one than the recipe's.
        grid: that they are on; with neither bits nor a grid it is not quantized.
        units, groups: of a structured pattern, how many neurons it reads, or how many heads in how many groups that share keys
            and values; 0 for both linears of a block: it goes as a whole.
        unread: the share of its inputs that is not read, at each level of activation sparsity; with that alone, all else
            becomes of it what the recipe says.
    """

    sparsity: float | None = None
    bits: int | None = None
    quantize: str | None = None
    units: int | None = None
    groups: int | None = None
    grid: str | None = None
    unread: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _read_shares(self)


@dataclass(frozen=True)
class Recipe:
    """How a model is to be compressed: pruned, quantized, or both.

    Attributes:
        prune: name of the pruning method, or the method itself, such as `SparseGPT(block=64)`; the same goes for `refine`,
            `quantize` and `factorize`.
        pruning, refining, quantization, factorization: the options of each of them that are given; the others are the method's
            to choose.
        sparsity: share of weights to remove.
        pattern: `unstructured`, `N:M`, or `structured`: whole units go, and the result is a smaller dense model.
        refine: name of the mask refiner, if any.
        targets: glob patterns of the names of linears to compress; none means all inside the blocks.
        ignore: glob patterns of linears to leave alone.
        format: `auto` (by the pattern or the quantizer), or the name of a layout, or `dense`.
        dtype: of the weights written: `auto` (the source's), `bfloat16`, `float16`, `float32`.
        calibration: the text.
        quantize: name of the quantization method, if any.
        factorize: name of the method that makes weights products of two smaller matrices, if any, instead of both others.
        reconstruct: whether the weights that a pruner keeps become the best ones for its mask.
        match_dense: whether the dense model's outputs are the target, so that linears make up for what those before have lost.
        units: of a structured pattern, which kinds may go: some of `neurons` (the default), `heads` and `blocks`, with commas.
        multiple: of a structured pattern, that the number of neurons left is of; None: of 32, where the model's is.
        refit: of a structured pattern, whether the weights that read what stays make up for what goes.
        widths: of a structured pattern, `uniform` (None: that), which any tool opens, or `per-layer`: each block has its own,
            which secateur's own loader builds.
        embeddings: bits of the table of embeddings, or the name of a grid of GGUF's, or `UNTOUCHED`; None leaves it as it is,
            unless a search finds bits for it.
        head: the same of the head, where that is another matrix.
        allocation: how a total is shared between linears: `uniform`, `owl` or `search`; or `mc`, by which `target_size` is
            shared between the experts of a mixture.
        target_size: of the weight files, for which a search finds sparsities and bits: `0.35x` or `35%` of the dense model,
            bytes in words such as `100MB`, or `2.5bit` of each weight that bits are found for.
        max_perplexity_rise: the same for the smallest size at which perplexity rises by so much at most: `3%` or `0.03`.
        share_choice: of a mixture of experts, what a search makes one choice for: all linears of an `expert`, or all those of
            the experts of a `layer`; None: each linear has its own.
        activations: name of the method that says which inputs of linears are read for a token, if any.
        activation_sparsity: share of the weights that it leaves unread; None: half.
        gating: its options.
        expert_skip: of a mixture of experts, the share of each token's experts beside the first that the result leaves out when
            it runs: those that weigh least by their routers, as they do on the calibration text.
        linears: what was chosen for each linear, by name: nothing is searched then.
        drop_experts: of a mixture of experts, share of the experts of every layer to drop.
        expert_score: name of the method that says which, or the method itself; `scoring`: the options of it that are given.
        experts: which experts stay, by the module that they are in: nothing is scored then.
        low_rank: share of each linear's weights that two thin factors beside it may have, in 16 bits; None: there are none.
        rank: the same as the rank of their product.
        low_rank_method: name of the method that finds them; None: `admm` for what is pruned, else `eora`.
    """

    prune: str = ""
    sparsity: float | None = None
    pattern: str | None = None
    refine: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    format: str = "auto"
    dtype: str = "auto"
    calibration: Calibration = field(default_factory=Calibration)
    quantize: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    reconstruct: bool = False
    match_dense: bool = False
    units: str | None = None
    multiple: int | None = None
    refit: bool = True
    widths: str | None = None
    embeddings: int | str | None = None
    head: int | str | None = None
    allocation: str = "uniform"
    target_size: str | None = None
    max_perplexity_rise: str | None = None
    share_choice: str | None = None
    expert_skip: float | None = None
    linears: dict[str, Choice] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    refining: dict[str, Any] = field(default_factory=dict)
    activations: str | None = None
    activation_sparsity: float | None = None
    gating: dict[str, Any] = field(default_factory=dict)
    drop_experts: float | None = None
    expert_score: str | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, KeptExperts] = field(default_factory=dict)
    low_rank: float | None = None
    rank: int | None = None
    low_rank_method: str | None = None
    factorize: str | None = None
    factorization: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, key in OPTIONS_KEY.items():
            method = getattr(self, role)
            if method is not None and not isinstance(method, str):
                object.__setattr__(self, role, method.name)
                object.__setattr__(self, key, given_options(method))
            object.__setattr__(self, key, with_shares(getattr(self, key)))
        _read_shares(self)
        for name in TABLES:
            if str(getattr(self, name)).isdecimal():
                object.__setattr__(self, name, int(getattr(self, name)))
        rise = self.max_perplexity_rise
        if isinstance(rise, int | float):
            object.__setattr__(self, "max_perplexity_rise", repr(rise))
        if self.share_choice is not None and self.share_choice not in SHARED_IN:
            raise UsageError(f"`share_choice` {self.share_choice!r} is not known: it can be {', '.join(SHARED_IN)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them: all of them, so that a later version with other defaults reads the same."""
        content = dataclasses.asdict(self)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
        linears = {name: _given(choice) for name, choice in self.linears.items()}
        experts = {name: kept.to_dict() for name, kept in self.experts.items()}
        return {**plain, "linears": linears, "experts": experts}

    def to_yaml(self) -> str:
        """A recipe file for people, which `read` reads: what differs from the defaults."""
        content = differing(self.to_dict(), Recipe().to_dict())
        return dump(content)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe that `to_yaml` wrote, or that a person did.

        Raises:
            UsageError: it is no YAML, names a key twice, or holds no recipe.
        """
        try:
            return cls.from_dict(parse(text))
        except DuplicateKeyError as error:
            raise UsageError(f"the recipe {error}: leave one of them out") from error
        except RecursionError as error:
            raise UsageError("the recipe is none: its brackets are nested too deep") from error
        except yaml.YAMLError as error:
            raise UsageError(f"the recipe is not valid YAML: {' '.join(str(error).split())}") from error
        except ValueError as error:
            raise UsageError(f"the recipe cannot be read: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> Recipe:
        """The recipe behind plain values; what is left out keeps its default.

        Raises:
            UsageError: an unknown key or a value of the wrong type, named.
        """
        content = checked(cls, content, "recipe")
        calibration = checked(Calibration, content.pop("calibration", {}), "recipe's calibration")
        linears = content.pop("linears", {})
        if not isinstance(linears, dict) or not all(isinstance(name, str) for name in linears):
            raise UsageError("'linears' of the recipe must be a mapping of names to what is chosen for each")
        choices = {name: Choice(**checked(Choice, each, f"choice for {name}")) for name, each in linears.items()}
        experts = content.pop("experts", {})
        if not isinstance(experts, dict) or not all(isinstance(name, str) for name in experts):
            raise UsageError("'experts' of the recipe must be a mapping of modules to the experts that stay of each")
        kept = {name: KeptExperts.from_dict(each, f"choice of experts for {name}") for name, each in experts.items()}
        return cls(
            **content,
            linears=choices,
            experts=kept,
            calibration=Calibration(**calibration),
        )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a YAML (or JSON) file, or in the manifest of a checkpoint.

        Raises:
            UsageError: the file cannot be read or holds no recipe, or names a key twice.
        """
        try:
            content = parse(read_limited(path))
        except RecursionError as error:
            raise UsageError(f"recipe {path} is not a recipe: its brackets are nested too deep") from error
        except DuplicateKeyError as error:
            raise UsageError(f"recipe {path} {error}: leave one of them out") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"recipe {path} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
            content = content["recipe"]
            # A run of a version that knew nothing of `bos` is repeated as it was.
            if isinstance(content.get("calibration"), dict):
                content["calibration"].setdefault("bos", False)
        try:
            return cls.from_dict(content)
        except UsageError as error:
            raise UsageError(f"recipe {path}: {error}") from error


def _read_shares(options: Choice | Recipe) -> None:
    """Put numbers in the place of shares that were given as text."""
    for name in SHARES:
        value = getattr(options, name, None)
        if isinstance(value, str):
            object.__setattr__(options, name, parse_share(value, f"`{name}`"))


def _given(options: Choice) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
