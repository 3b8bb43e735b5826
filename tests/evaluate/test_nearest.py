"""The baseline that a model must beat: the nearest training model, and that it is the nearest indeed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cad_mllm.data.clouds import squared_chamfer
from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.data.files import load_points
from cad_mllm.errors import DataError
from cad_mllm.evaluate.clouds import Models
from cad_mllm.evaluate.nearest import agreement, chamfer, find_nearest, write_predictions
from cad_mllm.evaluate.run import evaluate
from tests.data.sharding import shard_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dummy")
    write_dummy_data(root, num_samples=30, seed=1, workers=2, views=0, points=2048)
    return root


def test_the_distance_is_that_of_a_search_tree() -> None:
    rng = np.random.default_rng(1)
    query, clouds = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((70, 3), (9, 50, 3)))
    distances = chamfer(torch.from_numpy(query), torch.from_numpy(clouds))
    expected = [squared_chamfer(query, cloud) for cloud in clouds]
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4)
    some = chamfer(torch.from_numpy(query), torch.from_numpy(clouds), torch.tensor([7, 2]))
    np.testing.assert_allclose(some.numpy(), [expected[7], expected[2]], rtol=1e-4)


def test_the_shortlist_finds_what_the_exact_search_finds(dummy: Path) -> None:
    clouds = Models.find(dummy, "train").clouds(1024, workers=2)
    rng = np.random.default_rng(2)
    queries = (clouds[20:] + rng.normal(0, 0.05, clouds[20:].shape)).astype(np.float32)
    training = np.ascontiguousarray(clouds[:20])
    found = find_nearest(queries, training, shortlist=5, device=CPU)
    for query, one in zip(queries, found, strict=True):
        distances = [squared_chamfer(query, cloud) for cloud in training]
        assert one.number == int(np.argmin(distances))
        assert one.distance == pytest.approx(min(distances), rel=1e-3)
    same, ratio = agreement(queries, training, found, device=CPU)
    assert same == 10 and ratio == pytest.approx(1.0)
    wrong = [type(one)(number=(one.number + 1) % 20, distance=2 * one.distance) for one in found]
    assert agreement(queries, training, wrong, device=CPU)[0] == 0


def test_clouds_are_those_of_the_models_loose_or_in_shards(dummy: Path, tmp_path: Path) -> None:
    loose = Models.find(dummy, "train")
    sharded = Models.find(shard_folder(dummy, tmp_path / "shards", rows=8, num_val=10), "val")
    assert list(sharded.ids) == list(loose.ids)[20:]
    clouds = loose.clouds(256, workers=1)
    assert clouds.shape == (30, 256, 3) and np.abs(clouds).max() <= 1.0
    np.testing.assert_allclose(sharded.clouds(256, workers=1), clouds[20:], atol=3e-3)  # of half precision
    assert json.loads(sharded.json(0)) == json.loads(loose.json(20))
    points = load_points(dummy / f"pcd/{loose.ids[3]}.npz")[:, :3]
    middle, half = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0).max() / 2
    normalised = {tuple(row) for row in np.round((points - middle) / half, 4)}
    assert {tuple(row) for row in np.round(clouds[3], 4)} <= normalised


def test_the_nearest_are_scored_like_any_prediction(dummy: Path, tmp_path: Path) -> None:
    models = Models.find(dummy, "train")
    clouds = models.clouds(512, workers=1)
    found = find_nearest(clouds, clouds, device=CPU)
    assert [one.number for one in found] == list(range(30))
    write_predictions(tmp_path / "out", models, models, found)
    evaluation = evaluate(tmp_path / "out", dummy, training=None, workers=2)
    assert evaluation.summary.counts["scored"] == 30
    iou = evaluation.summary.lines["iou"].mean
    assert iou is not None and iou.value == pytest.approx(1.0, abs=1e-6)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither json/ nor dataset\.json"):
        Models.find(tmp_path, "train")
    (tmp_path / "json").mkdir()
    with pytest.raises(DataError, match="holds no models"):
        Models.find(tmp_path, "train")
