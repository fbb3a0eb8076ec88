"""Encoders for downstream tasks: ours, ImageNet's, or random weights."""

import hashlib
import pickle
from pathlib import Path

import torch
import torchvision
from torch import nn

from common.files import fail


def load_encoder(source, arch, seed):
    """A torchvision ResNet whose fc is the identity.

    source: a path to a state_dict without fc (pretrain.py's encoder.pt), "scratch" (random weights from the seed) or
    "imagenet" (torchvision's IMAGENET1K_V1, downloaded the torchvision way). Nothing that could run code is unpickled,
    and exactly the classifier's weights may be missing.
    """
    torch.manual_seed(seed)
    if source == "imagenet":
        try:
            network = torchvision.models.get_model(arch, weights="IMAGENET1K_V1")
        except OSError as error:
            fail(f"ImageNet weights of {arch} cannot be downloaded ({error}): put torchvision's file into "
                 f"{torch.hub.get_dir()}/checkpoints")  # fmt: skip
    else:
        network = torchvision.models.get_model(arch, weights=None)
    if source not in ("imagenet", "scratch"):
        try:
            missing, unexpected = network.load_state_dict(read_weights(source), strict=False)
        except RuntimeError:  # shapes that do not fit
            missing, unexpected = ["conv1.weight"], []
        if set(missing) != {"fc.weight", "fc.bias"} or unexpected:
            fail(f"{source}: does not hold exactly the weights of a {arch} without fc: is it another --arch?")
    network.fc = nn.Identity()
    return network


def read_weights(path):
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        fail(f"{path}: not a file of PyTorch weights, or damaged")
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        fail(f"{path}: not a plain state_dict of tensors")
    return weights


def encoder_hash(source):
    """16 hex digits of the file's SHA-256; "scratch" and "imagenet" stand for themselves."""
    if source in ("imagenet", "scratch"):
        return source
    if not Path(source).is_file():
        fail(f"{source}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
