"""The model card of a version: Markdown, from what the server knows. Data are said in counts, never shown."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from persistence.versions import Contributions
from protocol.runs import ModelVersion, Run, Scores, Traffic

_SNIPPET = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter = {base}, {adapter}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()

inputs = tokenizer("Which tower stands in Paris?", return_tensors="pt")
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=32)
answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. `start` is version 0."""

    run: Run
    version: ModelVersion
    start: ModelVersion
    contributions: Contributions
    traffic: Traffic


def folder_name(version: ModelVersion, adapter: str) -> str:
    """Return the folder that a packed adapter unpacks to."""
    return f"{version.run_id}-v{version.number}-{adapter}"


def model_card(facts: CardFacts) -> str:
    """Return the card. The same facts give the same text."""
    sections = (section(facts) for section in (_head, _lineage, _data, _scores, _bytes, _use, _settings))
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(facts: CardFacts) -> str:
    run, version = facts.run, facts.version
    licence = run.config.licence
    matter = [
        "---",
        f"base_model: {json.dumps(run.config.llm)}",
        "library_name: peft",
        f"license: {json.dumps(licence or 'unknown')}",
        "tags: [cotune, lora, federated]",
        "---",
    ]
    said = f"Licence: {licence}." if licence else "Licence: not stated. Set `licence` in the run's settings."
    if version.withdrawn_at is not None:
        state = f"It was promoted, and withdrawn on {version.withdrawn_at:%Y-%m-%d}: {version.withdrawn_reason}."
    elif version.promoted:
        state = "It was promoted."
    else:
        state = "It was **not promoted**: on public validation rows it was worse than its parent by over the tolerance."
    title = f"# {run.name}, version {version.number}"
    made = f"LoRA adapters co-tuned by strategy `{run.config.strategy.name}`, made on {version.created_at:%Y-%m-%d}."
    return "\n".join([*matter, "", title, "", f"{made} {state}", "", said])


def _lineage(facts: CardFacts) -> str:
    rows = [
        [
            step.number,
            "-" if step.parent is None else step.parent,
            "preparation" if step.round_number is None else f"{step.round_number}, attempt {step.attempt}",
            step.num_updates,
            step.num_late_updates,
        ]
        for step in facts.version.lineage
    ]
    table = _table(["version", "parent", "round", "updates", "of these late"], rows)
    return f"## Where it comes from\n\nRun `{facts.run.run_id}`, federation `{facts.run.federation}`.\n\n{table}"


def _data(facts: CardFacts) -> str:
    config, given = facts.run.config, facts.contributions
    lines = [
        f"- Private rows: {given.num_examples} on {given.num_devices} devices, as these said; none left them.",
        f"- Updates: {given.num_updates} over all rounds above.",
    ]
    if config.public_data is not None:
        lines.append(f"- Public rows sent to devices: {config.probe_rows}.")
        lines.append(f"- Public rows held out for validation: {config.evaluation.validation_rows}.")
    return "## Data\n\n" + "\n".join(lines)


def _scores(facts: CardFacts) -> str:
    rows = [
        [part, model, name, f"{getattr(before, name):.4g}", f"{getattr(after, name):.4g}", after.num_rows]
        for part in ("validation", "test")
        for model, before, after in _pairs(facts, part)
        for name in ("rouge_l", "exact_match", "bits_per_byte")
    ]
    if not rows:
        return ""
    head = "## Scores\n\nBefore: version 0. Rouge-L and exact match (0-100): more is better; bits a byte: less."
    return f"{head}\n\n{_table(['rows', 'model', 'measure', 'before', 'after', 'number of rows'], rows)}"


def _pairs(facts: CardFacts, part: str) -> Iterable[tuple[str, Scores, Scores]]:
    before, after = (version.metrics.get(part) or {} for version in (facts.start, facts.version))
    for model in sorted(before.keys() & after.keys()):
        yield model, Scores.model_validate(before[model]), Scores.model_validate(after[model])


def _bytes(facts: CardFacts) -> str:
    rows = [
        [direction, kind, num_bytes]
        for direction, kinds in (("up", facts.traffic.up), ("down", facts.traffic.down))
        for kind, num_bytes in kinds.items()
    ]
    if not rows:
        return ""
    return f"## Bytes\n\nOf the whole run so far, over all devices.\n\n{_table(['direction', 'kind', 'bytes'], rows)}"


def _use(facts: CardFacts) -> str:
    if facts.version.llm_adapter_sha256 is None or facts.run.config.llm is None:
        return "## Use\n\nThis strategy leaves no adapter here: what was learnt stays on the devices."
    snippet = _SNIPPET.format(
        base=json.dumps(facts.run.config.llm), adapter=json.dumps(folder_name(facts.version, "llm"))
    )
    where = f"`/v1/runs/{facts.run.run_id}/versions/{facts.version.number}/adapters/llm/package`"
    return f"## Use\n\nUnpack the tar archive from {where}, then:\n\n```python\n{snippet}```"


def _settings(facts: CardFacts) -> str:
    settings = facts.run.config.model_dump_json(indent=1, exclude={"device_ids"})
    return f"## Settings of the run\n\n```json\n{settings}\n```"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
