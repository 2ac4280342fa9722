"""`cotune pretrain`: tokenizers and base models from plain text."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from assets.corpora import read_documents
from assets.errors import DataFileError
from command_line import folders
from command_line.base_model_recipes import PRESETS, BaseModelsRecipe, preset, read_recipe
from command_line.base_models import SUMMARY_FILE, BaseModels, PretrainingText, ensure_base_models, find_base_models
from command_line.contamination_gate import without_protected_rows
from command_line.errors import BadInput
from command_line.interruption import interruption
from command_line.live_view import View, view
from command_line.output import console, print_table


def pretrain(
    *,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The models and how they are trained.")
    ] = None,
    chosen: Annotated[
        str | None, typer.Option("--preset", help=f"Instead of CONFIG.toml: {', '.join(PRESETS)}.")
    ] = None,
    corpus: Annotated[
        Path, typer.Option(help="Plain text (.txt, .gz, .xz), blank lines between documents.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="A data folder: its public rows are the pool, and none of its other rows may be read."),
    ] = None,
    pool: Annotated[
        list[Path] | None,
        typer.Option(help="Rows to mix in, in place of those of --data; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the models go; default: base_models under $COTUNE_CACHE.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, max=2, help="Models trained at a time.")] = None,
    drop_contaminated: Annotated[
        bool, typer.Option("--drop-contaminated", help="Leave out text that holds rows of --data, and say how much.")
    ] = False,
) -> None:
    """Train tokenizers and base models from plain text, and save them as Hugging Face folders with a model card.

    A model that is there already is not trained again, and one that was interrupted goes on from its last checkpoint.
    With --data, text that holds a private, validation or test row of a device is refused (exit code 1).
    """
    out_console = console()
    with interruption():
        recipe = _recipe(config, chosen, seed, processes)
        text = _text(corpus, data, pool)
        root = folders.prepare(
            out or folders.cache_folder() / "base_models",
            what="the folder of the base models",
            variable="--out" if out else "COTUNE_CACHE",
        )
        _require_links(root, recipe)
        with view(out_console) as shown:
            if data is not None:
                shown.step("Looking for rows of the data in what is to be read")
                text = without_protected_rows(text, data, recipe, drop=drop_contaminated, view=shown)
            models = _train(text, root, recipe, shown)
        _print(out_console, root, recipe, models)


def _recipe(config: Path | None, chosen: str | None, seed: int | None, processes: int | None) -> BaseModelsRecipe:
    if (config is None) == (chosen is None):
        raise BadInput(
            f"expected CONFIG.toml or --preset, got {'neither' if config is None else 'both'}",
            next_step=f"presets: {', '.join(PRESETS)}",
        )
    recipe = read_recipe(config) if config is not None else preset(chosen or "")
    recipe = replace(recipe, seed=seed) if seed is not None else recipe
    return replace(recipe, processes=processes) if processes is not None else recipe


def _text(corpus: Path, data: Path | None, pools: list[Path] | None) -> PretrainingText:
    """The files to read, after a look whether they are there and hold anything."""
    from assets.data_folders import pool_of

    chosen = tuple(pools) if pools else (pool_of(data),) if data is not None and data.is_dir() else ()
    for path in chosen:
        if not path.is_file():
            raise BadInput(f"expected a file of rows at {path}, found nothing there")
    try:
        read_documents(corpus, max_bytes=1)
    except DataFileError as error:
        raise BadInput(str(error)) from None
    return PretrainingText(corpus, chosen)


def _require_links(root: Path, recipe: BaseModelsRecipe) -> None:
    for model in recipe.models:
        link = root / model.name
        if link.exists() and not link.is_symlink():
            raise BadInput(
                f"expected {link} to be free for a link to the model, found something that is not ours",
                next_step="name another folder with --out",
            )


def _train(text: PretrainingText, root: Path, recipe: BaseModelsRecipe, shown: View) -> BaseModels:
    known = find_base_models(text, root, recipe)
    missing = sum(not each.exists() for each in known.all)
    shown.step(f"Base models: {missing} to train, {len(known.all) - missing} there already, in {root}")
    command = shlex.join(["cotune", *sys.argv[1:]])
    models = ensure_base_models(text, root, recipe, shown.progress, command=command, on_note=shown.say)
    for model, folder in zip(recipe.models, models.all, strict=True):
        _link(root / model.name, folder)
    return models


def _link(link: Path, folder: Path) -> None:
    """Point `link` at the folder beside it, whatever it pointed at before."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(link)


def _print(out: Console, root: Path, recipe: BaseModelsRecipe, models: BaseModels) -> None:
    rows = []
    for model, folder in zip(recipe.models, models.all, strict=True):
        summary = json.loads((folder / SUMMARY_FILE).read_bytes())
        last = summary["measurements"][-1] if summary["measurements"] else {}
        bits = [f"{last[kind]:.3f}" if last.get(kind) is not None else "" for kind in ("text", "responses")]
        rows.append(
            [
                str(root / model.name),
                model.architecture,
                f"{summary['parameters'] / 1e6:.2f} M",
                f"{summary['tokens']:,}",
                f"{summary['loss']:.3f}",
                *bits,
            ]
        )
    columns = ["folder", "architecture", "#parameters", "#tokens", "#loss", "#text, bits/byte", "#responses, bits/byte"]
    print_table(out, "Base models", columns, rows)
