"""Encoders: ours, ImageNet's, or random weights; and the features they give."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from common.files import fail, whole_file
from common.simclr import to_input

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # torchvision's, for its weights
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


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


@torch.inference_mode()
def embed(source, slices, folder):
    """Global-average-pooled features of whole slices, uint8 [N, size, size], as they are stored, by an encoder.

    source: encoder.pt, whichever architecture it holds, or "imagenet" (ResNet-50). Returns the path of float32
    [N, width] in folder: made once per encoder, read again by the next selection.
    """
    path = folder / f"features-{encoder_hash(source)}.npy"
    if path.exists():
        return path
    basic = source not in ("imagenet", "scratch") and "layer1.0.conv3.weight" not in read_weights(source)
    network = load_encoder(source, "resnet18" if basic else "resnet50", seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device, memory_format=torch.channels_last).eval()
    with whole_file(path) as file, tqdm(desc="features", total=len(slices), unit="slice") as bar:
        for start in range(0, len(slices), 64):
            grey = torch.from_numpy(slices[start : start + 64].copy()).to(device).float() / 255
            inputs = to_input(grey) if source != "imagenet" else imagenet_input(grey)
            features = network(inputs).cpu().numpy()
            if start == 0:
                shape = (len(slices), features.shape[1])
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(features.tobytes())
            bar.update(len(features))
    return path


def imagenet_input(grey):
    return (to_input(grey, 0, 1) - IMAGENET_MEAN.to(grey.device)) / IMAGENET_STD.to(grey.device)
