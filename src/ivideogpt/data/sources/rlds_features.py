"""What features.json of tensorflow-datasets says of an RLDS record, and how each kind of feature is decoded."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.sources.tfrecord import Feature

TEXT_DTYPES = ("string", "str", "object")
NUMBER_KINDS = "iufb"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One feature: its kind in features.json, the shape of one value (None: any length) and its type."""

    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is one string."""
        return self.kind == "text" or (self.kind == "tensor" and not self.shape and self.dtype in TEXT_DTYPES)

    @property
    def is_number(self) -> bool:
        """Whether it is an array of numbers whose size is known."""
        if self.kind != "tensor" or None in self.shape:
            return False
        try:
            return np.dtype(self.dtype).kind in NUMBER_KINDS
        except TypeError:  # bfloat16 and others that numpy does not know
            return False

    @property
    def is_small(self) -> bool:
        """Whether it is so few numbers that they may stand in JSON."""
        return self.is_number and math.prod(size or 0 for size in self.shape) <= 64


def read_features(content: dict[str, Any], path: Path) -> dict[str, Leaf]:
    """Features by their key in a record, such as `steps/observation/image`.

    Raises:
        ValueError: Not the description of an RLDS data set.
    """
    try:
        features = dict(content["featuresDict"]["features"])
        steps = features.pop("steps")["sequence"]["feature"]
        leaves = {name: leaf for key, node in features.items() for name, leaf in _leaves(node, key)}
        return leaves | dict(_leaves(steps, "steps"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} describes no RLDS episodes (a data set `steps` of features): {error!r}") from error


def _leaves(node: dict[str, Any], name: str) -> list[tuple[str, Leaf]]:
    if "featuresDict" in node:
        children = node["featuresDict"]["features"].items()
        return [pair for key, child in children for pair in _leaves(child, f"{name}/{key}")]
    kind = next((key for key in node if key != "pythonClassName" and isinstance(node[key], dict)), "")
    body = node.get(kind, {})
    if kind == "classLabel":
        return [(name, Leaf("tensor", (), "int64"))]
    # an older tensorflow-datasets writes an unknown length as -1 or 0
    sizes = (int(size) for size in (body.get("shape") or {}).get("dimensions", []))
    shape = tuple(size if size > 0 else None for size in sizes)
    if body.get("encoding", "none") not in ("none", "ENCODING_UNSPECIFIED"):
        kind = f"{body['encoding']}-coded {kind}"  # raw or deflated bytes, which no step of ours needs
    return [(name, Leaf(kind, shape, str(body.get("dtype") or ("uint8" if kind == "image" else ""))))]


def decode_frames(features: dict[str, Feature], name: str, leaf: Leaf) -> np.ndarray:
    """Frames uint8 (T, H, W, 3) of coded images or of a plain array of bytes.

    Raises:
        ValueError: None there, an image that does not decode, or frames of different sizes.
    """
    feature = _found(features, name)
    if leaf.kind == "tensor":
        values = decode_numbers(features, name, leaf, None)
        return np.ascontiguousarray(values.astype(np.uint8))
    if isinstance(feature, np.ndarray):
        if not feature.size:
            raise ValueError(f"{name} has no frame: the episode is empty")
        raise ValueError(f"{name} holds {feature.dtype} where features.json says coded images")
    if not feature:
        raise ValueError(f"{name} has no frame: the episode is empty")
    frames = [_picture(data, f"{name}, frame {number}", leaf) for number, data in enumerate(feature)]
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"{name} mixes frames of {sizes[0]} and {sizes[1]} pixels")
    return np.stack(frames)


def _picture(data: memoryview, name: str, leaf: Leaf) -> np.ndarray:
    """One image (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            # before it is decoded, so that a false header cannot take all memory
            for size, said in zip((image.height, image.width), leaf.shape, strict=False):
                if said not in (None, size):
                    text = f"{image.height} x {image.width} pixels, features.json says {leaf.shape}"
                    raise ValueError(text)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} does not decode: {error}") from error


def decode_numbers(features: dict[str, Feature], name: str, leaf: Leaf, length: int | None) -> np.ndarray:
    """Numbers (T, *shape) of `length` steps, or of as many as there are.

    Raises:
        ValueError: None there, or another number or kind than features.json says.
    """
    feature = _found(features, name)
    if not isinstance(feature, np.ndarray):
        raise ValueError(f"{name} holds byte strings where features.json says {leaf.dtype}")
    if not leaf.is_number:
        raise ValueError(f"{name}: features of kind {leaf.kind!r}, {leaf.dtype} {leaf.shape} cannot be read as numbers")
    shape = [size or 0 for size in leaf.shape]
    width = math.prod(shape)
    if length is None:
        length = feature.size // width
        if length == 0:
            raise ValueError(f"{name} has no frame: the episode is empty")
    if feature.size != length * width:
        raise ValueError(f"{name} has {feature.size} numbers; {length} of shape {tuple(shape)} are needed")
    return feature.reshape(length, *shape).astype(leaf.dtype)


def decode_texts(features: dict[str, Feature], name: str, length: int) -> list[str]:
    """`length` strings.

    Raises:
        ValueError: None there, or another number or kind of them.
    """
    feature = _found(features, name)
    if isinstance(feature, np.ndarray):
        raise ValueError(f"{name} holds numbers where features.json says text")
    if len(feature) != length:
        raise ValueError(f"{name} has {len(feature)} texts for {length} step(s)")
    return [bytes(data).decode("utf-8", "replace") for data in feature]


def _found(features: dict[str, Feature], name: str) -> Feature:
    if name not in features:
        raise ValueError(f"the record has no {name}, which features.json promises")
    return features[name]
