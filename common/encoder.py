"""Encoders: ours, ImageNet's, or random weights; and the features they give."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from common.files import atomic_write, fail

# of the encoder's weights in a checkpoint: ours and SparK's, SwAV, MoCo, BYOL (official code)
PREFIXES = ("", "model.", "encoder_q.", "online_network.encoder.", "module.")
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
MEAN, STD = 0.5, 0.5  # of the network's input; our choice
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of torchvision's input for its weights
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH = 64  # images whose features are computed at once


def to_input(grey, mean=MEAN, std=STD):
    """Grey values in 0..1, float [B, size, size] -> float [B, 3, size, size], channels last.

    mean, std: a number, or three for the channels.
    """
    if isinstance(mean, tuple):
        mean = torch.tensor(mean, device=grey.device).view(3, 1, 1)
        std = torch.tensor(std, device=grey.device).view(3, 1, 1)
    normalised = (grey.unsqueeze(1) - mean) / std
    return normalised.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def input_statistics(source):
    """(mean, std) of the input that an encoder was trained on."""
    if source == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    return MEAN, STD


def load_encoder(source, arch, seed):
    """A torchvision ResNet whose fc is the identity.

    source: a path to weights (see read_weights), "scratch" (random weights from the seed) or
    "imagenet" (torchvision's IMAGENET1K_V1, downloaded the torchvision way). Nothing that could run
    code is unpickled. Every weight of the encoder must be there; the file's other weights are left
    aside, unless one looks like an encoder's.
    """
    torch.manual_seed(seed)
    if source == "imagenet":
        network = load_imagenet(arch)
    else:
        network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    if source not in ("imagenet", "scratch"):
        weights = read_weights(source)
        expected = network.state_dict()
        check_weights(source, arch, weights, expected)
        weights = {key: value for key, value in weights.items() if key in expected}
        network.load_state_dict(weights, strict=False)
    return network


def load_imagenet(arch):
    try:
        return torchvision.models.get_model(arch, weights="IMAGENET1K_V1")
    except OSError as error:
        fail(
            f"ImageNet weights of {arch} cannot be downloaded ({error}): put torchvision's file "
            f"into {torch.hub.get_dir()}/checkpoints, or give an encoder.pt"
        )


def check_weights(source, arch, weights, expected):
    """Stop unless weights holds every expected tensor in its shape, and no other of a ResNet's."""
    problems = []
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            problems.append(f"{key} is of another shape")
        # batch norm's counters are missing in old files and change nothing
        if key not in weights and not key.endswith("num_batches_tracked"):
            problems.append(f"{key} is missing")
    for key in weights:
        if key not in expected and key.split(".")[0] in STAGES:
            problems.append(f"{key} is too much")
    if problems:
        fail(
            f"{source}: does not hold the weights of a {arch}: {problems[0]}: is it another --arch?"
        )


def read_weights(path):
    """{name as in torchvision's ResNet: tensor} of an encoder.pt, or of an authors' checkpoint."""
    try:
        found = load_tensors(path)
    except FileNotFoundError:
        fail(f"{path}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    except Exception:  # whatever a damaged file makes torch raise
        fail(
            f"{path}: not a file of PyTorch weights, or damaged, or one that would have to run "
            "code to be read"
        )
    for key in ("state_dict", "module"):  # Lightning's checkpoints, SparK's
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        fail(f"{path}: not a state_dict of tensors")
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        fail(f"{path}: not a state_dict of tensors")
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in found:
            return {
                key.removeprefix(prefix): value
                for key, value in found.items()
                if key.startswith(prefix)
            }
    under = ", ".join(filter(None, PREFIXES))
    fail(f"{path}: holds no ResNet: no conv1.weight, alone or under {under}")


def load_tensors(path):
    """torch.load(weights_only=True); objects beside the weights, as Lightning keeps, are Inert.

    It is still torch's own reader of weights, which imports and calls nothing but what rebuilds
    tensors. The names that it does not know are found without running the file, and mean Inert.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


class Inert:
    """Stands for an object that is no tensor or plain value: drops what it is given."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def encoder_hash(source):
    """16 hex digits of the file's SHA-256; "scratch" and "imagenet" stand for themselves."""
    if source in ("imagenet", "scratch"):
        return source
    if not Path(source).is_file():
        fail(f"{source}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


def features(network, images, statistics, device, label):
    """Yield the features of images, uint8 [N, size, size], batch by batch: float32 [b, width].

    Features are the global average of the last stage. On a CPU each batch is computed in one
    thread, and as many batches at once as there are threads: as fast as all threads on one batch,
    twice as fast where other processes are at work, and the same bytes on any number of cores. On
    a GPU convolutions are in full float32 (not TF32) and repeatable, so that features differ
    between machines by rounding only.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    network = network.eval().to(device, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1

    @torch.inference_mode()
    def forward(start):
        batch = torch.from_numpy(images[start : start + BATCH].copy())
        inputs = to_input(batch.to(device).float() / 255, *statistics)
        return network(inputs).cpu().numpy()

    starts = range(0, len(images), BATCH)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from tqdm(pool.map(forward, starts), label, len(starts), unit="batch")
    torch.set_num_threads(threads)


def embed(source, slices, folder):
    """Features of whole slices, uint8 [N, size, size], as they are stored, by an encoder.

    source: encoder.pt, whichever architecture it holds, or "imagenet" (ResNet-50). Returns the path
    of float32 [N, width] in folder, made once per encoder and read again by the next selection.
    """
    path = folder / f"features-{encoder_hash(source)}.npy"
    if path.exists():
        return path
    arch = "resnet50"
    if source not in ("imagenet", "scratch"):
        if "layer1.0.conv3.weight" not in read_weights(source):
            arch = "resnet18"
    network = load_encoder(source, arch, seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (len(slices), network.inplanes)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in features(network, slices, input_statistics(source), device, "features"):
            file.write(batch.tobytes())
    return path
