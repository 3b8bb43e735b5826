"""What a model was given, as one picture for a person: the image, the point cloud, or both side by side."""

import numpy as np
from PIL import Image

from cad_mllm.cad.render import HALF_WIDTH, VIEW_DIRECTIONS
from cad_mllm.data.files import FloatArray


def draw_input(image: Image.Image | None, points_NC: FloatArray | None, size: int) -> Image.Image | None:
    """Picture of what was given besides the caption, `size` pixels high; None if that is nothing."""
    pictures = []
    if image is not None:
        pictures.append(image.convert("RGB").resize((size, size)))
    if points_NC is not None:
        pictures.append(_draw_points(points_NC, size))
    if not pictures:
        return None
    sheet = Image.new("RGB", (size * len(pictures), size), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (size * number, 0))
    return sheet


def _draw_points(points_NC: FloatArray, size: int) -> Image.Image:
    """The point cloud from the camera of the first view, nearer points darker, at any scale."""
    azimuth, elevation = np.radians(VIEW_DIRECTIONS[0])
    towards = np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    up = np.cross(towards, right)
    xyz_N3 = points_NC[:, :3] / max(float(np.abs(points_NC[:, :3]).max()), 1e-30)
    depth_N = xyz_N3 @ towards
    order = np.argsort(depth_N)
    half = size / 2
    column = np.clip(half + xyz_N3 @ right * half / HALF_WIDTH, 0, size - 2).astype(int)[order]
    row = np.clip(half - xyz_N3 @ up * half / HALF_WIDTH, 0, size - 2).astype(int)[order]
    shade = np.interp(depth_N[order], (-1.2, 1.2), (205, 40)).astype(np.uint8)
    canvas = np.full((size, size, 3), 255, dtype=np.uint8)
    for dy in (0, 1):
        for dx in (0, 1):
            canvas[row + dy, column + dx] = np.stack([shade, shade, np.minimum(shade + 35, 255)], axis=1)
    return Image.fromarray(canvas)
