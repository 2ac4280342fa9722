"""What this device says about itself: names and numbers, found without loading torch.

A model is described from its files: `config.json`, the headers of its safetensors and `tokenizer.json`. Code in a model
folder is never run.
"""

import json
import math
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_agent.settings import Config
from protocol.devices import DeviceProfile
from protocol.safetensors_header import HeaderError, read_header

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True)
class ModelDescription:
    """A model in an operator's words."""

    name: str
    architecture: str
    parameters: int
    tokenizer_kind: str


def build(config: Config, model: ModelDescription, num_examples: int) -> DeviceProfile:
    """Return the profile that the server is told."""
    return DeviceProfile(
        agent_version=version("cotune"),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}"[:128],
        cpu_count=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        model_name=model.name[:200],
        model_architecture=model.architecture[:64],
        model_parameters=model.parameters,
        tokenizer_kind=model.tokenizer_kind[:128],
        domain=config.device.domain,
        num_examples=num_examples,
        max_adapter_rank=config.training.max_adapter_rank,
    )


def describe_model(path_or_name: str, problems: list[str]) -> ModelDescription | None:
    """Describe a model folder or a Hugging Face hub model; on failure add a line to `problems` and return None."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return _describe_folder(folder, problems)
    if HUB_NAME.fullmatch(path_or_name):
        return _describe_hub_model(path_or_name, problems)
    problems.append(f"model {path_or_name!r}: expected a model folder or a hub name such as `org/name`; no such folder")
    return None


def _describe_folder(folder: Path, problems: list[str]) -> ModelDescription | None:
    config = _read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    tokenizer = _read_json(folder / "tokenizer.json")
    missing = [
        name
        for name, found in (
            ("config.json with model_type", config and isinstance(config.get("model_type"), str)),
            ("*.safetensors", weights),
            ("tokenizer.json", tokenizer),
        )
        if not found
    ]
    if missing or config is None or tokenizer is None:
        problems.append(f"model folder {folder}: expected {', '.join(missing)}")
        return None
    try:
        parameters = sum(_count_parameters(file) for file in weights)
    except (HeaderError, OSError) as error:
        problems.append(f"model folder {folder}: {error}")
        return None
    return ModelDescription(folder.resolve().name, config["model_type"], parameters, tokenizer_kind(tokenizer))


def _describe_hub_model(name: str, problems: list[str]) -> ModelDescription | None:
    # Late: the library takes a while to import, and most devices hold their model in a folder.
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        config = _read_json(Path(hf_hub_download(name, "config.json"))) or {}
        tokenizer = _read_json(Path(hf_hub_download(name, "tokenizer.json"))) or {}
        parameters = sum(get_safetensors_metadata(name).parameter_count.values())
    except Exception as error:  # the library raises errors of several families, of its own and of its HTTP client
        first_line = str(error).strip().partition("\n")[0]
        problems.append(f"model {name!r}: no such folder, and the hub did not give it: {first_line[:300]}")
        return None
    return ModelDescription(name, str(config.get("model_type", "unknown")), parameters, tokenizer_kind(tokenizer))


def tokenizer_kind(tokenizer: dict[str, Any]) -> str:
    """Return for example `byte-level BPE, 1024 tokens` from the contents of a `tokenizer.json`."""
    model = tokenizer.get("model") or {}
    kind = str(model.get("type", "unknown"))
    steps = json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    if '"ByteLevel"' in steps:
        kind = f"byte-level {kind}"
    elif '"Metaspace"' in steps:
        kind = f"metaspace {kind}"
    ids = set(range(len(model.get("vocab") or ()))) | {token.get("id") for token in tokenizer.get("added_tokens") or ()}
    return f"{kind}, {len(ids)} tokens"


def _count_parameters(file: Path) -> int:
    with open(file, "rb") as stream:
        header = read_header(stream, file.stat().st_size)
    return sum(math.prod(info.shape) for info in header.tensors.values())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
