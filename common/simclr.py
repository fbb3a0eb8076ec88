"""SimCLR (Chen et al. 2020) for grey CT slices: network, augmentation, loss, optimiser, schedule.

Knows nothing of where slices come from.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

MOMENTUM, TRUST_COEFFICIENT = 0.9, 0.001  # of LARS (You et al. 2017)


def build(arch):
    """nn.Sequential(encoder, head): a torchvision ResNet without fc, then SimCLR's two layers."""
    encoder = torchvision.models.get_model(arch, weights=None)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    head = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, 128),
    )
    return nn.Sequential(encoder, head)


# --- Augmentation: SimCLR's, less hue and saturation, which grey slices lack.


class Augmentation(NamedTuple):
    """The parameters of n views, each [n]."""

    top: torch.Tensor  # of the crop, as a share of the slice's height
    height: torch.Tensor
    left: torch.Tensor  # as a share of the slice's width
    width: torch.Tensor
    flip: torch.Tensor  # 1 where left and right are exchanged
    sigma: torch.Tensor  # of the blur, as a share of the view's side; 0 for none
    brightness: torch.Tensor  # factors
    contrast: torch.Tensor


def draw_augmentation(n, rng):
    """The parameters of n random views as one tensor, [fields of Augmentation, n], float32.

    Crop of area 0.08 to 1 and aspect 3/4 to 4/3; flip with p 0.5; blur with p 0.5, sigma 0.1 to 2
    pixels at 224 (SimCLR); brightness and contrast by a factor of 0.6 to 1.4, p 0.8 (official
    code). All that is random must be drawn here, from rng, or a run does not go on to the same
    bytes.
    """
    area = rng.uniform(0.08, 1.0, n)
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), n))
    width = np.sqrt(area * ratio).clip(max=1)  # RandomResizedCrop's, clipped to fit
    height = np.sqrt(area / ratio).clip(max=1)
    top = rng.random(n) * (1 - height)
    left = rng.random(n) * (1 - width)
    flip = rng.random(n) < 0.5
    sigma = np.where(rng.random(n) < 0.5, rng.uniform(0.1, 2.0, n) / 224, 0)
    jittered = rng.random(n) < 0.8
    brightness = np.where(jittered, rng.uniform(0.6, 1.4, n), 1)
    contrast = np.where(jittered, rng.uniform(0.6, 1.4, n), 1)
    drawn = Augmentation(top, height, left, width, flip, sigma, brightness, contrast)
    return torch.from_numpy(np.stack(drawn).astype(np.float32))


def augment(slices, parameters, size):
    """Two views of each slice, first views first: uint8 [b, H, W] -> [2b, size, size] in 0..1.

    parameters: of draw_augmentation, for 2b views. Cropping, resizing with antialiasing, flip and
    blur are linear and separable, so each is a matrix product per axis, on CPU and GPU alike.
    """
    _, height, width = slices.shape
    view = Augmentation(*parameters)
    blur = blur_matrix(view.sigma * size, size)
    down = resize_matrix(view.top * height, view.height * height, height, size)
    across = resize_matrix(view.left * width, view.width * width, width, size, view.flip)
    down = (blur @ down).unflatten(0, (2, -1))
    across = (blur @ across).unflatten(0, (2, -1))
    views = down @ (slices.float() / 255) @ across.transpose(2, 3)
    return jitter(views.flatten(0, 1), view.brightness, view.contrast)


def resize_matrix(start, length, source, size, flip=None):
    """[n, size, source]: resizes the stretch start..start+length of an axis to size pixels.

    start, length: pixels, [n]. flip: [n], 1 where the stretch is read backwards. Linear
    interpolation, widened to average when shrinking, as Pillow's and torchvision's antialiased
    resizing does.
    """
    position = (torch.arange(size, device=start.device) + 0.5) / size
    if flip is not None:
        position = torch.where(flip[:, None] > 0, 1 - position, position)
    centers = start[:, None] + length[:, None] * position
    support = (length / size).clamp(min=1)
    pixels = torch.arange(source, device=start.device) + 0.5
    distance = (pixels - centers[:, :, None]).abs() / support[:, None, None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)


def blur_matrix(sigma, size):
    """[n, size, size]: Gaussian blur along an axis, sigma in pixels, [n]; 0 leaves it as it is."""
    index = torch.arange(size, device=sigma.device)
    distance = (index[:, None] - index).square()
    weights = torch.exp(-distance / (2 * sigma.clamp(min=1e-3).square())[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def jitter(views, brightness, contrast):
    """Scale brightness, then contrast about the mean: views [n, size, size], factors [n]."""
    views = (views * brightness[:, None, None]).clamp(0, 1)
    mean = views.mean((1, 2), keepdim=True)
    return (mean + (views - mean) * contrast[:, None, None]).clamp(0, 1)


# --- Loss, over the batches of all processes.


def nt_xent(embeddings, temperature, excluded=None):
    """NT-Xent (SimCLR, eq. 1) of two views: [2B, D], view 1 of all samples, then view 2 of all.

    excluded: bool [B, B], pairs of samples that are no negatives of each other, none by default:
    their similarity leaves the denominator. Returns (mean loss, share of views whose nearest other
    view is their partner). With several processes both are over the samples of all, as excluded
    is; the gradient that reaches this process's embeddings is the whole loss's.
    """
    z = F.normalize(embeddings.float(), dim=1)
    if processes() > 1:
        z = gather(z.unflatten(0, (2, -1))).flatten(0, 1)
    n = len(z)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    if excluded is not None:
        similarity = similarity.masked_fill(excluded.repeat(2, 2), -torch.inf)
    partner = torch.arange(n, device=z.device).roll(n // 2)
    return F.cross_entropy(similarity, partner), (similarity.argmax(1) == partner).float().mean()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(embeddings):
    """[2, b, D] of every process -> [2, B, D], in rank order; others' embeddings are constants."""
    parts = [torch.empty_like(embeddings) for _ in range(processes())]
    dist.all_gather(parts, embeddings.detach().contiguous())
    parts[dist.get_rank()] = embeddings
    return torch.cat(parts, 1)


# --- Optimiser and schedule.


def learning_rate(step, steps, warmup, base_lr):
    """Linear warm-up over a share of the steps, then cosine to 0 (SimCLR): 0 <= step < steps.

    A function of the step and the run's length in steps alone, whatever the set's size.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model, weight_decay):
    """Weights with decay; biases and batch norm without, and without LARS scaling (SimCLR)."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """SGD with momentum, each tensor's step scaled to the norm of its weights (You et al. 2017)."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})
        for group in self.param_groups:
            for weights in group["params"]:
                self.state[weights]["momentum"] = torch.zeros_like(weights)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            gradients = [p.grad for p in weights]
            updates = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                weight_norm = torch.stack(torch._foreach_norm(weights))
                update_norm = torch.stack(torch._foreach_norm(updates))
                scale = TRUST_COEFFICIENT * weight_norm / update_norm
                scale = torch.where((weight_norm > 0) & (update_norm > 0), scale, 1.0)
                torch._foreach_mul_(updates, list(scale))
            momenta = [self.state[p]["momentum"] for p in weights]
            torch._foreach_mul_(momenta, MOMENTUM)
            torch._foreach_add_(momenta, updates)
            if torch.is_tensor(group["lr"]):  # a CUDA graph's, which is read in every replay
                torch._foreach_add_(weights, torch._foreach_mul(momenta, -group["lr"]))
            else:  # rounded once, not twice
                torch._foreach_add_(weights, momenta, alpha=-group["lr"])
