"""Weights go in whole or not at all, from every layout that the authors published."""

import argparse
import os
import pickle
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torchvision

from common import encoder
from common.encoder import load_encoder


@pytest.fixture
def network():
    return load_encoder("scratch", "resnet18", 3).eval()


def layouts(weights):
    """Ours, and those of the authors' checkpoints, with the heads that lie beside the encoder."""

    def under(prefix):
        return {prefix + key: value for key, value in weights.items()}

    head = torch.ones(2, 2)
    return {
        "ours": weights,
        "SwAV": {
            "state_dict": under("model.")
            | {"model.prototypes.weight": head, "model.projection_head.0.weight": head}
        },
        "MoCo": {
            "state_dict": under("encoder_q.")
            | {"encoder_q.fc.0.weight": head}
            | under("encoder_k."),
            "epoch": 3,
        },
        "BYOL": {"state_dict": under("online_network.encoder.") | under("target_network.encoder.")},
        "SparK": {"module": weights, "arch": "resnet18"},
    }


@pytest.mark.parametrize("layout", ["ours", "SwAV", "MoCo", "BYOL", "SparK"])
def test_a_checkpoint_of_each_layout_gives_the_same_features(tmp_path, network, layout):
    torch.save(layouts(network.state_dict())[layout], tmp_path / "weights.pt")
    loaded = load_encoder(tmp_path / "weights.pt", "resnet18", 0).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), network(images))


def test_the_architecture_is_told_by_the_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "ARCHS", ["resnet18", "resnet34", "resnet50"])
    for arch in ("resnet34", "resnet18"):
        weights = torchvision.models.get_model(arch).state_dict()
        torch.save(weights, tmp_path / "encoder.pt")
        assert encoder.arch_of(tmp_path / "encoder.pt") == arch


@pytest.mark.parametrize("layout", ["ours", "SwAV", "MoCo", "BYOL", "SparK"])
@pytest.mark.parametrize("harm", ["missing", "another arch", "another shape", "too much"])
def test_a_mangled_checkpoint_is_refused(tmp_path, network, capsys, layout, harm):
    weights = network.state_dict()
    if harm == "missing":
        del weights["layer3.1.bn2.running_mean"]
    if harm == "another arch":
        weights = load_encoder("scratch", "resnet50", 0).state_dict()
    if harm == "another shape":
        weights["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    if harm == "too much":
        weights["layer4.2.conv1.weight"] = torch.zeros(1)
    torch.save(layouts(weights)[layout], tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="does not hold the weights of a resnet18"):
        load_encoder(tmp_path / "weights.pt", "resnet18", 0)


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("layout", ["ours", "SwAV", "MoCo", "BYOL", "SparK"])
def test_what_lies_beside_the_weights_is_passed_over_and_nothing_runs(tmp_path, network, layout):
    canary = tmp_path / "canary"
    harmless = {
        "hyper_parameters": {"data": Path("/data"), "flags": argparse.Namespace(lr=1)},
        "epochs": {Path("a"): 1},
    }
    calls = {
        "open": Call(open, str(canary), "w"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
    }
    calls["getattr"] = Call(getattr, canary, "touch")
    path, images = tmp_path / "weights.pt", torch.rand(2, 3, 32, 32)
    weights = layouts(network.state_dict())[layout]
    beside = harmless | calls if layout != "ours" else {}  # ours is nothing but weights
    torch.save(weights | beside, path)
    assert torch.equal(load_encoder(path, "resnet18", 0).eval()(images), network(images))
    if layout == "SwAV":
        for refused in (
            Call(os.system, f"touch {canary}"),
            Call(Path.touch, canary),
            defaultdict(list, a=[1]),
        ):
            torch.save(weights | {"other": refused}, path)
            with pytest.raises(SystemExit, match="error"):
                load_encoder(path, "resnet18", 0)
        for inside in calls.values():  # among the weights themselves nothing is passed over
            torch.save(network.state_dict() | {"conv1.weight": inside}, path)
            with pytest.raises(SystemExit, match="not a state_dict of tensors"):
                load_encoder(path, "resnet18", 0)
    assert not canary.exists()
    pickle.loads(pickle.dumps(calls["open"]))
    assert canary.exists()  # as it would where nothing guards


CALL = Call(print, "code ran")


@pytest.mark.parametrize(
    "content", [{"state_dict": {"fc.weight": torch.ones(1)}}, [1, 2], {"state_dict": CALL}, b"junk"]
)
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path, capsys, content):
    if isinstance(content, bytes):
        (tmp_path / "weights.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="error"):
        load_encoder(tmp_path / "weights.pt", "resnet18", 0)
    torch.save({"conv1.weight": torch.ones(9, 9)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-300])
    with pytest.raises(SystemExit, match="damaged"):
        load_encoder(tmp_path / "cut.pt", "resnet18", 0)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(CALL))
    with pytest.raises(SystemExit, match="error"):
        load_encoder(tmp_path / "plain.pkl", "resnet18", 0)
    assert "code ran" not in capsys.readouterr().out
