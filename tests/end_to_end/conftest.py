"""One small cloud with three agents for all tests of this folder; each test creates runs of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.small_cloud import SmallCloud, write_rows

DEVICES = 3
SECRET_WORDS = ("abalone", "bramble", "cinnamon")
"""One a device, in each of its private rows and nowhere else."""


def rows(prefix: str, count: int, word: str) -> list[dict[str, str]]:
    return [
        {
            "id": f"{prefix}-{number}",
            "instruction": f"Which number follows {word} {number}?",
            "input": "",
            "output": f"{word} {number + 1}",
        }
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    files = {f"device-{index}": rows(f"d{index}", 12, word) for index, word in enumerate(SECRET_WORDS)}
    files |= {"public": rows("public", 24, "number"), "test": rows("test", 8, "figure")}
    return {name: write_rows(folder / f"{name}.jsonl", content) for name, content in files.items()}


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An LLM and three SLMs, of four architectures and four tokenizers."""
    from cotuning.pretraining import make_model
    from cotuning.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("models")
    texts = [row["instruction"] + "\n" + row["output"] for row in rows("t", 40, "number")]
    texts += [f"{word} figure 0123456789 Instruction: Output:" for word in SECRET_WORDS]
    made = {}
    for name, architecture, tokenizer_kind, vocabulary, layers in (
        ("llm", "llama", "bpe_digit_groups", 320, 2),
        ("slm-0", "gpt2", "bpe_whole_numbers", 300, 1),
        ("slm-1", "qwen3", "bpe_single_digits", 310, 1),
        ("slm-2", "bloom", "unigram", 330, 1),
    ):
        tokenizer = train_tokenizer(tokenizer_kind, texts, vocab_size=vocabulary, max_length=128)
        model = make_model(architecture, tokenizer, hidden_size=16, layers=layers, heads=2, max_length=128, seed=0)
        made[name] = folder / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="package")  # its processes end before the other folders' tests
def cloud(
    tmp_path_factory: pytest.TempPathFactory, small_models: dict[str, Path], small_data: dict[str, Path]
) -> Iterator[SmallCloud]:
    with SmallCloud(tmp_path_factory.mktemp("cloud"), small_models, small_data) as cloud:
        cloud.start_agents(DEVICES)
        yield cloud
