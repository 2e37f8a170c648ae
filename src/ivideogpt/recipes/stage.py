"""Runs one stage of a recipe: builds its module, data and trainer, resumes or skips, saves the weights."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from ivideogpt.recipes.classes import arguments, check_arguments, defaults, import_class
from ivideogpt.recipes.parts import PartBuilder, check_part, part_arguments, source_folder
from ivideogpt.recipes.reading import Node
from ivideogpt.recipes.results import differences, fingerprint, read_record, save_tokenizer, write_record
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints, latest_checkpoint
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.progress import UpdateProgress
from ivideogpt.zoo.checkpoint import Parts, save_parts
from ivideogpt.zoo.published import Published

OWN_TRAINER_ARGUMENTS = ("default_root_dir", "logger", "plugins")
"""Arguments of the trainer that the runner sets itself (`logger` and `plugins` of a recipe are added to its own)."""


def check_stage(stage: Node, where: str, trust: bool) -> Node:
    """Checks classes and arguments of a stage; returns it with the defaults of module and data written out.

    Raises:
        ValueError: naming what is wrong, where, and the nearest right one.
    """
    checked: Node = {}
    for key, base in (("module", LightningModule), ("data", LightningDataModule)):
        node, place = stage[key], f"{where}.{key}"
        unknown = node.keys() - {"class_path", "init_args"}
        if "class_path" not in node or unknown:
            raise ValueError(f"{place} must be class_path and init_args, got {sorted(node)}")
        cls = import_class(node["class_path"], place, trust)
        if not issubclass(cls, base):
            raise ValueError(f"{place}: {node['class_path']} is no {base.__name__}")
        values = node.get("init_args") or {}
        parts = part_arguments(cls) if key == "module" else {}
        check_arguments(cls, values, place, trust, skip=tuple(parts))
        for name, kind in parts.items():
            if values.get(name) is not None:
                check_part(kind, values[name], f"{place}.{name}")
        # written out, so that a later version with other defaults does not change what a recipe means
        checked[key] = {"class_path": node["class_path"], "init_args": {**defaults(cls), **values}}
    check_arguments(Trainer, stage["trainer"], f"{where}.trainer", trust)
    if "default_root_dir" in stage["trainer"]:
        raise ValueError(f"{where}.trainer.default_root_dir is the stage's folder; set the recipe's `output`")
    checked["trainer"] = stage["trainer"]
    return checked


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

    def run(self, console: Console) -> None:
        """Skips the stage if it is finished, else resumes or starts it."""
        settings = {"seed": self.seed, **json.loads(json.dumps(self.config)), "inputs": self._inputs()}
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
        module = self._module(builder)
        data = self._build(LightningDataModule, "data")
        trainer, checkpoint = self._trainer()
        if trainer.is_global_zero:
            write_record(self.folder, record)
        if is_overridden("training_step", module, LightningModule):
            with _interrupts_raised(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if trainer.is_global_zero:
                self._save(module, builder, trainer.global_step)
        else:
            with _interrupts_raised(trainer):
                trainer.test(module, datamodule=data, verbose=False)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            record |= {"state": "finished", "finished": _now(), "seconds": round(time.monotonic() - begin, 1)}
            record["updates"] = trainer.global_step
            write_record(self.folder, record)
            console.print(f"[bold]{self.name}[/]: finished in {record['seconds']} s", highlight=False)
        trainer.strategy.barrier()

    def _inputs(self) -> dict[str, str]:
        """Fingerprints of what the stage starts from, so that a change of an earlier stage is noticed."""
        found = {}
        for argument, spec in self.config["module"]["init_args"].items():
            if argument in part_arguments(self._class("module")) and spec is not None and "from" in spec:
                where = f"stages.{self.name}.module.{argument}"
                found[argument] = fingerprint(source_folder(spec, self.earlier, where))
        return found

    def _settle_changes(self, record: Node, settings: Node, console: Console) -> Node | None:
        changes = list(differences(record.get("settings"), self._without_new_defaults(record, settings)))
        if not changes:
            return record
        listed = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        if self.on_change == "continue":
            console.print(f"[bold]{self.name}[/]: going on with other settings: {listed}", highlight=False)
            return {**record, "state": "running"}
        if self.on_change == "rerun":
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.previous-{number}")).exists():
                number += 1
            self.folder.rename(aside)
            console.print(f"[bold]{self.name}[/]: run anew, the old one is {aside}: {listed}", highlight=False)
            return None
        raise ValueError(
            f"stage {self.name!r} in {self.folder} was {record['state']} with other settings: {listed}. Give another "
            f"output=FOLDER, or on_change=rerun (the old stage is moved aside) or on_change=continue (from its last "
            f"checkpoint, with the new settings)"
        )

    def _without_new_defaults(self, record: Node, settings: Node) -> Node:
        """Settings less the arguments that a later version of a class brought, as long as they have their default."""
        settings = copy.deepcopy(settings)
        for key in ("module", "data"):
            old = record.get("settings", {}).get(key, {}).get("init_args", {})
            values = settings[key]["init_args"]
            for name, default in defaults(self._class(key)).items():
                if name not in old and values.get(name) == default:
                    values.pop(name, None)
        return settings

    def _class(self, key: str) -> type:
        return import_class(self.config[key]["class_path"], f"stages.{self.name}.{key}", trust=True)  # checked before

    def _arguments(self, cls: type, key: str, values: Node, skip: set[str]) -> Node:
        """Arguments with their types checked and the classes inside of them built."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, key, skip=skip, instantiate=False)
        try:
            parsed = parser.parse_object({key: {name: value for name, value in values.items() if name not in skip}})
        except Exception as error:  # jsonargparse raises several kinds
            message = " ".join(str(error).split())
            raise ValueError(f"stages.{self.name}.{key}: {message}") from error
        built = parser.instantiate_classes(parsed)[key]
        return {name: value.as_dict() if isinstance(value, Namespace) else value for name, value in vars(built).items()}

    def _build(self, base: type, key: str) -> Any:
        cls = self._class(key)
        built = cls(**self._arguments(cls, key, self.config[key]["init_args"], set()))
        assert isinstance(built, base)
        return built

    def _module(self, builder: PartBuilder) -> Any:
        cls, values = self._class("module"), self.config["module"]["init_args"]
        kinds = part_arguments(cls)
        kwargs = self._arguments(cls, "module", values, set(kinds))
        for argument, kind in kinds.items():
            where = f"stages.{self.name}.module.{argument}"
            kwargs[argument] = None if values.get(argument) is None else builder.build(kind, values[argument], where)
        loaded = builder.loaded.get("transformer")
        if loaded is not None:  # a fine-tuned model keeps its normalisation
            for name in ("action_mean", "action_std"):
                if name in arguments(cls)[0] and values.get(name) is None:
                    kwargs[name] = loaded.extras.get(name)
        if "output_folder" in arguments(cls)[0] and values.get("output_folder") is None:
            kwargs["output_folder"] = self.folder
        return cls(**kwargs)

    def _trainer(self) -> tuple[Trainer, Path | None]:
        settings = dict(self.config["trainer"])
        kwargs = self._arguments(Trainer, "trainer", settings, {"default_root_dir"})
        found = latest_checkpoint(self.folder / "checkpoints")
        step = 0 if found is None else found[0]
        callbacks = kwargs.pop("callbacks", None) or []
        callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), SeededUpdates(self.seed)]
        if not any(isinstance(callback, Checkpoints) for callback in callbacks):
            callbacks.append(Checkpoints())
        if kwargs.get("enable_progress_bar") is not False:
            callbacks.append(UpdateProgress(self.name))
        logger = kwargs.pop("logger", None)
        loggers: list[Any] = []
        if logger is not False:
            extra = [] if logger in (None, True) else (logger if isinstance(logger, list) else [logger])
            tensorboard = TensorBoardLogger(self.folder, name="", version="tensorboard", purge_step=step or None)
            loggers = [MetricsCSV(self.folder, step), tensorboard, *extra]
        plugins = kwargs.pop("plugins", None) or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if "num_sanity_val_steps" not in settings:
            kwargs["num_sanity_val_steps"] = 0
        if "enable_model_summary" not in settings:
            kwargs["enable_model_summary"] = False
        trainer = Trainer(**kwargs, default_root_dir=self.folder, callbacks=callbacks, logger=loggers, plugins=plugins)
        return trainer, None if found is None else found[1]

    def _save(self, module: Any, builder: PartBuilder, updates: int) -> None:
        training = {"stage": self.name, "updates": updates, "seed": self.seed}
        transformer = getattr(module, "transformer", None)
        if transformer is None:
            extras = {"recipe": self.recipe_name, "training": training}
            save_tokenizer(self.folder, module.tokenizer, extras, self.recipe_text)
            return
        loaded = builder.loaded.get("transformer")
        extras = {**(loaded.extras if loaded else {}), "recipe": self.recipe_name, "training": training}
        extras |= module.action_statistics
        source = (self.config["module"]["init_args"].get("transformer") or {}).get("from")
        if source is not None and source not in self.earlier:
            extras["base_model"] = source
        old = loaded.published if loaded else Published()
        parts = Parts(module.tokenizer, transformer, module.reward_head, extras, old)
        parts.published.recipe = self.recipe_text
        save_parts(self.folder, parts)


def compose_model(stage_folder: Path, output: Path) -> None:
    """Copies the world model of the last stage that has one to ``OUTPUT/model``, as one."""
    from ivideogpt.zoo.checkpoint import FILES
    from ivideogpt.zoo.folder import replacing_files

    with replacing_files(output / "model") as staging:
        for name in FILES:
            if (stage_folder / name).is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(stage_folder / name, staging / name)


@contextlib.contextmanager
def _interrupts_raised(trainer: Trainer) -> Iterator[None]:
    """Turns the silent exit that Lightning makes of Ctrl-C back into a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except SystemExit as error:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


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
