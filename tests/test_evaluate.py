"""evaluate.py: which encoder a seed takes, and the features of the linear probe."""

import numpy as np
import pytest
import torch
from torchvision.transforms import Normalize

from common import toy
from common.encoder import IMAGENET_MEAN, IMAGENET_STD, encoder_hash, features, load_encoder
from common.tables import read_results


def test_evaluate_gives_the_seeds_the_encoders_in_turns(tmp_path, stopped, here):
    toy.write_tasks(tmp_path, size=32)
    paths = [tmp_path / f"run-{i}" / "encoder.pt" for i in range(3)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        torch.save(load_encoder("scratch", "resnet18", i).state_dict(), path)
    common = [
        "evaluate.py",
        "toy-lesion",
        tmp_path,
        "--arch",
        "resnet18",
        "--size",
        32,
        "--protocol",
        "linear",
    ]
    common += ["--results", tmp_path / "results.csv", "--encoder", *paths, "--seeds"]
    here(*common, 5)
    rows = read_results(tmp_path / "results.csv")
    assert [(row["seed"], row["encoder"]) for row in rows] == [
        (str(i), encoder_hash(paths[i % 3])) for i in range(5)
    ]
    assert len({row["auc"] for row in rows}) > 1 and all(row["name"] == "run-0" for row in rows)
    assert "leaves some of the 3 encoders unused" in stopped(*common, 2)


@pytest.mark.parametrize("statistics", [((0.5,) * 3, (0.5,) * 3), (IMAGENET_MEAN, IMAGENET_STD)])
def test_features_are_those_of_the_plain_forward(statistics):
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32), dtype=np.uint8)
    network = load_encoder("scratch", "resnet18", 0).train()
    network(torch.rand(16, 3, 32, 32))  # batch norm with statistics of its own
    colours = torch.from_numpy(images).float().div(255)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        expected = network.eval()(Normalize(*statistics)(colours)).numpy()
    cpu = torch.device("cpu")
    found = [np.concatenate(list(features(network, images, statistics, cpu, ""))) for _ in range(2)]
    assert np.abs(found[0] - expected).max() < 1e-5 * np.abs(expected).max() and np.array_equal(
        *found
    )
