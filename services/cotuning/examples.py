"""A row of data, and the prompt that a model reads for it. Imports no torch: counting rows must stay cheap."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """An instruction, what it is about, and the answer.

    Attributes:
        id: names the row in its file; not used in training.
        instruction: what to do.
        input: what to do it to, often empty.
        output: the answer that is trained on.
        task: a kind of question, for tables; may be empty.
        references: accepted answers at evaluation, `(output,)` if empty.
    """

    id: str
    instruction: str
    input: str
    output: str
    task: str = ""
    references: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every accepted answer."""
        return self.references or (self.output,)


def render_prompt(tokenizer: Any, example: Example) -> str:
    """The text that comes before the answer: the tokenizer's own chat template if it has one, else a plain one.

    The plain one ends in a newline, so that an answer starts on a token boundary with every tokenizer.
    """
    if getattr(tokenizer, "chat_template", None):
        question = f"{example.instruction}\n{example.input}" if example.input else example.instruction
        messages = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    middle = f"Input: {example.input}\n" if example.input else ""
    return f"Instruction: {example.instruction}\n{middle}Output:\n"


def rows_digest(examples: Iterable[Example]) -> str:
    """SHA-256 over what models read of the rows, in order, hex: names a probe set, however its file was written."""
    digest = hashlib.sha256(b"cotune-rows-1\n")
    for example in examples:
        line = json.dumps([example.instruction, example.input, example.output])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
