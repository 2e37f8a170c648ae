"""Feature networks of the metrics: files with a known SHA-256 that are found on this disk or said to be missing.

No package carries the weights of VGG, AlexNet or I3D. They are named here by file, Hub repository and SHA-256, looked
for where the usual tools leave them, and checked before anything of them is read. Only :func:`fetch_weights` downloads.

N videos, T frames, D features.
"""

# no `from __future__ import annotations`: TorchScript reads the annotations of RandomFeatures
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ivideogpt.metrics.video import check_range

FOLDER_VARIABLE = "IVIDEOGPT_NETWORKS"
"""Environment variable that names a folder of such files."""

LARGEST = 2 * 10**9
"""Bytes beyond which a file is not read: it is none of these networks."""

BATCH_SIZE = 16
"""Videos that go through a feature network at once."""


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights; its SHA-256 is what counts, wherever it lies and whatever it is called there.

    Attributes:
        file: its usual name.
        sha256: of its bytes.
        megabytes: its size, roughly.
        command: that fetches it to where :func:`find_weights` looks.
        repo_id: Hub repository that has it; None if it is fetched from ``url``.
        revision: commit of that repository.
        url: where it is published otherwise.
    """

    file: str
    sha256: str
    megabytes: int
    command: str
    repo_id: str | None = None
    revision: str | None = None
    url: str | None = None


def _hub_file(repo_id: str, revision: str, file: str, sha256: str, megabytes: int) -> WeightFile:
    command = f"hf download {repo_id} {file} --revision {revision}"
    return WeightFile(file, sha256, megabytes, command, repo_id, revision)


def _torchvision_file(model: str, file: str, sha256: str, megabytes: int) -> WeightFile:
    command = f"python -c \"import torchvision; torchvision.models.{model}(weights='IMAGENET1K_V1')\""
    return WeightFile(file, sha256, megabytes, command, url=f"https://download.pytorch.org/models/{file}")


WEIGHT_FILES: dict[str, tuple[WeightFile, ...]] = {
    "vgg": (
        _hub_file("timm/vgg16.tv_in1k", "b8d8aa2dd860af9233c8c67385a8097fd6c35d3f", "model.safetensors",
                  "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8", 553),
        _torchvision_file("vgg16", "vgg16-397923af.pth",
                          "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553),
    ),
    "alex": (
        _torchvision_file("alexnet", "alexnet-owt-7be5be79.pth",
                          "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", 244),
    ),
    "i3d": (
        _hub_file("flateon/FVD-I3D-torchscript", "1c2d61711c52571ad617a1063e6fa691b212e184", "i3d_torchscript.pt",
                  "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2", 51),
    ),
}  # fmt: skip
"""Network -> files that hold it, the first of which is fetched. ``i3d``: the Kinetics-400 I3D of StyleGAN-V."""

PURPOSE = {"vgg": "LPIPS (VGG)", "alex": "LPIPS (AlexNet)", "i3d": "FVD"}
NUM_FEATURES = {"i3d": 400}
RANDOM = "random"


@dataclass(frozen=True)
class Missing:
    """A network whose weights are not at hand.

    Attributes:
        name: of the network.
        reason: what is missing, where it was looked for and how to get it, in words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Weights:
    """A file of weights that was found, read and checked.

    Attributes:
        path: where it lies.
        sha256: of its bytes.
        is_reference: whether it is one of the published files of :data:`WEIGHT_FILES`.
        content: its bytes, which are those that were checked.
    """

    path: Path
    sha256: str
    is_reference: bool
    content: bytes


def find_weights(name: str, path: str | os.PathLike[str] | None = None, sha256: str | None = None) -> Weights | Missing:
    """The weights of a network, if they are on this disk; nothing is downloaded.

    Args:
        name: of :data:`WEIGHT_FILES`.
        path: of the file; None looks in ``$IVIDEOGPT_NETWORKS`` and in the caches of torch and of the Hub.
        sha256: that the file must have; None takes those of :data:`WEIGHT_FILES`.

    Raises:
        ValueError: if there is no such network, no file at ``path``, or a file with another SHA-256.
    """
    if name not in WEIGHT_FILES:
        raise ValueError(f"there is no network {name!r}: choose from {', '.join(WEIGHT_FILES)}")
    if path is not None:
        return _checked(name, Path(path).expanduser(), sha256)
    refused: ValueError | None = None
    for candidate in _candidates(name):
        if candidate.is_file():
            try:
                return _checked(name, candidate, sha256)
            except ValueError as error:  # another place may have the right one
                refused = refused or error
    if refused is not None:
        raise refused
    return Missing(name, how_to_get(name))


def how_to_get(name: str) -> str:
    """What is missing, where it was looked for and how to get it, in words."""
    first, *others = WEIGHT_FILES[name]
    text = (
        f"{PURPOSE[name]} needs the weights {first.file} ({first.megabytes} MB, SHA-256 {first.sha256}), which are not "
        f"on this disk (looked in ${FOLDER_VARIABLE} and in the caches of torch and of the Hub). Get them with `"
        f"{first.command}`"
    )
    for other in others:
        text += f" or, as {other.file}, with `{other.command}`"
    return f"{text}, or give the path of the file"


def fetch_weights(name: str) -> Weights:
    """The weights of a network, downloaded if they are not on this disk.

    Raises:
        OSError: where they cannot be reached.
        ValueError: if they have another SHA-256 than published.
    """
    found = find_weights(name)
    if isinstance(found, Weights):
        return found
    wanted = WEIGHT_FILES[name][0]
    try:
        if wanted.repo_id is not None:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(wanted.repo_id, wanted.file, revision=wanted.revision))
        else:
            assert wanted.url is not None
            path = _torch_cache() / wanted.file
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(wanted.url, str(path), hash_prefix=wanted.sha256, progress=False)
    except Exception as error:  # the Hub, its cache and the network each fail in ways of their own
        raise OSError(f"{how_to_get(name)}. They cannot be fetched now ({type(error).__name__}: {error})") from error
    return _checked(name, path, None)


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _candidates(name: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    folder = os.environ.get(FOLDER_VARIABLE)
    places = []
    for entry in WEIGHT_FILES[name]:
        if folder:
            places.append(Path(folder).expanduser() / entry.file)
        if entry.repo_id is None:
            places.append(_torch_cache() / entry.file)
            continue
        for revision in (entry.revision, None):
            cached = try_to_load_from_cache(entry.repo_id, entry.file, revision=revision)
            if isinstance(cached, str):
                places.append(Path(cached))
    return places


def _checked(name: str, path: Path, sha256: str | None) -> Weights:
    if not path.is_file():
        raise ValueError(f"there is no file {path} with the weights of {name!r}")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any network that is used here")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    published = [entry.sha256 for entry in WEIGHT_FILES[name]]
    wanted = published if sha256 is None else [sha256.lower()]
    if found not in wanted:
        raise ValueError(
            f"{path} is not the {name!r} network that was asked for: its SHA-256 is {found}, expected "
            f"{' or '.join(wanted)}. It may be truncated or another network; fetch it again"
        )
    return Weights(path, found, found in published, content)


class FeatureNetwork:
    """Turns videos into features, by the call convention of StyleGAN-V's I3D.

    Args:
        module: called with videos (N, 3, T, H, W), floats from 0 to 255, and ``rescale=True, resize=True,
            return_features=True``; gives (N, D).
        name: of the network.
        sha256: of its weights.
        is_reference: whether it is the published network; only then is a distance of its features called FVD.
        num_features: D; None finds out with a black clip.
    """

    def __init__(
        self,
        module: Callable[..., Tensor],
        name: str,
        sha256: str,
        is_reference: bool,
        num_features: int | None = None,
    ) -> None:
        self.module = module.eval() if isinstance(module, nn.Module) else module
        self.name, self.sha256, self.is_reference = name, sha256, is_reference
        self._device = torch.device("cpu")
        self.num_features = num_features or self(torch.zeros(1, 16, 3, 64, 64)).shape[1]

    @property
    def label(self) -> str:
        """What a distance of these features is called: FVD only for the published network."""
        return "FVD" if self.is_reference else f"Frechet distance of {self.name} features, not FVD"

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Features (N, D), float32, of videos (N, T, 3, H, W), uint8 or floats in [0, 1], on the videos' device.

        Raises:
            ValueError: for another shape or range, for values that are not finite, or too few frames for the network.
        """
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"the network {self.name!r} takes videos (N, T, 3, H, W), got {tuple(video.shape)}")
        if video.dtype != torch.uint8:
            check_range(video, "videos", finite=True)
        if video.device != self._device and isinstance(self.module, nn.Module):
            self.module.to(video.device)
            self._device = video.device
        features = [self._features(part) for part in video.split(BATCH_SIZE)]
        return torch.cat(features) if features else video.new_zeros(0, self.num_features, dtype=torch.float32)

    def _features(self, video: Tensor) -> Tensor:
        pixels = video.float() if video.dtype == torch.uint8 else video.float().clamp(0, 1) * 255
        try:
            found = self.module(pixels.transpose(1, 2).contiguous(), rescale=True, resize=True, return_features=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the network {self.name!r} fails on videos of {video.shape[1]} frames of {video.shape[3]} x "
                f"{video.shape[4]} pixels (I3D needs ten frames or more): {str(error).strip().splitlines()[-1]}"
            ) from error
        if found.ndim != 2 or len(found) != len(video):
            raise ValueError(f"the network {self.name!r} gives {tuple(found.shape)}, not ({len(video)}, D)")
        return found.float()


def find_feature_network(
    name: str = "i3d", path: str | os.PathLike[str] | None = None, sha256: str | None = None
) -> FeatureNetwork | Missing:
    """The feature network of that name, if its weights are on this disk; nothing is downloaded.

    Args:
        name: ``"i3d"``, or ``"random"`` for a tiny one with random weights, which serves to try things out.
        path: of its TorchScript file; see :func:`find_weights`.
        sha256: that the file must have, to use another network with the same call convention, which is then no
            reference. TorchScript is a program, so one without a known SHA-256 is not loaded.

    Raises:
        ValueError: if there is no such network, no such file, or it has another SHA-256 or is no TorchScript.
    """
    if name == RANDOM:
        return random_network()
    if name not in NUM_FEATURES:
        raise ValueError(f"there is no feature network {name!r}: choose from {', '.join([*NUM_FEATURES, RANDOM])}")
    found = find_weights(name, path, sha256)
    if isinstance(found, Missing):
        return found
    try:
        with warnings.catch_warnings():  # TorchScript is deprecated, and the published network is in no other form
            warnings.simplefilter("ignore")
            module = torch.jit.load(io.BytesIO(found.content), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{found.path} is no TorchScript file: {str(error).strip().splitlines()[-1]}") from error
    if found.is_reference:
        return FeatureNetwork(module, name, found.sha256, True, NUM_FEATURES[name])
    return FeatureNetwork(module, found.path.name, found.sha256, False)


class RandomFeatures(nn.Module):
    """A tiny network with random weights and the call convention of I3D; its distances mean nothing.

    Args:
        num_features: D.
        seed: of the weights.
    """

    projection: Tensor

    def __init__(self, num_features: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(2 * 3 * 4 * 4, num_features, generator=generator)
        self.register_buffer("projection", weights / weights.shape[0] ** 0.5)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        """Features (N, D) of videos (N, 3, T, H, W)."""
        if rescale:
            x = x * (2.0 / 255.0) - 1.0
        pooled = nn.functional.adaptive_avg_pool3d(x if resize else x / 2.0, (2, 4, 4)).flatten(1)
        features = torch.tanh(pooled @ self.projection)
        return features if return_features else torch.softmax(features, 1)


def random_network(num_features: int = 16, seed: int = 0) -> FeatureNetwork:
    """A :class:`FeatureNetwork` of random weights."""
    module = RandomFeatures(num_features, seed)
    digest = hashlib.sha256(module.projection.numpy().tobytes()).hexdigest()
    return FeatureNetwork(module, RANDOM, digest, False, num_features)
