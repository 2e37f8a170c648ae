"""Model cards, rendered from ``model_cards/TEMPLATE.md``, a zoo entry and the JSON file of measured results.

``python -m ivideogpt.zoo.card`` renders one card per zoo entry into the repository's ``model_cards/``; with ``--check``
it only says which are out of date. A measured number comes from ``model_cards/results/NAME.json`` and from nowhere
else; where there is none the card says "not evaluated". The authors' numbers are marked as theirs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ivideogpt.zoo.published import read_json
from ivideogpt.zoo.registry import ZooEntry, entries

if TYPE_CHECKING:
    from ivideogpt.zoo.checkpoint import Parts

_PACKAGE = Path(__file__).parents[1]
_CARDS = _PACKAGE.parents[1] / "model_cards"
_TEMPLATES = (_CARDS / "TEMPLATE.md", _PACKAGE / "_model_cards" / "TEMPLATE.md")  # of a checkout, of a wheel
_TAGS = ["world-model", "video-prediction", "robotics", "ivideogpt"]


def entry_card(entry: ZooEntry, results: dict[str, Any] | None = None) -> str:
    """Model card of a zoo entry.

    Args:
        entry: of the registry.
        results: what an evaluation wrote: ``tasks`` maps a task to its metrics, everything else says how it was done
            (seed, command, ...). None for a model that was not evaluated.
    """
    facts: dict[str, Any] = {
        "Resolution": f"{entry.resolution} x {entry.resolution}",
        "Context frames": f"{entry.context_length} (the first one is the goal)" if entry.goal else entry.context_length,
        "Actions": f"{entry.action_dim} numbers a frame" if entry.action_dim else "none",
        "Rewards": "predicted" if entry.rewards else "none",
        "Parameters": ", ".join(f"{part} {count:,}" for part, count in entry.parameters.items()) or "not counted",
        "Trained on": entry.data,
        "Input": entry.preprocessing,
        "Source": entry.source,
        "Recipe": f"`{entry.recipe}`" if entry.recipe else "that of the authors",
    }
    return _render(
        title=entry.name,
        load_name=entry.name,
        summary=entry.summary,
        licence=entry.licence,
        facts=facts,
        context_shape=(entry.context_length, 3, entry.resolution, entry.resolution),
        action_dim=entry.action_dim,
        results=results or {},
        authors_results=entry.authors_results,
    )


def variant_card(repo_id: str, parts: Parts) -> str:
    """Model card of a world model that a user shares as ``repo_id``; it was not evaluated as far as we know."""
    config, extras = parts.config, parts.extras
    modules = {"tokenizer": parts.tokenizer, "transformer": parts.transformer, "reward head": parts.reward_head}
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}
    facts: dict[str, Any] = {
        "Resolution": f"{config.tokenizer.resolution} x {config.tokenizer.resolution}",
        "Context frames": config.context_length,
        "Actions": f"{config.action_dim} numbers a frame" if config.action_dim else "none",
        "Rewards": "predicted" if config.reward_head else "none",
        "Parameters": ", ".join(f"{part} {count:,}" for part, count in counts.items()),
        "Started from": extras.get("base_model", "not recorded"),
        "Trained on": json.dumps(extras["training"]) if extras.get("training") else "not recorded",
        "Input": json.dumps(extras["preprocessing"]) if extras.get("preprocessing") else "not recorded",
        "Recipe": f"`recipe.yaml` ({extras.get('recipe', 'unnamed')})" if parts.published.recipe else "not recorded",
    }
    summary = f"World model in the iVideoGPT layout, {facts['Resolution']} pixels."
    frame = config.tokenizer
    return _render(
        title=repo_id.split("/")[-1],
        load_name=repo_id,
        summary=summary,
        licence=None,
        facts=facts,
        context_shape=(config.context_length, frame.in_channels, frame.resolution, frame.resolution),
        action_dim=config.action_dim,
        results={},
        authors_results=[],
    )


def _render(title: str, licence: str | None, results: dict[str, Any], **values: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "number": _number}
    template = next((path for path in _TEMPLATES if path.is_file()), None)
    if template is None:
        raise FileNotFoundError(f"no model card template at {' or '.join(map(str, _TEMPLATES))}")
    tasks = {task: _row(metrics) for task, metrics in results.get("tasks", {}).items()}
    if "overall" in results:
        tasks["overall"] = _row(results["overall"])
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        metadata=_metadata(title, licence, tasks),
        title=title,
        tasks=tasks,
        columns=list(dict.fromkeys(name for metrics in tasks.values() for name in metrics)),
        conditions={name: value for name, value in results.items() if name not in ("tasks", "overall")},
        **values,
    )


def _row(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one task, side by side; nested ones are those of ``ivideogpt.metrics.evaluation``."""
    row = {name: value for name, value in metrics.items() if _is(value)}
    for name, value in metrics.get("model", {}).items():
        row[name] = value
        if name in metrics.get("repeat_last_frame", {}):
            row[f"{name}, last frame repeated"] = metrics["repeat_last_frame"][name]
    if "mse_ratio" in (metrics.get("shuffled_actions") or {}):
        row["mse ratio, actions shuffled"] = metrics["shuffled_actions"]["mse_ratio"]
    if "pearson_r" in (metrics.get("reward") or {}):
        row["reward r"] = metrics["reward"]["pearson_r"]
    return row


def _metadata(title: str, licence: str | None, tasks: dict[str, dict[str, Any]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="robotics",
            task_name="video prediction",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
        )
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if _is(value)
    ]
    data = ModelCardData(
        license=licence,
        library_name="ivideogpt",
        pipeline_tag="robotics",
        tags=_TAGS,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _is(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _cell("-" if value is None else value)


def main(arguments: list[str] | None = None) -> int:
    """Renders or checks all cards of the repository; returns 1 if ``--check`` finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m ivideogpt.zoo.card", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a card is out of date")
    parser.add_argument("--folder", type=Path, default=_CARDS, help="where the cards are (default: %(default)s)")
    options = parser.parse_args(arguments)
    stale = []
    for name, entry in entries().items():
        measured = options.folder / "results" / f"{name}.json"
        text = entry_card(entry, read_json(measured) if measured.is_file() else None)
        path = options.folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if options.check else 'rendered'}: {path}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
