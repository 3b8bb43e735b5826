"""Points are read the short way where that is sure, and everything else as numpy reads it."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cad_mllm.data import files
from cad_mllm.data.files import UnusableFileError, check_points, load_points

Array = npt.NDArray[np.generic]


def cloud(count: int = 7) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(count)
    return np.concatenate([rng.normal(size=(count, 3)), np.tile([[0.0, 0.0, 1.0]], (count, 1))], axis=1)


def packed(save: Callable[..., None] = np.savez, **arrays: npt.ArrayLike) -> bytes:
    file = BytesIO()
    save(file, **arrays)
    return file.getvalue()


def outcome(read: Callable[[Path], Array | None], path: Path) -> tuple[object, ...]:
    try:
        found = read(path)
    except Exception as error:
        return type(error), str(error)
    assert found is not None
    return found.dtype, found.shape, found.tobytes()


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", "<f8", "<i4", "|u1"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("points",), ("xyz", "scale"), ("scale", "points", "xyz")])
def test_points_are_read_as_numpy_reads_them(
    tmp_path: Path, dtype: str, save: Callable[..., None], names: tuple[str, ...]
) -> None:
    path = tmp_path / "cloud.npz"
    arrays = {name: cloud(5 + place).astype(dtype) for place, name in enumerate(names)}
    path.write_bytes(packed(save, **arrays))
    plain = files._plain_points(path)
    assert plain is not None
    assert outcome(files._plain_points, path) == outcome(files._raw_points, path)
    points_NC = load_points(path)
    expected = arrays["points" if "points" in names else "xyz"].astype(np.float32)
    assert points_NC.dtype == np.float32 and points_NC.flags.writeable
    assert np.array_equal(points_NC, expected)
    check_points(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_short_way_never_takes_what_numpy_refuses_or_reads_otherwise(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    """Each byte of a file in turn is wrong."""
    path = tmp_path / "cloud.npz"
    whole = packed(save, points=cloud(3).astype(np.float16), scale=np.float64(2))
    taken = 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        if files._plain_points(path) is not None:
            taken += 1
            assert outcome(files._plain_points, path) == outcome(files._raw_points, path), place
    assert 0 < taken < len(whole)  # bytes that nobody reads: times, attributes, padding


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 300, -22, -1])
def test_cut_files_are_refused_in_numpys_words(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cloud.npz"
    path.write_bytes(packed(points=cloud().astype(np.float16))[:kept])
    assert files._plain_points(path) is None
    with pytest.raises(UnusableFileError, match="unreadable points: "):
        check_points(path)


def test_more_than_may_be_unpacked_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cloud.npz"
    path.write_bytes(packed(np.savez_compressed, points=cloud(), ballast=np.zeros(1000)))
    monkeypatch.setattr(files, "MAX_POINTS_BYTES", 5000)
    assert files._plain_points(path) is None
    with pytest.raises(UnusableFileError, match="bytes when unpacked: at most 5,000 are read"):
        check_points(path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda points: points[:0], "no points in the file"),
        (lambda points: points[:, :3], "points without normals: \\(N, 3\\)"),
        (lambda points: points * [1, 1, 1, 0, 0, 0], "points without normals: all zero"),
        (lambda points: points * [1, 1, np.nan, 1, 1, 1], "points that are not finite"),
        (lambda points: points + np.array([np.inf, 0, 0, 0, 0, 0]), "points that are not finite"),
        (lambda points: points[None], "points of a wrong form"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_unusable_points_are_refused_by_check_and_load_alike(
    tmp_path: Path, spoil: Callable[[Array], Array], reason: str, dtype: type[np.floating]
) -> None:
    path = tmp_path / "cloud.npz"
    path.write_bytes(packed(points=spoil(cloud()).astype(dtype)))
    for read in (check_points, load_points):
        with pytest.raises(UnusableFileError, match=reason):
            read(path)


def test_a_double_beyond_float32_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "cloud.npz"
    path.write_bytes(packed(points=cloud() * 1e300))
    with pytest.raises(UnusableFileError, match="not finite"):
        check_points(path)
