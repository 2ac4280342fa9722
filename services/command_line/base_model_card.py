"""The model card of a base model: what it was made of, how, and how well it reads what it never saw."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from command_line.base_model_texts import Texts

if TYPE_CHECKING:
    from command_line.base_model_training import Trained

PACKAGES = ("cotune", "torch", "transformers", "tokenizers")
_SHOWN_MEASUREMENTS = 20


def card(
    trained: "Trained",
    recipe: Mapping[str, Any],
    shared: Mapping[str, Any],
    texts: Texts,
    *,
    files: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    """The card as Markdown.

    Args:
        trained: The model and the numbers of its training.
        recipe: Fields of its `ModelRecipe`.
        shared: Fields of its `BaseModelsRecipe`.
        texts: What was read.
        files: Name, bytes and SHA-256 of each file.
        command: What was asked for; empty if nobody typed a command.
    """
    settings = [f"| {name} | {value} |" for name, value in {**recipe, **shared}.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            f"# {recipe['name']}",
            "",
            f"A causal language model of {trained.parameters:,} parameters ({recipe['architecture']}, "
            f"{recipe['tokenizer']} tokenizer of {len(trained.tokenizer):,} entries), pretrained from nothing.",
            "It is a stand-in for experiments: small, and not safe to show to people.",
            "",
            "## Data",
            "",
            "| file | bytes | sha256 |",
            "|---|---|---|",
            *(f"| {each['file']} | {each['bytes']:,} | `{each['sha256']}` |" for each in files),
            "",
            f"Trained on {len(texts.documents):,} documents and {len(texts.rows):,} rows of these. Held out: "
            f"{len(texts.held_out_documents):,} documents, {len(texts.held_out_rows):,} rows.",
            "",
            "## Training",
            "",
            f"{recipe['steps']:,} steps, {trained.tokens:,} tokens seen; loss at the end {trained.loss:.4f} nats a "
            "token (mean of the last tenth of the steps; tokens of prompts count "
            f"{shared['prompt_weight']:g}). On {trained.device}, {shared['threads']} CPU thread(s), "
            f"{shared['precision']}, seed {shared['seed']}.",
            "",
            *_measurements(trained),
            "## How to make it again",
            "",
            *([f"    {command}", ""] if command else []),
            f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
            "",
            "| setting | value |",
            "|---|---|",
            *settings,
            "",
        ]
    )


def _measurements(trained: "Trained") -> list[str]:
    if not trained.measurements:
        return []
    every = max(1, -(-len(trained.measurements) // _SHOWN_MEASUREMENTS))
    # The last one is always shown.
    shown = trained.measurements[::-1][::every][::-1]
    return [
        "Bits a byte on what was held out (running text with its ends; responses given their prompts):",
        "",
        "| step | tokens | text | responses |",
        "|---|---|---|---|",
        *(f"| {each.step:,} | {each.tokens:,} | {_bits(each.text)} | {_bits(each.responses)} |" for each in shown),
        "",
    ]


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
