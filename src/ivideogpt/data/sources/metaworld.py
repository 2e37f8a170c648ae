"""Collects episodes in Meta-World: scripted experts with wandering noise in a headless MuJoCo simulator.

Frames are 64 x 64 from the camera `corner`, upright (the simulator's come upside down). An agent step repeats its
action for `action_repeat` simulator steps of 12.5 ms. rewards[t] is the *sum* of the environment's rewards over the
repeated steps plus, once, the success bonus if one of them was a success: the scale of the recordings by the authors
of iVideoGPT (30 = 2 x 10 + 10 at best). Noise is an AR(1) process, one value an agent step and dimension, with
correlation 0.9 and stationary standard deviation S, added to the expert's clipped action; the sum is clipped to
[-1, 1]. An episode ends `tail` agent steps after the first success (terminations[t] is True there) or at `max_steps`.
"""

from __future__ import annotations

import os
import shlex
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter, encoded
from ivideogpt.data.sources.rendering import choose_gl, renderer

LICENCE = "MIT"
CAMERA = "corner"
NOISE_CORRELATION = 0.9
FIDELITIES = ("paper", "fast")


def collect(
    tasks: str | Sequence[str],
    episodes: int,
    noise: float | Sequence[float] = 0.0,
    out: str | os.PathLike[str] = "shards",
    fidelity: str = "fast",
    seed: int = 0,
    workers: int = 2,
    max_steps: int = 100,
    tail: int = 5,
    action_repeat: int = 2,
    success_bonus: float = 10.0,
    resolution: int = 64,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Collects `episodes` episodes of each task and writes them as a shard set.

    Args:
        tasks: Task name or names, with or without the suffix `-v3`.
        episodes: Episodes for each task.
        noise: Noise scale or scales; episode i of a task uses the scale number i modulo their count.
        out: Folder of the shard set.
        fidelity: `fast` (no multisampling, shadows or reflections: much faster) or `paper` (default renderer).
        seed: Seeds goals and noise; sets collected with different seeds share no episode.
        workers: Processes; 0 collects in this one. The result does not depend on it.
        max_steps: Agent steps after which an episode is cut off.
        tail: Agent steps kept after the first success.
        action_repeat: Simulator steps for each agent step.
        success_bonus: Added once to the reward of an agent step with a success.
        resolution: Frame height and width in pixels.
        overwrite: Replace a set that is in `out`.
        progress: Called with (episodes done, episodes in all) at the start and after each.

    Returns:
        The folder.

    Raises:
        ValueError: Unknown task or fidelity, or a number out of range.
        ImportError: metaworld is not installed.
        OSError: No off-screen OpenGL, a worker process died, or the disk is full; an older set stays whole.
    """
    names = [_task_name(task) for task in ([tasks] if isinstance(tasks, str) else tasks)]
    scales = [float(scale) for scale in (noise if isinstance(noise, Sequence) else [noise])]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks must be one or more different names, got {names}")
    if not scales or not all(np.isfinite(scale) and scale >= 0 for scale in scales):
        raise ValueError(f"noise scales must be finite and not negative, got {scales}")
    if fidelity not in FIDELITIES:
        raise ValueError(f"fidelity {fidelity!r} is not one of {FIDELITIES}")
    for label, value, least in (
        ("episodes", episodes, 1),
        ("max_steps", max_steps, 1),
        ("tail", tail, 0),
        ("action_repeat", action_repeat, 1),
        ("resolution", resolution, 8),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{label} must be at least {least}, got {value}")
    check_tasks(names)
    gl = choose_gl()
    options = {
        "fidelity": fidelity,
        "seed": seed,
        "max_steps": max_steps,
        "tail": tail,
        "action_repeat": action_repeat,
        "success_bonus": success_bonus,
        "resolution": resolution,
    }
    jobs = [(task, i, scales[i % len(scales)], options) for i in range(episodes) for task in names]
    command = ["ivideogpt", "data", "collect", "metaworld", *(word for name in names for word in ("--task", name))]
    command += ["--episodes", str(episodes), "--noise", *(f"{scale:g}" for scale in scales), "--out", os.fspath(out)]
    for option in ("fidelity", "seed", "max_steps", "tail", "action_repeat", "success_bonus", "resolution"):
        command += [f"--{option.replace('_', '-')}", str(options[option])]
    extra = options | {"tasks": names, "noise": scales, "renderer": gl, "episodes_per_task": episodes}
    with ShardSetWriter(out, name="metaworld", overwrite=overwrite, command=shlex.join(command), extra=extra) as writer:
        report = progress or (lambda done, total: None)
        report(0, len(jobs))
        for done, (key, data, info) in enumerate(_results(jobs, workers), start=1):
            writer.write_encoded(key, data, info)
            report(done, len(jobs))
    return Path(out)


def check_tasks(names: Sequence[str]) -> None:
    """Raises ValueError for a task that Meta-World does not have, ImportError without Meta-World."""
    known = _policies()
    for name in names:
        if name not in known:
            raise ValueError(f"Meta-World has no task {name!r}; it has {', '.join(sorted(known))}")


def rollout_expert(
    task: str,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
    fidelity: str = "fast",
    max_steps: int = 100,
    tail: int = 5,
    action_repeat: int = 2,
    success_bonus: float = 10.0,
    resolution: int = 64,
) -> Episode:
    """Runs one episode; arguments as in `collect`, `rng` decides goal and noise."""
    rng = np.random.default_rng() if rng is None else rng
    name = _task_name(task)
    simulator, draw = _simulator(name, fidelity, resolution)
    policy = _policies()[name]()
    simulator.seed(int(rng.integers(2**31)))
    observation, _ = simulator.reset()
    wander = noise * rng.standard_normal(4)
    frames, actions, rewards = [draw()], [], [0.0]
    success_step: int | None = None
    for step in range(max_steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scripted policies warn on every action beyond [-1, 1]
            expert = np.clip(policy.get_action(observation), -1, 1)
        action = np.clip(expert + wander, -1, 1).astype(np.float32)
        wander = NOISE_CORRELATION * wander
        wander += noise * np.sqrt(1 - NOISE_CORRELATION**2) * rng.standard_normal(4)
        total, succeeded = 0.0, False
        for _ in range(action_repeat):
            observation, reward, _, _, info = simulator.step(action)
            total += float(reward)
            succeeded = succeeded or bool(info["success"])
        frames.append(draw())
        actions.append(action)
        rewards.append(total + success_bonus * succeeded)
        if succeeded and success_step is None:
            success_step = step + 1
        if success_step is not None and step + 1 >= success_step + tail:
            break
    terminations = np.zeros(len(frames), dtype=bool)
    terminations[-1] = success_step is not None and len(frames) - 1 >= success_step + tail
    actions.append(np.zeros(4, np.float32))
    return Episode(
        video=np.stack(frames),
        actions=np.stack(actions),
        rewards=np.array(rewards, np.float32),
        terminations=terminations,
        fps=1.0 / (simulator.dt * action_repeat),
        camera=CAMERA,
        source=f"metaworld/{name}",
        licence=LICENCE,
        metadata={
            "task": name,
            "noise": noise,
            "success": success_step is not None,
            "success_step": success_step,
            "fidelity": fidelity,
            "action_repeat": action_repeat,
            "success_bonus": success_bonus,
            "layout": [float(value) for value in simulator._last_rand_vec],  # the drawn object and goal positions
        },
    )


_SIMULATORS: dict[tuple[str, str, int], tuple[Any, Callable[[], np.ndarray]]] = {}


def _simulator(name: str, fidelity: str, resolution: int) -> tuple[Any, Callable[[], np.ndarray]]:
    """The simulator of a task and a function that draws its frame; built once a process, as that costs 0.5 s."""
    key = (name, fidelity, resolution)
    if key not in _SIMULATORS:
        choose_gl()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        environments: dict[str, Any] = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE  # its type hides the argument `seed`
        simulator = environments[f"{name}-goal-observable"](seed=0)
        simulator._freeze_rand_vec = False  # a new goal for every episode ...
        simulator.seeded_rand_vec = True  # ... drawn from the seed given to `seed`
        _SIMULATORS[key] = simulator, renderer(simulator.model, simulator.data, CAMERA, resolution, fidelity)
    return _SIMULATORS[key]


def _policies() -> dict[str, Any]:
    """Scripted experts by task name."""
    try:
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise ImportError(
            f"collecting needs Meta-World ({error}); install it with: pip install 'ivideogpt[envs]'"
        ) from error
    return ENV_POLICY_MAP


def _task_name(task: str) -> str:
    return task if task.endswith("-v3") else f"{task}-v3"


def _job(job: tuple[str, int, float, dict[str, Any]]) -> tuple[str, bytes, dict[str, Any]]:
    """Collects and encodes one episode; a pure function of its arguments (up to the renderer's rounding)."""
    task, index, noise, options = job
    options = dict(options)
    seed = options.pop("seed")
    rng = np.random.default_rng([seed, index, zlib.crc32(task.encode())])
    episode = rollout_expert(task, noise, rng, **options)
    episode.metadata.update(seed=seed, index=index)
    key = f"{task.removesuffix('-v3')}-s{seed}-n{round(100 * noise):03d}-{index:05d}"
    return key, *encoded(episode)


def _one_render_thread() -> None:
    """Keeps Mesa's software renderer to one thread a process, for there is a process a core already."""
    os.environ.setdefault("LP_NUM_THREADS", "1")


def _results(jobs: list[tuple], workers: int) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yields the jobs' results in order, computed by `workers` processes, few ahead of what is taken."""
    if workers == 0:
        yield from map(_job, jobs)
        return
    # spawn: a forked OpenGL context is undefined behaviour.
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_render_thread) as pool:
        rest = iter(jobs)
        waiting: list[Future] = [pool.submit(_job, job) for job in islice(rest, 4 * workers)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting.extend(pool.submit(_job, job) for job in islice(rest, 1))
                yield result
        except BrokenProcessPool as error:
            raise ChildProcessError("a simulator process died; with --workers 0 its own message is shown") from error
        finally:
            for future in waiting:
                future.cancel()
