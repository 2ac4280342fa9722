"""Makes the files that need torch: the LLM's folder before the runs, and the devices' probe logits.

`python -m benchmarks.chaos.files make_llm|make_logits <arguments>`, where no zygote calls them.
"""

import json
import sys
from pathlib import Path

import torch

from assets.models import load_language_model
from assets.tensors import read_tensors, tensors_to_bytes
from cotuning.adapters import adapted, lora_config
from cotuning.pretraining import make_model
from cotuning.probe_logits import probe_payload
from cotuning.tokenizer_training import train_tokenizer
from persistence.blobs import FolderBlobStore
from protocol.assignments import ModelManifest
from protocol.strategies import CoPlmsSettings
from worker.row_files import get_rows

ROWS = 24


def make_llm(arguments: list[str]) -> int:
    """Write a Llama of two layers and public rows: `<model folder> <rows file> [<hidden size>]`.

    At the default of 16 it has a few thousand parameters.
    """
    folder, rows = map(Path, arguments[:2])
    hidden_size = int(arguments[2]) if len(arguments) > 2 else 16
    texts = [f"Which number follows number {number}?\nnumber {number + 1} Instruction: Output:" for number in range(40)]
    tokenizer = train_tokenizer("bpe_digit_groups", texts, vocab_size=320, max_length=128)
    model = make_model("llama", tokenizer, hidden_size=hidden_size, layers=2, heads=2, max_length=128, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [
        {
            "id": f"public-{number}",
            "instruction": f"Which number follows number {number}?",
            "input": "",
            "output": f"number {number + 1}",
        }
        for number in range(ROWS)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


def make_logits(arguments: list[str]) -> int:
    """Write one file of logits a device, of the proxy under its adapter and some noise.

    `<blobs> <manifest sha256> <probe set sha256> <adapter sha256> <strategy as JSON> <scratch> <file> [<file> ...]`
    """
    blobs_folder, manifest_sha256, probe_sha256, adapter_sha256, strategy, scratch, *files = arguments
    blobs, folder = FolderBlobStore(blobs_folder), Path(scratch)
    settings = CoPlmsSettings.model_validate_json(strategy)
    with blobs.open(manifest_sha256) as file:
        manifest = ModelManifest.model_validate_json(file.read())
    folder.mkdir()
    for each in manifest.files:
        (folder / each.path).write_bytes(blobs.path(each.sha256).read_bytes())
    torch.set_num_threads(1)
    proxy, probe = load_language_model(folder), get_rows(blobs, probe_sha256)
    shared = read_tensors(blobs.path(adapter_sha256))[0]
    config = lora_config(proxy, **settings.proxy_lora.model_dump())
    for number, path in enumerate(files):
        noise = torch.Generator().manual_seed(number)
        moved = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for name, tensor in shared.items()}
        with adapted(proxy, config, {"shared": moved}) as lent:
            logits, metadata = probe_payload(
                lent, probe, top_k=settings.top_k, temperature=settings.temperature, max_length=64
            )
        Path(path).write_bytes(tensors_to_bytes(logits, metadata))
    return 0


if __name__ == "__main__":
    sys.exit({"make_llm": make_llm, "make_logits": make_logits}[sys.argv[1]](sys.argv[2:]))
