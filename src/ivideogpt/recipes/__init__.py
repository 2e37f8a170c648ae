"""Recipes: one YAML file composes the stages that make one result; this package reads, checks and runs them.

Example: ``ivideogpt.recipes.run("recipes/metaworld_nano.yaml", ["tokenizer.trainer.max_steps=10"])``.
"""

from __future__ import annotations

from ivideogpt.recipes.runner import find, load, recipes_folder, run

__all__ = ["find", "load", "recipes_folder", "run"]
