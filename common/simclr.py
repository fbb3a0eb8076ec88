"""SimCLR (Chen et al. 2020) for grey CT slices: network, augmentations, NT-Xent, optimiser, schedule.

Everything random takes a generator and is drawn per sample. Knows nothing of where slices come from.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

ARCHS = ["resnet18", "resnet50"]
MEAN, STD = 0.5, 0.5  # of the network's input; our choice


def build(arch, dimensions=128):
    """nn.Sequential(encoder, projection head): a torchvision ResNet without fc, then two layers to 128 (SimCLR)."""
    encoder = torchvision.models.get_model(arch, weights=None)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    head = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, dimensions),
    )
    return nn.Sequential(encoder, head)


def to_input(grey, mean=MEAN, std=STD):
    """Grey values in 0..1, float [B, size, size] -> network input, float [B, 3, size, size], channels last.

    mean, std: numbers, or one for each of the three channels.
    """
    mean, std = (torch.as_tensor(value, device=grey.device).view(-1, 1, 1) for value in (mean, std))
    return (
        ((grey.unsqueeze(1) - mean) / std)
        .expand(-1, 3, -1, -1)
        .contiguous(memory_format=torch.channels_last)
    )


def augment(slices, size, generator):
    """One random view of each slice: uint8 [B, H, W] -> float [B, size, size] in 0..1, each with its own parameters.

    Crop (area 0.08 to 1, aspect 3/4 to 4/3), horizontal flip, blur, brightness and contrast: SimCLR's, less hue and
    saturation, which grey slices lack; strength of the jitter as in the official code. Cropping, resizing with
    antialiasing, flip and blur are linear and separable, so each is a matrix product per axis, on CPU and GPU alike.
    """
    n, height, width = slices.shape
    top, tall, left, wide = random_crop(n, generator)
    flip = draw(n, generator) < 0.5
    left, wide = torch.where(flip, left + wide, left), torch.where(flip, -wide, wide)
    sigma = torch.where(
        draw(n, generator) < 0.5, draw(n, generator, 0.1, 2.0) * size / 224, 0
    )  # SimCLR's at 224 px
    top, tall, left, wide, sigma = torch.stack([top, tall, left, wide, sigma]).to(slices.device)
    blur = blur_matrix(sigma, size)
    rows = blur @ resize_matrix(top * height, tall * height, height, size)
    columns = blur @ resize_matrix(left * width, wide * width, width, size)
    views = rows @ (slices.float() / 255) @ columns.transpose(1, 2)
    return jitter(views, generator)


def draw(n, generator, low=0.0, high=1.0):
    """n uniform numbers, drawn on the CPU so that CPU and GPU runs see the same augmentations."""
    return low + (high - low) * torch.rand(n, generator=generator)


def random_crop(n, generator):
    """(top, height, left, width), each [n], as shares of the slice: torchvision's RandomResizedCrop, clipped to fit."""
    area = draw(n, generator, 0.08, 1.0)
    ratio = torch.exp(draw(n, generator, math.log(3 / 4), math.log(4 / 3)))
    wide, tall = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return draw(n, generator) * (1 - tall), tall, draw(n, generator) * (1 - wide), wide


def resize_matrix(start, length, source, size):
    """[B, size, source]: resizes the stretch start..start+length (pixels, [B]) of an axis to size pixels.

    Linear interpolation, widened to average when shrinking, as Pillow's and torchvision's antialiased resizing does.
    A negative length reads backwards, which flips.
    """
    centers = (
        start[:, None] + length[:, None] * (torch.arange(size, device=start.device) + 0.5) / size
    )
    support = (length.abs() / size).clamp(min=1)
    distance = (
        torch.arange(source, device=start.device) + 0.5 - centers[:, :, None]
    ).abs() / support[:, None, None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)


def blur_matrix(sigma, size):
    """[B, size, size]: Gaussian blur along an axis, sigma in pixels, [B]; 0 leaves it as it is."""
    index = torch.arange(size, device=sigma.device)
    distance = (index[:, None] - index).square()
    weights = torch.exp(-distance / (2 * sigma.clamp(min=1e-3).square())[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def jitter(views, generator, strength=0.4, probability=0.8):
    """Brightness, then contrast about the mean, each by a factor of 1 +- strength, for `probability` of the views."""
    n = len(views)
    chosen = draw(n, generator) < probability
    brightness = torch.where(chosen, draw(n, generator, 1 - strength, 1 + strength), 1)
    contrast = torch.where(chosen, draw(n, generator, 1 - strength, 1 + strength), 1)
    views = (views * brightness.to(views.device)[:, None, None]).clamp(0, 1)
    mean = views.mean((1, 2), keepdim=True)
    return (mean + (views - mean) * contrast.to(views.device)[:, None, None]).clamp(0, 1)


def nt_xent(embeddings, temperature):
    """NT-Xent (SimCLR, eq. 1) of two views: [2B, D], view 1 of all samples, then view 2 of all.

    Returns (mean loss, share of views whose nearest other view is their partner). With several processes both are over
    the samples of all; the gradient that reaches this process's embeddings is the whole loss's.
    """
    z = F.normalize(embeddings.float(), dim=1)
    if processes() > 1:
        z = gather(z.unflatten(0, (2, -1))).flatten(0, 1)
    n = len(z)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(n, device=z.device).roll(n // 2)
    return F.cross_entropy(similarity, partner), (similarity.argmax(1) == partner).float().mean()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(own):
    """[2, b, D] of every process -> [2, B, D], in rank order; the own part keeps its gradient, the others are constants."""
    parts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts, 1)


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then cosine to 0 (SimCLR): a pure function of the step, 0 <= step < steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(model, weight_decay):
    """Weights with decay; biases and batch norm without, and without LARS scaling (SimCLR)."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the norm of the weights (You et al. 2017)."""

    def __init__(self, groups, lr, momentum=0.9, trust=0.001):
        super().__init__(
            groups,
            {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True},
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            updates = torch._foreach_add(
                [p.grad for p in weights], weights, alpha=group["weight_decay"]
            )
            if group["adapt"]:
                norms = (
                    torch.stack(torch._foreach_norm(weights)),
                    torch.stack(torch._foreach_norm(updates)),
                )
                scales = torch.where(
                    (norms[0] > 0) & (norms[1] > 0), group["trust"] * norms[0] / norms[1], 1.0
                )
                torch._foreach_mul_(updates, list(scales))
            buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def bf16_pays(device):
    """Whether the hardware multiplies bf16 natively; elsewhere it would only be emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
