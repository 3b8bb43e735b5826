"""Reading one sample's files: everything in them is outside data and may be wrong.

Shapes: N points of a cloud, C = 6 channels (xyz, unit normal).
"""

import json
import math
import warnings
import zipfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.normalise import normalise
from cad_mllm.config import TargetFormat
from cad_mllm.errors import CadError, DataError

FloatArray = npt.NDArray[np.float32]

POINT_KEYS = ("points", "xyz")
MAX_POINTS_BYTES = 2**29
"""Most bytes of a file of points, unpacked."""
_ZIP_MAGIC = b"PK\x03\x04"
_NPY_LENGTH = slice(8, 10)
"""Where a .npy of version 1.0 has, behind magic and version, the length of the header that follows."""
_WHITE = (255, 255, 255)
_NO_RANGE = ("I", "F")
"""Picture modes whose values have no agreed white."""


class UnusableFileError(DataError):
    """A file of a sample that cannot be used; `reason` begins with a category, then `: ` and details."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives the way out of a worker process
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_target(path: Path, target_format: TargetFormat, bits: int) -> str:
    """The text that a sample teaches, from its Omni-CAD JSON; UnusableFileError for an invalid program."""
    try:
        program = omnicad.read(path)
        if target_format == "command":
            return codec.encode(normalise(program).program, bits=bits)
        return json.dumps(json.loads(path.read_bytes()), separators=(",", ":"), ensure_ascii=False)
    except CadError as error:
        detail = str(error).removeprefix(f"{path}: ")
        raise UnusableFileError(path, f"unusable model: {detail}") from error


def load_points(path: Path) -> FloatArray:
    """A cloud (N, 6), N >= 1, finite, with normals; UnusableFileError for anything else."""
    return _checked_points(_read_points(path), path).astype(np.float32, copy=False)


def check_points(path: Path) -> None:
    """Raise what `load_points` would."""
    _checked_points(_read_points(path), path)


def _read_points(path: Path) -> npt.NDArray[np.generic]:
    try:
        plain = _plain_points(path)
        return _raw_points(path) if plain is None else plain
    except Exception as error:  # numpy's and zip's readers raise many types on broken bytes
        # numpy's own words advise to unpickle the file.
        reason = "no array of numbers in it" if "pickle" in str(error) else error
        raise UnusableFileError(path, f"unreadable points: {reason}") from error


def _plain_points(path: Path) -> npt.NDArray[np.generic] | None:
    """What `_raw_points` reads, a third of the time, of what `np.savez` writes.

    None for all else, be it another layout or a broken file: `_raw_points` has the say on that.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                return None
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                name = next(name for key in POINT_KEYS for name in (key, f"{key}.npy") if name in names)
                if sum(member.file_size for member in archive.infolist()) > MAX_POINTS_BYTES:
                    return None
                content = archive.read(name)  # compares the checksum
        start = _NPY_LENGTH.stop + int.from_bytes(content[_NPY_LENGTH], "little")
        shape, fortran_order, dtype = _npy_header(content[:start])
        if fortran_order or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - start:
            return None
        return np.frombuffer(content, dtype, offset=start).reshape(shape)
    except Exception:
        return None


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, order and dtype; numpy parses them as Python source, and they are those of the last file."""
    file = BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version")
    return np.lib.format.read_array_header_1_0(file)


def _raw_points(path: Path) -> npt.NDArray[np.generic]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        # A few packed kilobytes can hold more than the machine does.
        if (size := sum(member.file_size for member in loaded.zip.infolist())) > MAX_POINTS_BYTES:
            raise ValueError(f"{size:,} bytes when unpacked: at most {MAX_POINTS_BYTES:,} are read")
        for key in POINT_KEYS:
            if key in loaded:
                return np.asarray(loaded[key])
    raise ValueError(f"none of the keys {', '.join(POINT_KEYS)}")


def _checked_points(
    points: npt.NDArray[np.generic], path: Path
) -> npt.NDArray[np.float16] | npt.NDArray[np.float32]:
    if points.dtype.kind not in "fiu" or points.ndim != 2 or points.shape[1] not in (3, 6):
        raise UnusableFileError(
            path, f"points of a wrong form: {points.dtype} {points.shape}, not numbers (N, 6)"
        )
    if len(points) == 0:
        raise UnusableFileError(path, "no points in the file")
    if points.shape[1] == 3:
        raise UnusableFileError(path, "points without normals: (N, 3); make them with cad-mllm prepare")
    points_NC: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    if points.dtype == np.float16:  # finite, and zero, where its float32 is
        points_NC = points.astype(np.float16, copy=False)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused as such
            points_NC = points.astype(np.float32)
    if not np.isfinite(points_NC).all():
        raise UnusableFileError(path, "points that are not finite (NaN or infinite)")
    if not points_NC[:, 3:].any():
        raise UnusableFileError(path, "points without normals: all zero; make them with cad-mllm prepare")
    return points_NC


def load_image(path: Path) -> Image.Image:
    """A fully decoded RGB picture, transparent parts white; UnusableFileError for a broken or cut file."""
    try:
        with path.open("rb") as file:
            return decode_image(file, path)
    except OSError as error:
        raise UnusableFileError(path, f"unreadable image: {error}") from error


def decode_image(file: IO[bytes], place: Path | str) -> Image.Image:
    """`load_image` of an open file, which errors call `place`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.verify()
            # verify() leaves the object unusable, and does not see a missing tail
            file.seek(0)
            with Image.open(file) as image:
                if image.mode in _NO_RANGE:
                    raise ValueError("32 bits a pixel: save it with 8 or 16")
                if image.mode == "RGB" and "transparency" not in image.info:
                    image.load()
                    return image
                rgba = image.convert("RGBA")
    except Exception as error:  # decoders raise many types on broken bytes
        raise UnusableFileError(place, f"unreadable image: {error}") from error
    picture = Image.new("RGB", rgba.size, _WHITE)
    picture.paste(rgba, mask=rgba.getchannel("A"))
    return picture
