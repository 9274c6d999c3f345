"""The matrices of a model that have a row for each token of its vocabulary: the table of embeddings, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.model.structure import shared_parameters

#: What recipes call them, too.
EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True)
class Table:
    """A matrix `[V, I]` with a row for each token.

    Attributes:
        role: `EMBEDDINGS`, or `HEAD` for one that is no table of embeddings.
        name: of its module.
        twins: names of weights of other modules that are the same tensor: that of a tied head.
    """

    role: str
    name: str
    twins: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.name}.weight"


def find_tables(model: Any) -> dict[str, Table]:
    """The tables of a causal language model whose rows and products can be had of codes, by their roles.

    Where the head reads the table of embeddings, that is the only one.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    shared = shared_parameters(model)
    found = {}
    # Rows of a table with a `max_norm` are changed as they are read.
    if isinstance(embeddings, nn.Embedding) and embeddings.max_norm is None:
        weight = f"{names[id(embeddings)]}.weight"
        twins = tuple(name for name in shared.get(weight, ()) if name != weight)
        readers = {name.rpartition(".")[0] for name in twins}
        if readers <= {names.get(id(head))} and (not readers or type(head) is nn.Linear):
            found[EMBEDDINGS] = Table(EMBEDDINGS, names[id(embeddings)], twins)
    if type(head) is nn.Linear and f"{names[id(head)]}.weight" not in shared:
        found[HEAD] = Table(HEAD, names[id(head)])
    return found


def is_tied(model: Any) -> bool:
    """Whether the head reads the table of embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", head)
