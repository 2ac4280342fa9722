"""Whose tokens a text is cut into: all that encoding and alignment need to know of a model.

A party that receives another's logits knows the other's tokenizer, not its weights.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cotuning.token_tables import TokenTable, token_table


class Reads(Protocol):
    """What a `Vocabulary` and a `LanguageModel` have in common."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    @property
    def table(self) -> TokenTable:
        """Its table."""

    @property
    def device(self) -> torch.device:
        """Where encoded rows are wanted."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer without a model.

    Attributes:
        tokenizer: a transformers tokenizer.
        table: `token_table(tokenizer)`, built once.
        device: of what is encoded.
    """

    tokenizer: Any
    table: TokenTable
    device: torch.device

    @classmethod
    def of(cls, tokenizer: Any, device: torch.device | str = "cpu") -> "Vocabulary":
        """The vocabulary of a tokenizer.

        Raises:
            ValueError: it names no end token.
        """
        return cls(tokenizer, token_table(tokenizer), torch.device(device))
