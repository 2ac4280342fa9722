"""The base models of a demo, and what they are in a person's words."""

from dataclasses import dataclass
from pathlib import Path

from command_line.base_models import demo_text, ensure_base_models, find_base_models
from command_line.demo_data import DemoData
from command_line.demo_settings import base_models_recipe
from command_line.errors import ProcessFailed
from command_line.live_view import View


@dataclass(frozen=True)
class ModelFacts:
    """One model folder."""

    folder: Path
    architecture: str
    parameters: int
    tokenizer: str
    weight_bytes: int
    """Size of the weights' files: what sending the model would cost."""


@dataclass(frozen=True)
class DemoModels:
    """The LLM, the proxy before its distillation, and one SLM a device; more devices than SLMs share them."""

    llm: ModelFacts
    proxy: ModelFacts
    slms: tuple[ModelFacts, ...]

    def slm(self, index: int) -> ModelFacts:
        """The SLM of the device of that index."""
        return self.slms[index % len(self.slms)]


def prepare_models(data: DemoData, cache: Path, view: View) -> DemoModels:
    """Build the base models that the cache lacks, with a bar for each, and return them all."""
    recipe = base_models_recipe(given=data.given)
    text, root = demo_text(data.folder), cache / "base_models"
    known = find_base_models(text, root, recipe)
    if missing := [each for each in known.all if not each.exists()]:
        view.say(f"building {len(missing)} base models; they are kept in {cache}")
    models = ensure_base_models(text, root, recipe, view.progress)
    assert models.proxy is not None  # each of the demo's recipes has one
    return DemoModels(facts(models.llm), facts(models.proxy), tuple(facts(each) for each in models.slms))


def facts(folder: Path) -> ModelFacts:
    """Describe a model folder from its files, without loading it."""
    from edge_agent.profile import describe_model

    problems: list[str] = []
    found = describe_model(str(folder), problems)
    if found is None:
        raise ProcessFailed(
            f"a base model in the cache is not whole: {'; '.join(problems)}", next_step=f"remove {folder} and try again"
        )
    size = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    return ModelFacts(folder, found.architecture, found.parameters, found.tokenizer_kind, size)
