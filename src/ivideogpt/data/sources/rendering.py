"""Off-screen MuJoCo rendering: which OpenGL to use, and small upright frames at two fidelities."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_PROBE = "import mujoco; c = mujoco.gl_context.GLContext(8, 8); c.make_current(); c.free(); print('drawn')"


@functools.cache
def choose_gl() -> str:
    """Sets MUJOCO_GL to the first of egl and osmesa that works, and returns it; a value set by the user stays.

    MuJoCo reads the variable at its first import and a wrong one is fatal there, so each is tried in a process of its
    own.

    Raises:
        ImportError: mujoco is not installed.
        OSError: Neither works.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    failures = []
    for name in ("egl", "osmesa"):
        environment = os.environ | {"MUJOCO_GL": name}
        result = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
        if result.returncode == 0 and "drawn" in result.stdout:
            os.environ["MUJOCO_GL"] = name
            if "mujoco.gl_context" in sys.modules:  # imported before, when it chose a window system
                importlib.reload(sys.modules["mujoco.gl_context"])
            return name
        lines = result.stderr.strip().splitlines()
        failures.append(f"{name}: {lines[-1] if lines else f'exit status {result.returncode}'}")
    if any("No module named 'mujoco'" in failure for failure in failures):
        raise ImportError("rendering needs MuJoCo; install it with: pip install 'ivideogpt[envs]'")
    raise OSError(
        "no off-screen OpenGL works (" + "; ".join(failures) + "); on Debian or Ubuntu install "
        "libegl1 and libgl1-mesa-dri (EGL) or libosmesa6 (OSMesa)"
    )


def renderer(model: Any, data: Any, camera: str, resolution: int, fidelity: str) -> Callable[[], np.ndarray]:
    """A function that draws the present state as a uint8 frame (resolution, resolution, 3), upright.

    Args:
        model: mujoco.MjModel; its visual settings are changed.
        data: mujoco.MjData that belongs to it.
        camera: Name of a camera of the model.
        resolution: Height and width in pixels.
        fidelity: `paper` leaves MuJoCo's settings; `fast` turns off multisampling, shadows and reflections.
    """
    import mujoco

    if fidelity == "fast":
        model.vis.quality.offsamples = 0
        # A software renderer fills the whole buffer (640 x 480 by default), whatever the size of the frame.
        model.vis.global_.offwidth = model.vis.global_.offheight = resolution
    else:
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, resolution)
        model.vis.global_.offheight = max(model.vis.global_.offheight, resolution)
    scene_renderer = mujoco.Renderer(model, resolution, resolution)

    def draw() -> np.ndarray:
        mujoco.mj_forward(model, data)  # positions of goal marks are stale after a reset
        scene_renderer.update_scene(data, camera=camera)
        if fidelity == "fast":  # update_scene sets the flags anew
            scene_renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            scene_renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return scene_renderer.render()[::-1].copy()

    return draw
