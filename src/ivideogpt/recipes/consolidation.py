"""Makes a model of a training checkpoint, be it one file or the shards of several processes."""

from __future__ import annotations

import os
from pathlib import Path

from ivideogpt.recipes.parts import PartBuilder
from ivideogpt.recipes.results import RECORD, read_record
from ivideogpt.recipes.stage import Stage
from ivideogpt.training.checkpoints import checkpoint_files, latest_checkpoint, read_checkpoint


def consolidate(
    stage_folder: str | os.PathLike[str], out: str | os.PathLike[str], update: int | None = None
) -> tuple[Path, int]:
    """Writes the weights of a stage's checkpoint in the published layout, whether the stage is finished or not.

    Args:
        stage_folder: ``OUTPUT/STAGE`` of a recipe that was run; the stages that it starts from lie beside it.
        out: folder of the model.
        update: which checkpoint; None takes the newest that loads.

    Returns:
        The folder, and the number of updates that the weights were trained for.

    Raises:
        ValueError: if there is no such checkpoint, or it does not fit.
    """
    folder, out = Path(stage_folder), Path(out)
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} is not the folder of a stage: it has no {RECORD}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder")
    found = checkpoint_files(folder / "checkpoints")
    if update is None:
        newest = latest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise ValueError(f"{folder / 'checkpoints'} holds no checkpoint that loads")
        update, path = newest
    elif update not in dict(found):
        raise ValueError(f"there is no checkpoint of update {update}, but of {sorted(dict(found)) or 'none'}")
    else:
        path = dict(found)[update]
    settings = record["settings"]
    recipe = folder.parent / "recipe.yaml"
    stage = Stage(
        name=folder.name,
        config={key: settings[key] for key in ("module", "data", "trainer")},
        folder=folder,
        seed=settings["seed"],
        earlier={other.parent.name: other.parent for other in folder.parent.glob(f"*/{RECORD}")},
        on_change="error",
        recipe_name=record.get("recipe", folder.parent.name),
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )
    builder = PartBuilder(stage.earlier)
    module = stage.build_module(builder)
    state = read_checkpoint(path)
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {path} does not fit the stage: {str(error).splitlines()[-1]}") from error
    stage.save(module, builder, update, out)
    return out, update
