"""Tests of which classes and arguments a recipe may name; hostile recipes among them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from ivideogpt.recipes.checking import check_stage
from ivideogpt.recipes.classes import check_arguments, import_class
from ivideogpt.training import TokenizerModule


@pytest.mark.parametrize(
    "path",
    [
        "ivideogpt.training.TokenizerModule",
        "ivideogpt.data.VideoDataModule",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.profilers.SimpleProfiler",
        "torch.optim.AdamW",
        "torch.nn.Linear",
    ],
)
def test_building_blocks_may_be_named(path: str) -> None:
    assert import_class(path, "x").__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "pathlib.Path",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.jit.ScriptModule",
        "torch.package.PackageImporter",
        "torch.nn.modules.module.OrderedDict",  # a class of another package
        "torch.nn.functional.relu",  # a function
        "torch.nn.init.uniform_",
        "lightning.pytorch.callbacks.LambdaCallback",
        "lightning.pytorch.callbacks.lambda_function.LambdaCallback",
        "lightning.pytorch.callbacks.model_checkpoint.Path",
        "lightning.pytorch.Trainer",
        "lightning.fabric.Fabric",
        "lightning.app.LightningApp",
        "lightning_sdk.Studio",
        "lightning.pytorch.cli.LightningCLI",
        "ivideogpt.recipes.run",
        "ivideogpt.recipes.runner.Path",
        "ivideogpt.training.checkpoints.Path",
        "ivideogpt.from_pretrained",
        "ivideogpt_evil.Module",
        "ivideogptx.training.TokenizerModule",
    ],
)
def test_everything_else_is_refused_without_trust(path: str) -> None:
    with pytest.raises(ValueError, match=r"may not name|is no class|has no class"):
        import_class(path, "stages.x.module")


@pytest.mark.parametrize("path", ["ivideogpt.x:os.system", "ivideogpt..os", "os", "", "ivideogpt.training.", None, 5])
def test_what_is_no_dotted_name_is_refused(path: object) -> None:
    with pytest.raises(ValueError, match="class_path must be a dotted name"):
        import_class(path, "x", trust=True)  # type: ignore[arg-type]


def test_a_refused_module_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="give --trust"):
        import_class("hostile_module.Module", "x")
    for hostile in ("hostile_module.Module", {"class_path": "hostile_module.Module"}, ["hostile_module.Module"]):
        for name in ("callbacks", "logger", "strategy", "plugins", "profiler", "accelerator"):
            with pytest.raises(ValueError, match=r"may not name|write a class as class_path"):
                check_arguments(Trainer, {name: hostile}, "trainer", trust=False)
    assert "hostile_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


def node(name: str, **init_args: object) -> dict:
    return {"class_path": f"lightning.pytorch.{name}", "init_args": init_args}


def test_functions_hidden_in_arguments_are_refused() -> None:
    nodes = [
        {"callbacks": node("callbacks.WeightAveraging", avg_fn="os.system")},
        {"profiler": node("profilers.PyTorchProfiler", on_trace_ready="os.system")},
        {"strategy": node("strategies.DDPStrategy", ddp_comm_hook="os.system")},
        {"strategy": node("strategies.DDPStrategy", model_averager={"class_path": "subprocess.Popen"})},
        {"callbacks": ["LambdaCallback"]},
        # strings that are parsed again, where an escape hides the dot
        {"profiler": '{"class_path": "PyTorchProfiler", "init_args": {"on_trace_ready": "os\\u002esystem"}}'},
        {"strategy": '{"class_path": "__main__\\u002eHostile"}'},
        {"strategy": "{class_path: Hostile}"},
        {"accelerator": "class_path: Hostile"},
    ]
    for values in nodes:
        with pytest.raises(ValueError, match=r"may not name|write a class as class_path"):
            check_arguments(Trainer, values, "trainer", trust=False)


def test_plain_words_pass() -> None:
    words = dict(
        strategy="ddp", precision="bf16-mixed", accelerator="cpu", devices="auto", max_time="00:12:00:00",
        profiler="simple", gradient_clip_algorithm="norm", logger=False,
    )  # fmt: skip
    check_arguments(Trainer, words, "trainer", trust=False)


def test_trust_allows_classes_from_anywhere() -> None:
    assert import_class("pathlib.Path", "x", trust=True) is Path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ivideogpt.training.TokeniserModule", r"no class 'TokeniserModule'; did you mean 'TokenizerModule'"),
        (
            "ivideogpt.trainning.TokenizerModule",
            r"no module 'ivideogpt.trainning' in ivideogpt; did you mean 'training'",
        ),
    ],
)
def test_a_mistyped_class_names_the_nearest(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_class(path, "x")


def stage(**module: object) -> dict:
    init_args = {"tokenizer": {"preset": "nano"}, **module}
    return {
        "module": {"class_path": "ivideogpt.training.TokenizerModule", "init_args": init_args},
        "data": {"class_path": "ivideogpt.data.VideoDataModule"},
        "trainer": {"max_steps": 3},
    }


def test_a_checked_stage_has_the_defaults_and_the_seed_written_out() -> None:
    checked = check_stage(stage(learning_rate=0.5), "stages.x", seed=9, trust=False)
    assert checked["module"]["init_args"]["learning_rate"] == 0.5
    assert checked["module"]["init_args"]["commitment_weight"] == 1.0
    assert checked["data"]["init_args"]["seed"] == 9
    again = check_stage(checked, "stages.x", seed=0, trust=False)
    assert again == checked


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"learning_rat": 1}, r"stages.x.module: TokenizerModule has no argument 'learning_rat'; .*'learning_rate'"),
        ({"learning_rate": "fast"}, r"stages.x.module: .*learning_rate.*fast"),
        ({"schedule": "linear"}, r"stages.x.module: .*schedule.*linear"),
        ({"tokenizer": "nano"}, r"stages.x.module.tokenizer: a tokenizer is a mapping such as .*got 'nano'"),
        ({"tokenizer": {"preset": "nan"}}, r"no tokenizer preset 'nan'; there are"),
        ({"tokenizer": {"preset": "nano", "resolutoin": 1}}, r"unknown key 'resolutoin'; did you mean 'resolution'"),
        ({"tokenizer": {"resolution": 63}}, r"TokenizerConfig.resolution 63 must be a multiple"),
        ({"tokenizer": {"from": "a", "preset": "b"}}, r"unknown key 'preset' of {from: ...}"),
        ({"tokenizer": {"from": 3}}, r"from must name a stage, a zoo name or a folder, got 3"),
        ({"tokenizer": {"from": "later"}}, r"the stage 'later' does not come before this one"),
    ],
)
def test_wrong_arguments_of_a_stage_are_found_before_it_runs(module: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stage(stage(**module), "stages.x", 0, trust=False, earlier=["first"], later=["x", "later"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"max_stepss": 1}}, r"Trainer has no argument 'max_stepss'; did you mean 'max_steps'"),
        ({"trainer": {"max_steps": "many"}}, r"stages.x.trainer: .*max_steps.*many"),
        ({"trainer": {"default_root_dir": "a"}}, r"default_root_dir is the stage's folder; set the recipe's `output`"),
        ({"data": {"class_path": "ivideogpt.training.TokenizerModule"}}, r"is no LightningDataModule"),
        ({"module": {"class_path": "torch.nn.Linear"}}, r"is no LightningModule"),
        ({"module": {"init_args": {}}}, r"stages.x.module must be class_path and init_args, got \['init_args'\]"),
        (
            {"data": {"class_path": "ivideogpt.data.VideoDataModule", "batch_size": 3}},
            r"must be class_path and init_args",
        ),
    ],
)
def test_wrong_parts_of_a_stage_are_found_before_it_runs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_stage({**stage(), **change}, "stages.x", 0, trust=False)


def test_arguments_that_a_class_does_not_have_are_never_dropped() -> None:
    with pytest.raises(ValueError, match="has no argument 'x'"):
        check_arguments(TokenizerModule, {"x": 1}, "module", trust=True)
