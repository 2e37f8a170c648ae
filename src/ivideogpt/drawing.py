"""Drawing of videos: strips and animations of truth | prediction | error, contact sheets; PNG, GIF and MP4 files.

T frames, B clips, H x W pixels. Everywhere a video is uint8 (T, H, W, 3), or several below each other (B, T, H, W, 3);
a tensor (T, C, H, W) or (B, T, C, H, W), floats in [0, 1] or uint8, is converted. Images are uint8 (H, W, 3).
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROWS = ("truth", "prediction", "|error|")
CAPTION_HEIGHT = 14
CAPTION_WIDTH = 62
BACKGROUND = (255, 255, 255)
INK = (60, 60, 60)
CONTEXT_INK = (30, 100, 200)
GAP = 2

Video = np.ndarray | torch.Tensor


def to_uint8(video: Video) -> np.ndarray:
    """Video as uint8 (..., H, W, 3): of a tensor (..., C, H, W), floats in [0, 1] or uint8; an array stays.

    Raises:
        ValueError: if an array is not uint8 (..., H, W, 3), or a tensor not of 1 or 3 channels.
    """
    if isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim < 3 or video.shape[-1] != 3:
            raise ValueError(f"an array must be uint8 (..., H, W, 3), got {video.dtype} {video.shape}")
        return video
    if video.ndim < 3 or video.shape[-3] not in (1, 3):
        raise ValueError(f"a tensor must be (..., C, H, W) with 1 or 3 channels, got {tuple(video.shape)}")
    video = video.detach().cpu()
    if video.is_floating_point():
        video = (video.float().clamp(0, 1) * 255).round().byte()
    frames = video.movedim(-3, -1).numpy()
    return frames if frames.shape[-1] == 3 else frames.repeat(3, axis=-1)


def _clips(video: Video) -> np.ndarray:
    frames = to_uint8(video)
    if frames.ndim == 4:
        frames = frames[None]
    if frames.ndim != 5 or 0 in frames.shape:
        raise ValueError(f"expected a video (T, H, W, 3) or (B, T, H, W, 3), got shape {frames.shape}")
    return frames


def _enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    if scale < 1:
        raise ValueError(f"scale must be an integer >= 1, got {scale!r}")
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _three_rows(truth: Video, prediction: Video) -> list[np.ndarray]:
    """Truth, prediction and absolute error, each (B, T, H, W, 3)."""
    first, second = _clips(truth), _clips(prediction)
    if first.shape != second.shape:
        raise ValueError(f"truth and prediction differ in shape: {first.shape} and {second.shape}")
    error = np.abs(first.astype(np.int16) - second).astype(np.uint8)
    return [first, second, error]


def _write(canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, ink: tuple[int, int, int]) -> None:
    canvas.text(place, text, fill=ink, font=ImageFont.load_default(size=10))


def strip(truth: Video, prediction: Video, context_length: int = 0, scale: int | None = None) -> np.ndarray:
    """One image (H', W', 3): time to the right; below each other truth, prediction and |error| of every clip.

    Args:
        truth: (T, H, W, 3) or (B, T, H, W, 3).
        prediction: like ``truth``.
        context_length: so many first frames were given to the model; their numbers are written in blue.
        scale: enlargement of a frame; None brings small frames to at least 64 pixels.
    """
    rows = _three_rows(truth, prediction)
    clips, length, height = rows[0].shape[:3]
    scale = scale or -(-64 // height)
    rows = [_enlarge(row, scale) for row in rows]
    height, width = rows[0].shape[2:4]
    clip_height = len(rows) * (height + GAP) + 2 * GAP
    image = Image.new("RGB", (CAPTION_WIDTH + length * (width + GAP), CAPTION_HEIGHT + clips * clip_height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for time in range(length):
        left = CAPTION_WIDTH + time * (width + GAP)
        _write(canvas, (left + 2, 0), str(time), CONTEXT_INK if time < context_length else INK)
    for clip in range(clips):
        for index, row in enumerate(rows):
            top = CAPTION_HEIGHT + clip * clip_height + index * (height + GAP)
            _write(canvas, (2, top + height / 2 - 6), ROWS[index], INK)
            for time in range(length):
                image.paste(Image.fromarray(row[clip, time]), (CAPTION_WIDTH + time * (width + GAP), top))
    return np.asarray(image)


def comparison(truth: Video, prediction: Video, context_length: int = 0, scale: int | None = None) -> np.ndarray:
    """Frames (T, H', W', 3) of an animation: truth | prediction | error beside each other, clips below each other.

    Args:
        truth: (T, H, W, 3) or (B, T, H, W, 3).
        prediction: like ``truth``.
        context_length: so many first frames were given to the model; their captions say so.
        scale: enlargement of a frame; None brings small frames to at least 128 pixels.
    """
    columns = _three_rows(truth, prediction)
    clips, length, height = columns[0].shape[:3]
    scale = scale or -(-128 // height)
    columns = [_enlarge(column, scale) for column in columns]
    height, width = columns[0].shape[2:4]
    size = (3 * (width + GAP) - GAP, CAPTION_HEIGHT + clips * (height + GAP) - GAP)
    frames = []
    for time in range(length):
        image = Image.new("RGB", size, BACKGROUND)
        canvas = ImageDraw.Draw(image)
        for index, column in enumerate(columns):
            given = time < context_length
            caption = f"{ROWS[index]} {time}" if index == 0 else "context" if index == 1 and given else ROWS[index]
            left = index * (width + GAP)
            _write(canvas, (left + 2, 0), caption, CONTEXT_INK if given else INK)
            for clip in range(clips):
                image.paste(Image.fromarray(column[clip, time]), (left, CAPTION_HEIGHT + clip * (height + GAP)))
        frames.append(np.asarray(image))
    return np.stack(frames)


def contact_sheet(videos: Sequence[Video], captions: Sequence[str] = (), scale: int = 1) -> np.ndarray:
    """One image (H', W', 3) with a row of frames for each video; the videos may differ in length and size.

    Args:
        videos: each (T, H, W, 3).
        captions: a line over each row.
        scale: enlargement of a frame.
    """
    if not videos or len(captions) not in (0, len(videos)):
        raise ValueError(f"need at least one video and a caption for each or none, got {len(videos)}, {len(captions)}")
    rows = [_enlarge(_clips(video)[0], scale) for video in videos]
    head = CAPTION_HEIGHT if captions else 0
    width = max(row.shape[0] * (row.shape[2] + GAP) for row in rows)
    image = Image.new("RGB", (width, sum(head + row.shape[1] + GAP for row in rows)), BACKGROUND)
    canvas, top = ImageDraw.Draw(image), 0
    for index, row in enumerate(rows):
        if captions:
            _write(canvas, (2, top), captions[index], INK)
        for time, frame in enumerate(row):
            image.paste(Image.fromarray(frame), (time * (frame.shape[1] + GAP), top + head))
        top += head + row.shape[1] + GAP
    return np.asarray(image)


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """PNG file of an image (H, W, 3)."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(to_uint8(image))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def gif_bytes(video: Video, fps: float = 4.0) -> bytes:
    """Endless GIF of a video (T, H, W, 3).

    All frames share one palette of 256 colours, so that still parts do not flicker. Equal frames in a row are stored
    as one that is shown longer.
    """
    frames = [Image.fromarray(frame) for frame in _clips(video)[0]]
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps!r}")
    joined = Image.fromarray(np.concatenate(_clips(video)[0], axis=0))
    palette = joined.quantize(colors=256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    # browsers slow frames shorter than 20 ms down to 100 ms
    duration = max(20, round(1000 / fps))
    indexed[0].save(buffer, format="GIF", save_all=True, append_images=indexed[1:], duration=duration, loop=0)
    return buffer.getvalue()


def mp4_bytes(video: Video, fps: float = 4.0) -> bytes:
    """H.264 file of a video (T, H, W, 3), each pixel doubled.

    Players expect yuv420p, which halves the colour resolution; doubled, no pixel of a small frame loses its colour.

    Raises:
        ModuleNotFoundError: if PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing .mp4 needs PyAV: pip install 'ivideogpt[video]', or choose .gif or .png"
        ) from error
    frames = _enlarge(_clips(video)[0], 2)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: np.ndarray | Image.Image) -> None:
    """Writes an image (H, W, 3)."""
    replace_file(Path(path), png_bytes(image))


def save_video(path: str | os.PathLike[str], video: Video, fps: float = 4.0) -> None:
    """Writes a video (T, H, W, 3) as its file name ends: .gif, .mp4, or .png for a row of frames.

    Raises:
        ValueError: if it ends otherwise.
        ModuleNotFoundError: for .mp4, if PyAV is not installed.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".gif":
        data = gif_bytes(video, fps)
    elif kind == ".mp4":
        data = mp4_bytes(video, fps)
    elif kind == ".png":
        data = png_bytes(contact_sheet([video]))
    else:
        raise ValueError(f"{path} ends in {kind!r}; choose .gif, .mp4 or .png")
    replace_file(path, data)


def save_comparison(
    path: str | os.PathLike[str],
    truth: Video,
    prediction: Video,
    context_length: int = 0,
    scale: int | None = None,
    fps: float = 4.0,
) -> None:
    """Writes truth | prediction | error: an animation for .gif and .mp4, a strip for .png.

    Raises:
        ValueError: if the file name ends otherwise, or truth and prediction differ in shape.
        ModuleNotFoundError: for .mp4, if PyAV is not installed.
    """
    if Path(path).suffix.lower() == ".png":
        save_png(path, strip(truth, prediction, context_length, scale))
    else:
        save_video(path, comparison(truth, prediction, context_length, scale), fps)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a whole file or leaves the old one: to a temporary file beside it, which then takes its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp's own mode is for its owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
