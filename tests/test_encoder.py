"""Weights go in whole or not at all, from every layout that was published; features come out."""

import argparse
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from common import encoder
from common.encoder import load_encoder


@pytest.fixture
def network():
    return load_encoder("scratch", "resnet18", 3).eval()


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def layouts(weights):
    """Ours, and those of published checkpoints, with the heads that lie beside the encoder."""
    head = torch.ones(2, 2)
    swav = under("model.", weights) | {"model.prototypes.weight": head}
    moco = under("module.encoder_q.", weights) | {"module.encoder_q.fc.0.weight": head}
    return {
        "ours": weights,
        "SwAV": {"state_dict": swav | {"model.projection_head.0.weight": head}},
        "MoCo": {"state_dict": moco | {"module.queue": head}, "epoch": 3},
        "MoCo v3": {"state_dict": under("module.base_encoder.", weights)},
        "SparK": {"module": weights, "arch": "resnet18"},
        "compiled": under("_orig_mod.", weights),
        "with its optimizer": {"model": weights, "optimizer": {"state": {0: {"step": head}}}},
        "backbone": {"model_state_dict": under("backbone.", weights)},
    }


@pytest.mark.parametrize("layout", layouts({}))
def test_a_checkpoint_of_each_layout_gives_the_same_features(tmp_path, network, layout):
    torch.save(layouts(network.state_dict())[layout], tmp_path / "weights.pt")
    loaded = load_encoder(tmp_path / "weights.pt", "resnet18", 0).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), network(images))


def test_several_encoders_in_a_file_are_named_and_none_is_guessed(tmp_path, network):
    weights = network.state_dict()
    moco = under("module.encoder_q.", weights) | under("module.encoder_k.", weights)
    torch.save({"epoch": 3, "state_dict": moco}, tmp_path / "weights.pt")
    named = "state_dict.module.encoder_q., state_dict.module.encoder_k."
    with pytest.raises(SystemExit, match=f"several ResNets, under {named}: save one"):
        load_encoder(tmp_path / "weights.pt", "resnet18", 0)


@pytest.mark.parametrize("layout", ["ours", "MoCo", "compiled"])
def test_a_mangled_checkpoint_is_refused(tmp_path, network, layout):
    weights = network.state_dict()
    missing = {key: weights[key] for key in weights if key != "layer3.1.bn2.running_mean"}
    another_shape = weights | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    too_much = weights | {"layer4.2.conv1.weight": torch.zeros(1)}
    another_arch = load_encoder("scratch", "resnet50", 0).state_dict()
    for mangled in (missing, another_shape, too_much, another_arch):
        torch.save(layouts(mangled)[layout], tmp_path / "weights.pt")
        with pytest.raises(SystemExit, match="does not hold the weights of a resnet18"):
            load_encoder(tmp_path / "weights.pt", "resnet18", 0)


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_what_lies_beside_the_weights_is_passed_over_and_nothing_runs(tmp_path, network):
    path, canary = tmp_path / "weights.pt", tmp_path / "canary"
    calls = [Call(open, str(canary), "w"), Call(exec, f"open({str(canary)!r}, 'w')")]
    calls.append(Call(getattr, canary, "touch"))
    flags = {"data": Path("/data"), "flags": argparse.Namespace(lr=1)}
    beside = {"hyper_parameters": flags, "epochs": {Path("a"): 1}, "calls": calls}
    weights, images = layouts(network.state_dict())["SwAV"], torch.rand(2, 3, 32, 32)
    torch.save(weights | beside, path)
    assert torch.equal(load_encoder(path, "resnet18", 0).eval()(images), network(images))
    whole = path.read_bytes()
    touch = [Call(os.system, f"touch {canary}"), Call(Path.touch, canary)]
    refused = [weights | {"other": other} for other in (*touch, defaultdict(list, a=[1]))]
    refused += [network.state_dict() | {"conv1.weight": call} for call in calls]
    refused += [{"state_dict": {"fc.weight": torch.ones(1)}}, [1, 2], {"state_dict": calls[0]}]
    contents = [b"junk", whole[:-300], pickle.dumps(calls[0], 2)]
    for content in refused:
        torch.save(content, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="no ResNet|not a file of PyTorch weights, or damaged"):
            load_encoder(path, "resnet18", 0)
    assert not canary.exists()
    pickle.loads(pickle.dumps(calls[0]))
    assert canary.exists()  # as it would where nothing guards


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("resnet50", 2048)])
def test_features_are_those_of_one_image_after_another(tmp_path, monkeypatch, arch, width):
    """By the architecture of the file; the same bytes on any number of threads; input -1 to 1."""
    network = load_encoder("scratch", arch, 1).train()
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32), dtype=np.uint8)
    inputs = torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) / 127.5 - 1
    with torch.inference_mode():
        for _ in range(5):
            network(inputs)  # statistics for batch norm
        slow = np.concatenate([network.eval()(image[None]).numpy() for image in inputs])
    torch.save(network.state_dict(), tmp_path / "encoder.pt")
    monkeypatch.setattr(encoder, "BATCH", 3)
    arrays = []
    usual = torch.get_num_threads()
    for threads in (usual + 1, usual):
        torch.set_num_threads(threads)
        arrays.append(encoder.embed(tmp_path / "encoder.pt", images))
        assert torch.get_num_threads() == threads
    assert arrays[0].dtype == np.float32 and np.array_equal(*arrays)
    assert slow.shape == (7, width) and np.allclose(arrays[0], slow, atol=1e-4)


def test_input_is_normalised_as_the_encoder_was_trained(monkeypatch):
    """Ours by a half and a half, torchvision's ImageNet weights by its documented numbers."""
    monkeypatch.setattr(encoder, "load_encoder", lambda *_: torch.nn.Identity())
    images = np.array([[[0, 51, 255]]], np.uint8)
    grey = torch.tensor([0.0, 0.2, 1.0]).expand(1, 3, 1, 3)
    presets = {
        "encoder.pt": torchvision.transforms.Normalize([0.5] * 3, [0.5] * 3),
        "imagenet": torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }
    for source, preset in presets.items():
        given = encoder.features(source, "resnet18", 0, images, torch.device("cpu"), "")
        assert np.allclose(given, preset(grey), atol=1e-6)


def test_imagenet_is_torchvisions_first_weights(monkeypatch):
    """The only ones of a ResNet-18; those of a ResNet-50's second recipe are others."""
    asked = []

    def get_model(arch, weights):
        asked.append(weights)
        return torch.nn.Module()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    load_encoder("imagenet", "resnet50", 0)
    assert asked == ["IMAGENET1K_V1"]


def test_a_device_is_there_and_convolutions_are_repeatable_and_in_full_float32(monkeypatch):
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(SystemExit, match=f"^error: --device {name}: .*$"):
            encoder.choose_device(name)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert encoder.choose_device("cpu") == torch.device("cpu")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32


def test_precision_is_chosen_by_hardware(monkeypatch):
    cpu = torch.device("cpu")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda native=native: native)
        assert encoder.choose_precision("auto", cpu) == dtype
        assert encoder.choose_precision("float32", cpu) == torch.float32
        assert encoder.choose_precision("bfloat16", cpu) == torch.bfloat16
