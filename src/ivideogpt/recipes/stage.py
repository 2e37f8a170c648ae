"""Runs one stage of a recipe: builds its module, data and trainer, resumes or skips, saves the weights."""

from __future__ import annotations

import copy
import filecmp
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from rich.console import Console
from rich.markup import escape

from ivideogpt.recipes.adapters import base_reference, find_whole_base, make_adapter, no_base
from ivideogpt.recipes.batches import SHARES, SIZES, WHOLE, check_batch, clips_of_update
from ivideogpt.recipes.checking import BASES, build_arguments, trains
from ivideogpt.recipes.classes import arguments, defaults, import_class
from ivideogpt.recipes.drafts import DraftBuilder, UnknownDraftError
from ivideogpt.recipes.fitting import check_fit, check_training, describe_changes
from ivideogpt.recipes.loggers import finish_wandb, place_wandb
from ivideogpt.recipes.parts import PartBuilder, check_initial_weights, part_arguments, several_spaces, source_folder
from ivideogpt.recipes.reading import Node
from ivideogpt.recipes.results import differences, fingerprint, read_record, save_tokenizer, write_record, write_text
from ivideogpt.recipes.trainer import build_trainer, count_processes, interrupts_raised, take_averages
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.resumable_logs import ResumableLogs
from ivideogpt.training.sharding import is_sharded, whole_state
from ivideogpt.zoo.adapter import save_adapter
from ivideogpt.zoo.changing import ActionLayerWarning
from ivideogpt.zoo.checkpoint import FILES, Parts, save_parts
from ivideogpt.zoo.folder import finish_interrupted_save
from ivideogpt.zoo.hub import copy_to
from ivideogpt.zoo.published import Published

HARMLESS = {
    "trainer": ("enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger", "profiler"),
    "data": ("num_workers", "verify"),
}
"""Settings that cannot change the weights, and so may change between two starts of a stage."""


@dataclass
class Stage:
    """A stage that is to run.

    Args:
        name: of the stage.
        config: its checked settings.
        folder: where its results go.
        seed: of the recipe.
        earlier: folders of the stages before it.
        on_change: what happens when it was begun with other settings: error, rerun or continue.
        recipe_name: for the side file.
        recipe_text: the resolved recipe, saved beside the weights.
    """

    name: str
    config: Node
    folder: Path
    seed: int
    earlier: Mapping[str, Path]
    on_change: str
    recipe_name: str
    recipe_text: str

    @property
    def trains(self) -> bool:
        """Whether the stage makes weights."""
        return trains(self._class("module"))

    @property
    def is_shared(self) -> bool:
        """Whether all processes take part in the stage: in a training, and in an evaluation on several devices."""
        return self.trains or self.processes > 1

    @cached_property
    def processes(self) -> int:
        """How many processes the trainer uses."""
        return count_processes(self.config["trainer"], f"stages.{self.name}")

    @property
    def makes_world_model(self) -> bool:
        """Whether a whole world model comes out of the stage."""
        return self.trains and "transformer" in part_arguments(self._class("module")).values()

    def run(self, console: Console) -> None:
        """Skips the stage if it is finished, else resumes or starts it."""
        settings = self._settings(self._inputs())
        record = read_record(self.folder)
        if record is not None:
            record = self._settle_changes(record, settings, console)
        if record is not None and record["state"] == "finished":
            console.print(f"[bold]{self.name}[/]: finished before, skipped", highlight=False)
            return
        record = {"state": "running", "started": _now(), **({} if record is None else {"started": record["started"]})}
        record |= {"settings": settings, "versions": _versions()}
        begin = time.monotonic()
        seed_everything(self.seed, workers=True, verbose=False)
        builder = PartBuilder(self.earlier)
        module = self.build_module(builder)
        for line in self._notes(module, builder):
            console.print(f"[bold]{self.name}[/]: {escape(line)}", highlight=False, soft_wrap=True)
        data = self._build(LightningDataModule, "data")
        check_fit(module, data, self.name)
        wanted = place_wandb(dict(self.config["trainer"]), self.folder, self.recipe_name, self.name, record["started"])
        trainer, checkpoint = build_trainer(wanted, f"stages.{self.name}", self.folder, self.seed)
        (logs,) = (callback for callback in trainer.callbacks if isinstance(callback, ResumableLogs))  # type: ignore[attr-defined]
        logs.begin = begin
        if trainer.is_global_zero:
            write_record(self.folder, record)
        if trains(type(module)):
            with interrupts_raised(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                if not logs.trained:
                    take_averages(trainer, module)
                # a kill may have come between the last checkpoint and the end of its validation
                if logs.settle(trainer) and not is_sharded(module):
                    trainer.validate(module, datamodule=data, verbose=False)
            state = whole_state(module) if is_sharded(module) else None  # all processes take part in it
            if trainer.is_global_zero:
                if state is not None:
                    builder = PartBuilder(self.earlier)
                    module = self.build_module(builder)
                    module.load_state_dict(state)
                self.save(module, builder, trainer.global_step, self.folder)
        else:
            with interrupts_raised(trainer):
                trainer.test(module, datamodule=data, verbose=False)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            record |= {"state": "finished", "finished": _now(), "seconds": round(logs.seconds, 1)}
            record["updates"] = trainer.global_step
            write_record(self.folder, record)
            metrics = MetricsCSV(self.folder).last_values()  # of earlier starts too
            metrics |= {name: float(value) for name, value in trainer.logged_metrics.items()}
            summary = {name: record[name] for name in ("started", "finished", "seconds", "updates")}
            write_text(
                self.folder / "summary.json",
                json.dumps(summary | {"metrics": dict(sorted(metrics.items()))}, indent=2) + "\n",
            )
            console.print(f"[bold]{self.name}[/]: finished in {record['seconds']} s", highlight=False)
        finish_wandb()
        trainer.strategy.barrier()

    def check(self, drafts: dict[str, Any]) -> None:
        """Finds (fetches) what the stage starts from outside of the recipe, opens its data, and tries the two together.

        So a mistake in the last stage does not wait until the others are done.

        Args:
            drafts: modules of the earlier stages that are to run, as
                :class:`ivideogpt.recipes.drafts.DraftBuilder` takes them; gets that of this stage.

        Raises:
            ValueError: if the batch does not divide by the processes, a source is not there, or something does not go
                together.
            OSError: if weights of a loss cannot be had.
        """
        if self.trains:
            check_batch(self.config, f"stages.{self.name}")
        for where, spec in self._parts().items():
            if "from" in spec and spec["from"] not in self.earlier:
                source_folder(spec, self.earlier, where)
            check_initial_weights(spec, where)
        data = self._build(LightningDataModule, "data")
        data.prepare_data()
        drafts[self.name] = None
        if not self._class("module").__module__.startswith("ivideogpt."):
            return  # somebody else's may do anything with the weights that it is given
        values = self.config["module"]["init_args"]
        base = values.get("transformer") or {}
        if values.get("lora") is not None and getattr(drafts.get(base["from"]), "lora", None) is not None:
            where = f"stages.{self.name}.module.transformer"
            raise ValueError(no_base(base, self.earlier[base["from"]], where))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ActionLayerWarning)  # said again when the stage runs
                module = self.build_module(DraftBuilder(self.earlier, drafts))
        except UnknownDraftError:
            return
        if self.trains:
            check_training(module, self.config["trainer"], self.name)
        check_fit(module, data, self.name)
        drafts[self.name] = module

    def _notes(self, module: Any, builder: PartBuilder) -> list[str]:
        """What a person should know of the model that the stage starts from."""
        loaded = builder.loaded.get("transformer")
        source = (self.config["module"]["init_args"].get("transformer") or {}).get("from")
        return [*builder.notes, *describe_changes(module, loaded, source)]

    def _sources(self) -> dict[str, Node]:
        """Parts of the module that come from somewhere, by their place in the recipe."""
        return {where: spec for where, spec in self._parts().items() if "from" in spec}

    def _parts(self) -> dict[str, Node]:
        """What the recipe says of the module's parts, by their place in it."""
        kinds, values = part_arguments(self._class("module")), self.config["module"]["init_args"]
        specs = {f"stages.{self.name}.module.{name}": values.get(name) for name in kinds}
        return {where: spec for where, spec in specs.items() if spec is not None}

    def _inputs(self) -> dict[str, str]:
        """Fingerprints of what the stage starts from, so that a change of an earlier stage is noticed."""
        sources = self._sources().items()
        return {
            where.rpartition(".")[2]: fingerprint(source_folder(spec, self.earlier, where)) for where, spec in sources
        }

    def check_unchanged(self) -> None:
        """Refuses a stage that was begun with other settings, before an earlier one takes its hours.

        Raises:
            ValueError: naming the differences, unless ``on_change`` says what to do about them.
        """
        record = read_record(self.folder)
        if record is not None and self.on_change == "error":
            self._settle_changes(record, self._known_settings(record), Console(quiet=True))

    @property
    def is_done(self) -> bool:
        """Whether the stage has been finished with these settings, as far as they are known before the others run."""
        record = read_record(self.folder)
        if record is None or record.get("state") != "finished":
            return False
        return not self._changes(record.get("settings", {}), self._known_settings(record))

    def _known_settings(self, record: Node) -> Node:
        """What decides the result, but for the inputs, which are not known before the earlier stages are done."""
        return self._settings(record.get("settings", {}).get("inputs"))

    def _settings(self, inputs: Any) -> Node:
        """Everything that decides the result, as plain data."""
        return {"seed": self.seed, **json.loads(json.dumps(self.config)), "inputs": inputs}

    def _settle_changes(self, record: Node, settings: Node, console: Console) -> Node | None:
        changes = self._changes(record.get("settings", {}), settings)
        if not changes:
            return record
        if record["state"] == "running" and not self._has_made():
            return None  # it failed before there was anything to lose
        listed = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        if self.on_change == "continue":
            console.print(f"[bold]{self.name}[/]: going on with other settings: {escape(listed)}", highlight=False)
            return {**record, "state": "running"}
        if self.on_change == "rerun":
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.previous-{number}")).exists():
                number += 1
            self.folder.rename(aside)
            console.print(
                f"[bold]{self.name}[/]: run anew, the old one is {escape(f'{aside}: {listed}')}", highlight=False
            )
            return None
        raise ValueError(
            f"stage {self.name!r} in {self.folder} was {record['state']} with other settings: {listed}. Give another "
            f"output=FOLDER, or on_change=rerun (the old stage is moved aside) or on_change=continue (from its last "
            f"checkpoint, with the new settings)"
        )

    def _has_made(self) -> bool:
        """Whether the folder holds weights, checkpoints or measurements."""
        made = [self.folder / "tokenizer", self.folder / "transformer", *self.folder.glob("*.safetensors")]
        made += [*(self.folder / "checkpoints").glob("*.ckpt"), *self.folder.glob("results.json*")]
        return any(path.exists() for path in made)

    def _changes(self, old: Node, new: Node) -> list[str]:
        """Differences that can matter.

        These are not arguments that a later version of a class brought, left at their default, nor how an update's
        clips are shared out over processes and accumulated batches, as long as they are as many.
        """
        old, new = copy.deepcopy(old), copy.deepcopy(new)
        harmless = dict(HARMLESS)
        if self.trains and BASES.keys() <= old.keys() and clips_of_update(old) == clips_of_update(new) is not None:
            for key, names in {**SHARES, "data": SIZES}.items():
                harmless[key] = (*harmless.get(key, ()), *names)
            if all(settings["trainer"].get("strategy") in WHOLE for settings in (old, new)):
                harmless["trainer"] = (*harmless["trainer"], "strategy")
        for key in BASES:
            known, values = old.get(key, {}).get("init_args", {}), new[key]["init_args"]
            for name, default in defaults(self._class(key)).items():
                if name not in known and values.get(name) == default:
                    values.pop(name, None)
        for key, names in harmless.items():
            for settings in (old, new):
                node = settings.get(key, {})
                for name in names:
                    node.get("init_args", node).pop(name, None)
        return list(differences(old, new))

    def _class(self, key: str) -> type:
        return import_class(self.config[key]["class_path"], f"stages.{self.name}.{key}", trust=True)  # checked before

    def _build(self, base: type, key: str) -> Any:
        cls = self._class(key)
        built = cls(**build_arguments(cls, self.config[key]["init_args"], f"stages.{self.name}.{key}"))
        assert isinstance(built, base)
        return built

    def build_module(self, builder: PartBuilder) -> Any:
        """The stage's module as it is before training."""
        cls, values = self._class("module"), self.config["module"]["init_args"]
        kinds = part_arguments(cls)
        if values.get("lora") is not None:
            find_whole_base(values["transformer"], self.earlier, f"stages.{self.name}.module.transformer")
        kwargs = build_arguments(cls, values, f"stages.{self.name}.module", skip=kinds)
        for argument, kind in kinds.items():
            where = f"stages.{self.name}.module.{argument}"
            kwargs[argument] = None if values.get(argument) is None else builder.build(kind, values[argument], where)
        loaded = builder.loaded.get("transformer")
        if loaded is not None:  # a fine-tuned model keeps its normalisation
            for name in ("action_mean", "action_std"):
                if name in arguments(cls)[0] and values.get(name) is None:
                    kwargs[name] = loaded.extras.get(name)
            if loaded.action_layers is not None and "action_spaces" not in arguments(cls)[0]:
                where, name = f"stages.{self.name}.module.transformer", values["transformer"]["from"]
                raise ValueError(several_spaces(where, name, loaded))
            if loaded.action_layers is not None:
                kwargs["action_spaces"] = values.get("action_spaces") or loaded.action_layers.spaces
        if "output_folder" in arguments(cls)[0] and values.get("output_folder") is None:
            kwargs["output_folder"] = self.folder
        try:
            module = cls(**kwargs)
        except ValueError as error:
            raise ValueError(f"stages.{self.name}.module: {error}") from error
        layers = getattr(module, "action_layers", None)
        if loaded is not None and loaded.action_layers is not None and layers is not None:
            layers.take(loaded.action_layers)
        return module

    def save(self, module: Any, builder: PartBuilder, updates: int, folder: Path) -> None:
        """Writes the weights that the stage makes.

        Args:
            module: trained.
            builder: that built it, and so knows what it was made from.
            updates: that it was trained for.
            folder: where they go, in the published layout.
        """
        training = {"stage": self.name, "updates": updates, "seed": self.seed}
        transformer = getattr(module, "transformer", None)
        if transformer is None:
            extras = {"recipe": self.recipe_name, "training": training}
            save_tokenizer(folder, module.tokenizer, extras, self.recipe_text)
            return
        loaded = builder.loaded.get("transformer")
        extras = {**(loaded.extras if loaded else {}), "recipe": self.recipe_name, "training": training}
        extras |= module.action_statistics
        if module.reward_head is None:
            extras.pop("reward_transform", None)
        source = (self.config["module"]["init_args"].get("transformer") or {}).get("from")
        if source is not None and source not in self.earlier and not Path(source).expanduser().is_dir():
            extras["base_model"] = source
        old = loaded.published if loaded else Published()
        if getattr(module, "lora", None) is not None:
            where, spec = f"stages.{self.name}.module", self.config["module"]["init_args"]["transformer"]
            base = base_reference(spec, self.earlier, folder, where, module.tokenizer.config.context_length)
            save_adapter(folder, make_adapter(module, {**extras, "adapter_base": base}, self.recipe_text))
            return
        layers = getattr(module, "action_layers", None)
        parts = Parts(module.tokenizer, transformer, module.reward_head, extras, old, layers)
        parts.published.recipe = self.recipe_text
        save_parts(folder, parts)


def compose_model(stage_folder: Path, output: Path) -> None:
    """Copies the world model of a stage to ``OUTPUT/model``, all files as one, unless it is there already."""
    model = output / "model"
    names = [name for name in FILES if (stage_folder / name).is_file()]
    if model.is_dir():
        finish_interrupted_save(model)
    stale = [name for name in FILES if name not in names and (model / name).is_file()]
    if stale or filecmp.cmpfiles(stage_folder, model, names, shallow=False)[0] != names:
        copy_to(stage_folder, model)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("ivideogpt", "lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
