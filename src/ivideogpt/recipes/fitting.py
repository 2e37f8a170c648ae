"""Whether a stage's module and its data go together."""

from __future__ import annotations

from typing import Any

from ivideogpt.recipes.checking import trains

PART_NAMES = ("tokenizer", "transformer")


def check_fit(module: Any, data: Any, stage: str) -> None:
    """Refuses a module and data that do not go together, before the first update.

    Raises:
        ValueError: with the two values that differ.
    """
    parts = getattr(module, "world_model", module)
    tokenizer, transformer = (getattr(getattr(parts, name, None), "config", None) for name in PART_NAMES)
    if tokenizer is None:
        return
    if transformer is None and trains(type(module)) and getattr(data, "tokenizer_hash", None) is not None:
        raise ValueError(f"stages.{stage}: a tokenizer is trained on pixels, the data are tokens; use VideoDataModule")
    pairs = [("resolution", tokenizer.resolution, "resolution"), ("context_length", tokenizer.context_length, None)]
    if transformer is not None and transformer.action_dim is not None:
        pairs.append(("action_dim", transformer.action_dim, "action_dim"))
    data.prepare_data()
    for name, wanted, attribute in pairs:
        found = getattr(data, attribute or name, wanted)
        if found != wanted:
            raise ValueError(
                f"stages.{stage}: the model's {name} is {wanted}, that of the data is {found}; change one of the two"
            )
    trains_rewards = trains(type(module)) and getattr(module, "reward_head", None) is not None
    if trains_rewards and not getattr(data, "has_rewards", True):
        raise ValueError(f"stages.{stage}: the model has a reward head and the data have no rewards; leave it out")
