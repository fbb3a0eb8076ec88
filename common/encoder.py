"""Encoders: ours, ImageNet's, or random weights; and the features they give."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from common.files import atomic_write, fail
from common.simclr import ARCHS, choose_device

# of the encoder's weights in a checkpoint: ours and SparK's, SwAV, MoCo, BYOL (official code), and
# of any model that was saved under DataParallel
PREFIXES = ("", "model.", "encoder_q.", "online_network.encoder.", "module.")
STAGES = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # of a ResNet, but fc
NO_FILE = "no such file: --encoder takes an encoder.pt, scratch or imagenet"
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
    code is unpickled.
    """
    torch.manual_seed(seed)
    try:
        published = "IMAGENET1K_V1" if source == "imagenet" else None
        network = torchvision.models.get_model(arch, weights=published)
    except OSError as error:
        fail(
            f"ImageNet weights of {arch} cannot be downloaded ({error}): put torchvision's file "
            f"into {torch.hub.get_dir()}/checkpoints, or give an encoder.pt"
        )
    network.fc = nn.Identity()
    if source not in ("imagenet", "scratch"):
        try:
            # strict, but for batch norm's counters, which old files lack and nothing needs
            network.load_state_dict(read_weights(source))
        except RuntimeError as error:
            first = shorten(str(error), 200)  # of hundreds of keys, on one line
            fail(f"{source}: does not hold the weights of a {arch}: is it another --arch? {first}")
    return network


def read_weights(path):
    """{name: tensor} of an encoder.pt or an authors' checkpoint, without heads and projectors."""
    try:
        found = load_tensors(path)
    except FileNotFoundError:
        fail(f"{path}: {NO_FILE}")
    except Exception:  # whatever a damaged file makes torch raise
        fail(
            f"{path}: not a file of PyTorch weights, or damaged, or one that would have to run "
            "code to be read"
        )
    for key in ("state_dict", "module"):  # Lightning's checkpoints, SparK's
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        fail(f"{path}: not a state_dict of tensors")
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in found:
            return {
                key.removeprefix(prefix): value
                for key, value in found.items()
                if key.startswith(tuple(prefix + stage for stage in STAGES))
            }
    under = ", ".join(filter(None, PREFIXES))
    fail(f"{path}: holds no ResNet: no conv1.weight, alone or under {under}")


def arch_of(path):
    """Which of ARCHS has the layers of an encoder.pt or an authors' checkpoint."""
    found = {key for key in read_weights(path) if key.endswith(("weight", "bias"))}
    for arch in ARCHS:
        network = torchvision.models.get_model(arch)
        network.fc = nn.Identity()
        if found == {key for key, _ in network.named_parameters()}:
            return arch
    fail(f"{path}: holds the weights of none of {', '.join(ARCHS)}")


def load_tensors(path):
    """torch.load(weights_only=True), which runs no code of the file.

    Objects that Lightning keeps beside the weights are read as Inert.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


class Inert:
    """In place of an object that is no tensor or plain value: drops what it is given."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def encoder_hash(source):
    """16 hex digits of the file's SHA-256; "scratch" and "imagenet" stand for themselves."""
    if source in ("imagenet", "scratch"):
        return source
    if not Path(source).is_file():
        fail(f"{source}: {NO_FILE}")
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


def features(network, images, statistics, device, label):
    """Yield the features of images, uint8 [N, size, size], batch by batch: float32 [b, width].

    Features are the global average of the last stage. On a CPU each batch has one thread, and as
    many batches run at once as there are threads: the same bytes on any number of cores. On a GPU
    convolutions are in full float32 (not TF32) and repeatable.
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
    """The path of a store's features in folder, float32 [N, width], made once an encoder.

    source: encoder.pt, whichever architecture it holds, or "imagenet" (ResNet-50). slices: uint8
    [N, size, size].
    """
    path = folder / f"features-{encoder_hash(source)}.npy"
    if path.exists():
        return path
    arch = "resnet50" if source in ("imagenet", "scratch") else arch_of(source)
    network = load_encoder(source, arch, seed=0)
    device = choose_device("auto")
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(slices), network.inplanes)}
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in features(network, slices, input_statistics(source), device, "features"):
            file.write(batch.tobytes())
    return path
