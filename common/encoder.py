"""Encoders: ours, ImageNet's, or random weights; and the features they give."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from common.files import atomic_write, fail
from common.simclr import MEAN, STD, to_input

LAYOUTS = [
    "",
    "model.",
    "encoder_q.",
    "online_network.encoder.",
    "module.",
]  # ours and SparK's; SwAV, MoCo, BYOL (official code)
STAGES = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
IMAGENET_STATISTICS = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean, std of torchvision's input for its weights


def input_statistics(source):
    """(mean, std) of the input that an encoder was trained on."""
    return IMAGENET_STATISTICS if source == "imagenet" else (MEAN, STD)


def load_encoder(source, arch, seed):
    """A torchvision ResNet whose fc is the identity.

    source: a path to weights (read_weights says which), "scratch" (random weights from the seed) or "imagenet"
    (torchvision's IMAGENET1K_V1, downloaded the torchvision way). Nothing that could run code is unpickled; every weight
    of the encoder must be there, and of the file's others none may look like one.
    """
    torch.manual_seed(seed)
    if source == "imagenet":
        try:
            network = torchvision.models.get_model(arch, weights="IMAGENET1K_V1")
        except OSError as error:
            fail(
                f"ImageNet weights of {arch} cannot be downloaded ({error}): put torchvision's file into "
                f"{torch.hub.get_dir()}/checkpoints, or give an encoder.pt"
            )
    else:
        network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    if source not in ("imagenet", "scratch"):
        weights, own = read_weights(source), network.state_dict()
        # batch norm's counters are missing in old files and change nothing
        missing = [
            key for key in own if key not in weights and not key.endswith("num_batches_tracked")
        ]
        foreign = [key for key in weights if key not in own and key.split(".")[0] in STAGES]
        unlike = [key for key in own if key in weights and weights[key].shape != own[key].shape]
        if missing or foreign or unlike:
            fail(
                f"{source}: does not hold the weights of a {arch}: {(missing + foreign + unlike)[0]} is "
                f"{'missing' if missing else 'too much' if foreign else 'of another shape'}: is it another --arch?"
            )
        network.load_state_dict(
            {key: value for key, value in weights.items() if key in own}, strict=False
        )
    return network


def read_weights(path):
    """{name as in torchvision's ResNet: tensor} of an encoder.pt, or of a checkpoint of the authors' (LAYOUTS)."""
    try:
        found = load_tensors(path)
    except FileNotFoundError:
        fail(f"{path}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    except Exception:  # whatever a damaged file makes torch raise
        fail(
            f"{path}: not a file of PyTorch weights, or damaged, or one that would have to run code to be read"
        )
    for key in ("state_dict", "module"):  # Lightning's checkpoints, SparK's
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        fail(f"{path}: not a state_dict of tensors")
    for prefix in LAYOUTS:
        if f"{prefix}conv1.weight" in found:
            return {
                key.removeprefix(prefix): value
                for key, value in found.items()
                if key.startswith(prefix)
            }
    fail(
        f"{path}: holds no ResNet: no conv1.weight, alone or under {', '.join(filter(None, LAYOUTS))}"
    )


def load_tensors(path):
    """torch.load(weights_only=True), but what lies beside the weights, such as a Path or Namespace of Lightning's, is Inert.

    Still torch's own reader of weights, which imports nothing and calls nothing but what rebuilds tensors: it is told that
    the names it does not know, found without running the file, mean Inert.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)


class Inert:
    """Stands for any object of a checkpoint that is no tensor or plain value: takes what it is given and drops it."""

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
    """Yield the global-average-pooled features, float32 [b, width], of images, uint8 [N, size, size], batch after batch.

    Batch norm is folded into the convolutions. On a CPU, several batches at once in one thread each: on 2 cores a fifth
    faster than one after the other in two threads, and the same bytes on any number of cores.
    """
    network = fuse(network.eval()).to(device, memory_format=torch.channels_last)
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    size = 32 if on_cpu else 256

    @torch.inference_mode()
    def forward(start):
        grey = torch.from_numpy(images[start : start + size].copy()).to(device).float() / 255
        return network(to_input(grey, *statistics)).cpu().numpy()

    starts = range(0, len(images), size)
    with ThreadPoolExecutor(
        threads if on_cpu else 1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from tqdm(pool.map(forward, starts), label, len(starts), unit="batch")
    torch.set_num_threads(threads)


def embed(source, slices, folder):
    """Features of whole slices, uint8 [N, size, size], as they are stored, by an encoder.

    source: encoder.pt, whichever architecture it holds, or "imagenet" (ResNet-50). Returns the path of float32
    [N, width] in folder: made once per encoder, read again by the next selection.
    """
    path = folder / f"features-{encoder_hash(source)}.npy"
    if path.exists():
        return path
    basic = source not in ("imagenet", "scratch") and "layer1.0.conv3.weight" not in read_weights(
        source
    )
    network = load_encoder(source, "resnet18" if basic else "resnet50", seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with atomic_write(path) as file:
        for found in features(network, slices, input_statistics(source), device, "features"):
            if not file.tell():
                shape = (len(slices), found.shape[1])
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
            file.write(found.tobytes())
    return path
