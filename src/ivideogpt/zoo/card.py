"""Model cards, rendered from ``model_cards/TEMPLATE.md``, a zoo entry and the JSON files of measured results.

``python -m ivideogpt.zoo.card`` renders one card per zoo entry into the repository's ``model_cards/``; with ``--check``
it only says which are out of date. A measured number comes from ``model_cards/results/*.json`` and from nowhere else;
where there is none the card says "not evaluated". The authors' numbers are marked as theirs.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ivideogpt.zoo.card_results import CardResults, read_card_results
from ivideogpt.zoo.registry import ZooEntry, cards_folder, entries, find_entry

if TYPE_CHECKING:
    from ivideogpt.zoo.checkpoint import Parts

CARD = "README.md"
"""Name of a card in a repository."""
ROLLOUT = "rollout.gif"
"""Name of the animation that it shows."""
MARKER = "<!-- Rendered by ivideogpt. A card without this line was written by hand, and pushing keeps it. -->"
_TAGS = ["world-model", "video-prediction", "robotics", "ivideogpt"]
_ACTIVE = re.compile(r"(javascript|vbscript):|data:text/html|!!python/|<script|\bon(error|load|click)=", re.IGNORECASE)
_ACTIVE_TAGS = ("script", "iframe", "object", "embed", "form", "base", "style", "link", "meta", "svg", "math")
LONGEST_CARD, MOST_TAGS = 2**18, 2000
"""Characters of a card, and `<` in it, that are read at all."""


def entry_card(entry: ZooEntry, results: Sequence[CardResults] = (), repo_id: str | None = None) -> str:
    """Model card of a zoo entry.

    Args:
        entry: of the registry.
        results: of its evaluations; none for a model that was not evaluated.
        repo_id: where the card goes, if it goes to the Hub.
    """
    rollout = entry.rollout and {**entry.rollout, **({"file": ROLLOUT} if repo_id else {})}
    facts: dict[str, Any] = {
        "Resolution": f"{entry.resolution} x {entry.resolution}",
        "Context frames": f"{entry.context_length} (the first one is the goal)" if entry.goal else entry.context_length,
        "Actions": f"{entry.action_dim} numbers a frame" if entry.action_dim else "none",
        "Rewards": "predicted" if entry.rewards else "none",
        "Parameters": ", ".join(f"{part} {count:,}" for part, count in entry.parameters.items()) or "not counted",
        "Licence of the weights": entry.licence.upper(),
        "Input": entry.preprocessing,
        "Source": entry.source,
    }
    trained_here = entry.hub_id is None
    recipe = f"`{entry.recipe}`" if entry.recipe else "none in this project"
    return _render(
        title=entry.name,
        load_name=repo_id or entry.name,
        load_more="",
        summary=entry.summary,
        facts=facts,
        context_shape=(entry.context_length, 3, entry.resolution, entry.resolution),
        action_dim=entry.action_dim,
        data=entry.data,
        training={
            "Started from": f"`{entry.base_model}`" if entry.base_model else "nothing",
            "Recipe": recipe if trained_here else f"that of the authors; {recipe} is this project's after it",
            "Compute": entry.compute,
        },
        results=results,
        authors_results=entry.authors_results,
        limits=entry.limits,
        failures=entry.failures,
        rollout=rollout,
        metadata=_metadata(entry.name, entry.licence, results, entry.base_model, _hub_ids(entry)),
    )


def variant_card(
    repo_id: str,
    parts: Parts,
    results: Sequence[CardResults] = (),
    data: Sequence[dict[str, str]] = (),
    datasets: Sequence[str] = (),
    rollout: dict[str, str] | None = None,
    compute: str = "not recorded",
    licence: str | None = None,
) -> str:
    """Model card of a world model that a user shares as ``repo_id``.

    Args:
        repo_id: on the Hub.
        parts: the world model.
        results: of its evaluations.
        data: what it was trained on, each with ``name`` and ``licence``.
        datasets: Hub ids of data sets, linked beside those of the base model.
        rollout: an animation with its ``file`` in the repository and ``what`` it shows.
        compute: what the training took.
        licence: of the weights; that of the base model if None.
    """
    config, extras = parts.config, parts.extras
    modules = {"tokenizer": parts.tokenizer, "transformer": parts.transformer, "reward head": parts.reward_head}
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}
    base_name = (parts.adapter.base.get("model") if parts.adapter else None) or extras.get("base_model")
    base = find_entry(base_name) if base_name else None
    licence = licence or (base.licence if base else None)
    facts: dict[str, Any] = {
        "Resolution": f"{config.tokenizer.resolution} x {config.tokenizer.resolution}",
        "Context frames": config.context_length,
        "Actions": _actions(parts),
        "Rewards": "predicted" if config.reward_head else "none",
        "Parameters": ", ".join(f"{part} {count:,}" for part, count in counts.items()),
        "Licence of the weights": licence.upper() if licence else "not stated",
        "Input": json.dumps(extras["preprocessing"]) if extras.get("preprocessing") else "not recorded",
    }
    recipe = f"`recipe.yaml` beside the weights ({extras.get('recipe', 'unnamed')}); `lightning run {repo_id}` runs it"
    frame, layers = config.tokenizer, parts.action_layers
    space = next(iter(layers.spaces)) if layers is not None else ""
    return _render(
        title=repo_id.split("/")[-1],
        load_name=repo_id,
        load_more=f", action_space={json.dumps(space)}" if space else "",
        summary=f"World model in the iVideoGPT layout, {facts['Resolution']} pixels.",
        facts=facts,
        context_shape=(config.context_length, frame.in_channels, frame.resolution, frame.resolution),
        action_dim=layers.spaces[space] if layers is not None else config.action_dim,
        data=data,
        training={
            "Started from": f"`{base_name}`" if base_name else "not recorded",
            "Recipe": recipe if parts.published.recipe else "not recorded",
            "Settings": f"`{json.dumps(extras['training'])}`" if extras.get("training") else "not recorded",
            "Compute": compute,
        },
        results=results,
        authors_results=[],
        limits=[],
        failures=[],
        rollout=rollout,
        metadata=_metadata(
            repo_id.split("/")[-1], licence, results, base_name, [*datasets, *_hub_ids(base)], parts.adapter is not None
        ),
    )


def _actions(parts: Parts) -> str:
    if parts.action_layers is not None:
        spaces = ", ".join(f"`{name}` ({size})" for name, size in parts.action_layers.spaces.items())
        return f"of several spaces, one of which `from_pretrained(..., action_space=NAME)` takes: {spaces}"
    return f"{parts.config.action_dim} numbers a frame" if parts.config.action_dim else "none"


def check_card(text: str, where: object) -> None:
    """Refuses a card with a script, or anything else that runs or loads something, be it inside of a code block.

    Raises:
        ValueError: quoting it.
    """
    if len(text) > LONGEST_CARD or text.count("<") > MOST_TAGS:
        raise ValueError(f"{where} has {len(text):,} characters and {text.count('<'):,} '<', more than a card needs")
    reader = _Tags()
    reader.feed(text)
    reader.close()
    found = reader.found or _ACTIVE.search(re.sub(r"[\s\x00-\x1f]+", "", html.unescape(text)))
    if found:
        what = found if isinstance(found, str) else found.group()
        raise ValueError(f"{where} holds {what[:60]!r}, which can run a script; a model card needs none")


class _Tags(HTMLParser):
    """Finds the first tag or attribute that runs or loads something, as a browser would read it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        active = [name for name in names if name.startswith("on") or name in ("srcdoc", "formaction", "style")]
        if tag in _ACTIVE_TAGS or active:
            self.found = self.found or f"<{tag} {' '.join(active)}".strip()


def _render(**values: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "cell": _cell,
        "prose": _prose,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    template = (cards_folder() / "TEMPLATE.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(marker=MARKER, **values)
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"
    check_card(text, "the card")
    return text


def _metadata(
    title: str,
    licence: str | None,
    results: Sequence[CardResults],
    base_model: str | None,
    datasets: Sequence[str],
    is_adapter: bool = False,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type="robotics",
            task_name=f"video prediction, protocol {result.protocol}",
            dataset_type=task,
            dataset_name=task,
            dataset_config=result.file.removesuffix(".json"),  # without it the files' numbers would be put together
            metric_type=metric,
            metric_value=value,
        )
        for result in results
        for task, metrics in result.numbers.items()
        for metric, value in metrics.items()
    ]
    base = find_entry(base_model) if base_model else None
    base_id = base.hub_id if base else base_model
    if base_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_id):
        base_id = None  # a model inside of this package, which has no page to link to
    extra: dict[str, Any] = (
        {"base_model": base_id, "base_model_relation": "adapter" if is_adapter else "finetune"} if base_id else {}
    )
    data = ModelCardData(
        license=licence,
        library_name="ivideogpt",
        pipeline_tag="robotics",
        tags=_TAGS,
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=title if measured else None,
        eval_results=measured or None,
        **extra,
    )
    return data.to_yaml()


def _hub_ids(entry: ZooEntry | None) -> list[str]:
    return [row["hub_id"] for row in (entry.data if entry else []) if "hub_id" in row]


def _prose(value: object) -> str:
    """Text that stays text: what a file or a user wrote can neither be HTML nor end its line."""
    return html.escape(" ".join(str(value).split()), quote=False)


def _cell(value: object) -> str:
    return _prose(value).replace("|", "\\|")


def results_files(name: str, folder: Path) -> list[Path]:
    """Results files of the zoo's model ``name`` in ``folder``: ``NAME.json`` and ``NAME.*.json``."""
    return [*folder.glob(f"{name}.json"), *sorted(folder.glob(f"{name}.*.json"))]


def main(arguments: list[str] | None = None) -> int:
    """Renders or checks all cards of the repository; returns 1 if ``--check`` finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m ivideogpt.zoo.card", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a card is out of date")
    parser.add_argument(
        "--folder", type=Path, default=cards_folder(), help="where the cards are (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    stale = []
    for name, entry in entries().items():
        text = entry_card(entry, [read_card_results(path) for path in results_files(name, options.folder / "results")])
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
