"""From flags to folders."""

from pathlib import Path

import pytest

from cad_mllm.config import DataConfig
from cad_mllm.data.layout import Source, id_fault, walk_files
from cad_mllm.errors import ConfigError, DataError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def test_one_path_stands_for_four(tmp_path: Path) -> None:
    root = make(tmp_path, "json", "txt", "pcd", "img")
    source = Source.from_config(DataConfig(train_data_path=root), "train")
    assert source == Source(text=root / "txt", json=root / "json", points=root / "pcd", images=root / "img")
    assert Source.from_config(DataConfig(train_data_path=root), "val") is None
    assert Source.from_config(DataConfig(val_data_path=root), "val") == source


def test_the_other_name_for_points_is_known(tmp_path: Path) -> None:
    root = make(tmp_path, "json", "txt", "pointcloud")
    (root / "pointcloud" / "a.npz").write_bytes(b"x")
    source = Source.from_folder(root)
    assert source.points == root / "pointcloud"
    assert source.points_file("a") == root / "pointcloud" / "a.npz"
    assert source.points_file("b") is None


def test_a_single_path_wins_over_the_common_one(tmp_path: Path) -> None:
    root, other = make(tmp_path / "root", "json", "txt"), make(tmp_path / "other")
    other.mkdir(parents=True)
    source = Source.from_config(DataConfig(train_data_path=root, omnicad_img_root=other), "train")
    assert source is not None
    assert (source.images, source.json) == (other, root / "json")


def test_points_and_images_may_be_left_out(tmp_path: Path) -> None:
    root = make(tmp_path, "json", "txt")
    source = Source.from_config(
        DataConfig(omnicad_txt_path=root / "txt", omnicad_json_root=root / "json"), "train"
    )
    assert source == Source(text=root / "txt", json=root / "json", points=None, images=None)


def test_a_missing_flag_is_named(tmp_path: Path) -> None:
    root = make(tmp_path, "json", "txt")
    with pytest.raises(ConfigError, match="--omnicad_txt_path"):
        Source.from_config(DataConfig(omnicad_json_root=root / "json"), "train")
    with pytest.raises(ConfigError, match="--omnicad_json_root"):
        Source.from_config(DataConfig(omnicad_txt_path=root / "txt"), "train")


@pytest.mark.parametrize(
    "flag",
    ["omnicad_txt_path", "omnicad_json_root", "omnicad_pc_root", "omnicad_img_root", "train_data_path"],
)
def test_a_path_that_does_not_exist_is_named_with_its_flag(flag: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"--{flag}"):
        Source.from_config(DataConfig(**{flag: tmp_path / "nowhere"}), "train")


def test_the_legacy_folder_is_used_if_nothing_else_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--train_data_path"):
        Source.from_config(DataConfig(), "train")
    make(tmp_path / "data" / "Omni-CAD", "json", "txt", "pcd", "img")
    source = Source.from_config(DataConfig(), "train")
    assert source is not None
    assert source.json == Path("data/Omni-CAD/json")


@pytest.mark.parametrize("good", ["0000/00000071_00005", "a", "a/b/c", "0000/..x", "café/1"])
def test_good_ids_pass(good: str) -> None:
    assert id_fault(good) is None


@pytest.mark.parametrize("bad", ["..", "a/..", "../a", "/a", "a/", "a//b", ".", "a\\b", "a\0", "", "\ud800"])
def test_bad_ids_are_refused(bad: str) -> None:
    assert id_fault(bad) is not None


def test_files_are_found_through_links_but_not_around_in_circles(tmp_path: Path) -> None:
    root = make(tmp_path, "root/0000", "elsewhere") / "root"
    (tmp_path / "elsewhere" / "a.json").write_text("{}")
    (root / "0001").symlink_to(tmp_path / "elsewhere")
    (root / "0002").symlink_to(tmp_path / "elsewhere")
    (root / "nowhere.json").symlink_to(tmp_path / "none")
    assert [name for name, _ in walk_files(root)] == ["0001/a.json", "0002/a.json"]
    (root / "0000" / "up").symlink_to(root)
    with pytest.raises(DataError, match="0000/up is a link to a folder above it"):
        list(walk_files(root))
