"""Encoders: ours, ImageNet's, published ones; the features they give; device and precision."""

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from common.files import fail

ARCHS = ["resnet18", "resnet50"]
STAGES = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # of a ResNet, but fc
MEAN, STD = 0.5, 0.5  # of the network's input; our choice
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # these, for torchvision's weights
BATCH = 64  # images whose features are computed at once
# pixels a side: below, a 3 x 3 convolution with stride 2 reads a 1 x 1 map, and oneDNN
# (PyTorch 2.11) leaves parts of its gradient in bfloat16 uninitialised
SMALLEST = 17


# --- Device and precision: the one place for them.


def choose_device(name):
    """The torch.device of "auto", "cpu", "cuda", "cuda:1" ...; one line for one that is not there.

    Under torchrun "auto" and "cuda" are each process's own GPU. Convolutions become repeatable,
    and float32 becomes float32, not TF32.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        launched = torch.distributed.is_torchelastic_launched()
        name = f"cuda:{os.environ['LOCAL_RANK'] if launched else 0}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {name}: give auto, cpu, cuda, cuda:1 ...")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs, streams and NCCL take the current one
    return device


def choose_precision(name, device):
    """The torch.dtype of autocast for "auto", "float32" or "bfloat16".

    Auto: bfloat16 where the hardware multiplies it; elsewhere it would only be emulated.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# --- Weights in.


def load_encoder(source, arch, seed):
    """A torchvision ResNet whose fc is the identity; one line for other weights than the arch's.

    source: a path (see read_weights), "scratch" (random, from the seed) or "imagenet".
    """
    torch.manual_seed(seed)
    published = "IMAGENET1K_V1" if source == "imagenet" else None
    try:
        network = torchvision.models.get_model(arch, weights=published)
    except OSError as error:
        fail(f"ImageNet weights of {arch}: no download into {torch.hub.get_dir()}: {error}")
    network.fc = nn.Identity()
    if source in ("imagenet", "scratch"):
        return network
    try:
        # strict, but for batch norm's counters, which old files lack and nothing needs
        network.load_state_dict(read_weights(source))
    except RuntimeError as error:
        first = shorten(str(error), 200)  # of hundreds of keys, on one line
        fail(f"{source}: does not hold the weights of a {arch}: is it another --arch? {first}")
    return network


def read_weights(path):
    """{name: tensor} of the ResNet in an encoder.pt or a published checkpoint, without its fc.

    It may lie under any prefix, in dicts within dicts. Nothing that could run code is unpickled.
    """
    try:
        tensors = dict(named_tensors(load_tensors(path)))
    except Exception:  # whatever a damaged file makes torch raise
        fail(f"{path}: not a file of PyTorch weights, or damaged, or would have to run code")
    first, last = "conv1.weight", "layer4.0.conv1.weight"
    prefixes = [name.removesuffix(last) for name in tensors if name.endswith(last)]
    prefixes = [prefix for prefix in prefixes if prefix + first in tensors]
    if not prefixes:
        fail(f"{path}: holds no ResNet: no tensors {first} ... {last} under any prefix")
    if len(prefixes) > 1:
        fail(
            f"{path}: holds several ResNets, under {', '.join(prefixes)}: save one alone, with "
            "torch.save({name: tensor ...}) of the names that begin so"
        )
    of_resnet = tuple(prefixes[0] + stage for stage in STAGES)
    names = [name for name in tensors if name.startswith(of_resnet)]
    return {name.removeprefix(prefixes[0]): tensors[name] for name in names}


def named_tensors(content, prefix=""):
    """Yield (name, tensor) of all tensors in dicts within dicts, their keys joined by dots."""
    for key, value in content.items():
        if torch.is_tensor(value):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from named_tensors(value, f"{prefix}{key}.")


def load_tensors(path):
    """torch.load(weights_only=True), with what else Lightning saves beside weights as Inert."""
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
        fail(f"{source}: no such file: --encoder takes an encoder.pt, scratch or imagenet")
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]


# --- Features out.


def to_input(grey, mean=MEAN, std=STD):
    """Grey values in 0..1, float [B, size, size] -> float [B, 3, size, size], channels last.

    mean, std: a number, or one for each channel, [3, 1, 1].
    """
    normalised = (grey.unsqueeze(1) - mean) / std
    return normalised.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def features(source, arch, seed, images, device, label):
    """The features of images, uint8 [N, size, size] -> float32 [N, width]: means of the last stage.

    source, arch, seed: see load_encoder. On a CPU each batch has one thread, and as many batches
    run at once as there are threads: the same bytes on any number of cores. Stops with one line at
    features that are not finite.
    """
    network = load_encoder(source, arch, seed).eval()
    network.to(device, memory_format=torch.channels_last)
    mean, std = MEAN, STD
    if source == "imagenet":
        mean, std = torch.tensor(IMAGENET, device=device).view(2, 3, 1, 1)
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1

    @torch.inference_mode()
    def forward(start):
        batch = torch.from_numpy(images[start : start + BATCH].copy())
        inputs = to_input(batch.to(device).float() / 255, mean, std)
        return network(inputs).cpu().numpy()

    starts = range(0, len(images), BATCH)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        batches = list(tqdm(pool.map(forward, starts), label, len(starts), unit="batch"))
    torch.set_num_threads(threads)
    found = np.concatenate(batches)
    if not np.isfinite(found).all():
        fail(f"{source}: gives features that are not finite: its pre-training went wrong")
    return found


def embed(source, slices):
    """The features of a store's slices, float32 [N, width].

    source: encoder.pt of either architecture, or "imagenet" (ResNet-50). slices: uint8
    [N, size, size].
    """
    small = source != "imagenet" and "layer1.0.conv3.weight" not in read_weights(source)
    arch = "resnet18" if small else "resnet50"
    return features(source, arch, 0, slices, choose_device("auto"), "features")
