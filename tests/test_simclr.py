"""SimCLR's network, augmentation, loss, optimiser and schedule, each against a slow reference."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as tv
from scipy.ndimage import gaussian_filter
from torch import nn

import pretrain
from common import simclr
from common.batches import Batch
from common.encoder import load_encoder


def nt_xent_double_loop(z, temperature, excluded=None):
    """SimCLR, eq. 1, term by term; views k and k + n / 2 are those of one sample."""
    n = len(z)
    samples = n // 2
    z = [view / view.norm() for view in z.double()]
    total = 0.0
    for i in range(n):
        others = 0.0
        for k in range(n):
            masked = excluded is not None and excluded[i % samples][k % samples]
            if k != i and not masked:
                others = others + torch.exp(z[i] @ z[k] / temperature)
        partner = z[(i + samples) % n]
        total = total - torch.log(torch.exp(z[i] @ partner / temperature) / others)
    return total / n


def random_mask(n):
    """Pairs of samples that are no negatives."""
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < 0.3
    return (mask | mask.T).fill_diagonal_(False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "n, width, temperature", [(2, 8, 0.5), (3, 4, 0.1), (16, 128, 0.1), (7, 2, 1.0)]
)
def test_nt_xent_is_the_double_loop(n, width, temperature, masked):
    """Values and gradients."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(2 * n, width, generator=generator, requires_grad=True)
    excluded = random_mask(n) if masked else None
    loss, _ = simclr.nt_xent(z, temperature, excluded)
    slow = nt_xent_double_loop(z, temperature, excluded)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, z)[0] for value in (loss, slow)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_contrastive_top1_counts_found_partners():
    z = torch.eye(4).repeat(2, 1)
    assert simclr.nt_xent(z, 0.1)[1] == 1
    assert simclr.nt_xent(torch.cat([z[:4], z[:4].roll(1, 0)]), 0.1)[1] == 0


RATES = (0.3, 0.1)


def batch_and_model(rank=0, world=1):
    """A process's share of 12 slices and their views, with the global mask; a linear model."""
    rng = np.random.default_rng(0)
    slices = torch.from_numpy(rng.integers(0, 256, (12, 24, 24), dtype=np.uint8))
    views = simclr.draw_augmentation(24, rng).unflatten(1, (2, 12))
    share = views.chunk(world, dim=2)[rank].flatten(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    return Batch(slices.chunk(world)[rank], share, random_mask(12), 0.0), model


def train_by_sgd(batch, model):
    """pretrain.train_step at RATES: (metrics of each step, weights). AdamW and LARS would hide a
    gradient of the wrong scale."""
    args = SimpleNamespace(size=8, temperature=0.5)
    optimizer = torch.optim.SGD(simclr.parameter_groups(model, 0.0), lr=9.0)
    step = partial(pretrain.train_step, model, optimizer)
    metrics = [step(lr, batch, args, torch.float32) for lr in RATES]
    return torch.stack(metrics), *(p.detach() for p in model.parameters())


def test_a_training_step_is_the_loss_of_two_views_and_a_step_down_its_gradient():
    """Input from -1 to 1 in three channels, NT-Xent with its temperature and mask."""
    batch, model = batch_and_model()
    views = 2 * simclr.augment(batch.slices, batch.augmentation, 8) - 1
    inputs = torch.stack([views, views, views], dim=1).flatten(1)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    expected = []
    for lr in RATES:
        z = inputs @ weight.T + bias
        loss = nt_xent_double_loop(z, 0.5, batch.excluded)
        spread = (z / z.norm(dim=1, keepdim=True)).std(dim=0).mean()
        expected.append([loss.item(), spread.item()])
        gradients = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (p - lr * g for p, g in zip((weight, bias), gradients, strict=True))
    metrics, *trained = train_by_sgd(batch, model)
    assert torch.allclose(metrics[:, [0, 2]], torch.tensor(expected), rtol=1e-5)
    assert torch.allclose(trained[0], weight, atol=1e-6)
    assert torch.allclose(trained[1], bias, atol=1e-6)


def test_only_the_network_computes_in_bfloat16():
    """Its views and the loss of what it gives are float32, as a plain loop over them says."""
    batch, model = batch_and_model()
    seen = []
    model.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output.detach()]))
    args = SimpleNamespace(size=8, temperature=0.1)
    loss, _ = pretrain.loss_of(model, batch, args, torch.bfloat16)
    inputs, embeddings = seen
    views = 2 * simclr.augment(batch.slices, batch.augmentation, 8) - 1
    assert torch.allclose(inputs[:, 0].float(), views, atol=1e-6)
    assert embeddings.dtype == torch.bfloat16
    slow = nt_xent_double_loop(embeddings, 0.1, batch.excluded)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)


def built(**changed):
    """pretrain.py's network and optimiser."""
    flags = {"arch": "resnet18", "seed": 0, "optimizer": "lars", "lr": 0.1, "weight_decay": 0.0}
    return pretrain.build(SimpleNamespace(**flags | changed), torch.device("cpu"))


def test_the_network_is_a_torchvision_resnet_and_simclrs_head():
    """Weights are torchvision's own for the seed; two layers, the first without a bias, 128 out."""
    model, _ = built(seed=5)
    torch.manual_seed(5)
    reference = torchvision.models.resnet18()
    reference.fc = nn.Identity()
    assert str(model[0]) == str(reference)
    for network in (model[0], load_encoder("scratch", "resnet18", 5)):
        assert all(map(torch.equal, network.parameters(), reference.parameters()))
    first, norm, relu, second = model[1]
    assert [type(norm), type(relu)] == [nn.BatchNorm1d, nn.ReLU] and first.bias is None
    assert first.weight.shape == (512, 512) and second.weight.shape == (128, 512)


DRAWN = 40_000


@pytest.fixture(scope="module")
def drawn():
    parameters = simclr.draw_augmentation(DRAWN, np.random.default_rng(0)).double().numpy()
    return SimpleNamespace(**dict(zip(simclr.Augmentation._fields, parameters, strict=True)))


def assert_uniform(values, low, high):
    """Each twentieth of the values lies where it must, to 2 % of the range."""
    shares = np.linspace(0, 1, 21)
    expected = low + shares * (high - low)
    assert np.abs(np.quantile(values, shares) - expected).max() < 0.02 * (high - low)


def test_crops_are_randomresizedcrops(drawn):
    """Area 0.08 to 1, aspect 3/4 to 4/3 (log), anywhere (SimCLR); below 3/4 no side is clipped."""
    area, ratio = drawn.height * drawn.width, drawn.width / drawn.height
    small = area < 0.75
    assert_uniform(area[small], 0.08, 0.75)
    assert small.mean() == pytest.approx(0.67 / 0.92, abs=0.01) and area.max() <= 1
    assert_uniform(np.log(ratio[small]), np.log(3 / 4), np.log(4 / 3))
    for start, length in ((drawn.top, drawn.height), (drawn.left, drawn.width)):
        assert start.min() >= 0 and (start + length).max() <= 1 + 1e-6
        assert_uniform(start[small] / (1 - length[small]), 0, 1)
    assert np.maximum(drawn.height, drawn.width)[area > 0.95].max() == 1


def test_flip_blur_and_jitter_have_simclrs_probabilities_and_ranges(drawn):
    blurred, jittered = drawn.sigma > 0, drawn.brightness != 1
    shares = [share.mean() for share in (drawn.flip, blurred, jittered)]
    assert shares == pytest.approx([0.5, 0.5, 0.8], abs=0.01) and set(drawn.flip) == {0, 1}
    assert_uniform(drawn.sigma[blurred] * 224, 0.1, 2)
    assert np.array_equal(jittered, drawn.contrast != 1)  # ColorJitter applies both, or none
    assert_uniform(drawn.brightness[jittered], 0.6, 1.4)
    assert_uniform(drawn.contrast[jittered], 0.6, 1.4)


def test_parameters_are_independent_of_each_other_and_of_the_other_view(drawn):
    """Correlations of the parameters of a view, of a slice's two views, of the next slice's."""
    area, ratio = drawn.height * drawn.width, drawn.width / drawn.height
    top, left = drawn.top / (1 - drawn.height).clip(1e-9), drawn.left / (1 - drawn.width).clip(1e-9)
    blurred, jittered = drawn.sigma > 0, drawn.brightness != 1
    sigma = np.where(blurred, drawn.sigma, drawn.sigma[blurred].mean())
    crop = [area, ratio, top, left, drawn.flip]
    one_view = np.array([*crop, blurred, sigma, jittered, drawn.brightness, drawn.contrast], float)
    for distance in (DRAWN // 2, 1):
        other = np.roll(one_view, distance, axis=1)
        assert np.abs(np.corrcoef(one_view, other)[:10, 10:]).max() < 0.03
    within = np.corrcoef(one_view[:, area < 0.75]) - np.eye(10)
    assert np.abs(within).max() < 0.03, within.round(3)


PLAIN = simclr.Augmentation(0.0, 1.0, 0.0, 1.0, flip=0.0, sigma=0.0, brightness=1.0, contrast=1.0)


def augmented(slices, size, *changes):
    """augment() of slices [b, H, W] with PLAIN parameters, changed for each of the 2b views."""
    drawn = [PLAIN._replace(**changed) for changed in changes]
    return simclr.augment(torch.as_tensor(slices), torch.tensor(drawn).T, size)


NOISE = np.random.default_rng(0).integers(0, 256, (1, 48, 48), dtype=np.uint8)


def test_views_come_in_order_and_each_has_its_own_parameters():
    """First views first: view i and view i + b are of slice i; a plain one is the slice itself."""
    slices = np.stack([NOISE[0], NOISE[0] // 2])
    views = augmented(slices, 48, {}, {"flip": 1.0}, {"flip": 1.0}, {})
    first, second = torch.from_numpy(slices) / 255
    expected = torch.stack([first, second.flip(1), first.flip(1), second])
    assert torch.allclose(views, expected, atol=1e-5)


def test_a_crop_is_cut_resized_and_flipped_as_torchvision_does():
    """At its edges ours sees the pixels beside the crop, torchvision's does not."""
    crop = {"top": 0.25, "height": 0.5, "left": 0.5, "width": 0.25}
    views = augmented(NOISE, 24, crop, crop | {"flip": 1.0})
    grey = torch.from_numpy(NOISE) / 255
    expected = tv.resize(grey[:, 12:36, 24:36], [24, 24], antialias=True)[0]
    inner = slice(3, 21)
    assert torch.allclose(views[0][inner, inner], expected[inner, inner], atol=1e-5)
    assert torch.allclose(views[1], views[0].flip(1), atol=1e-5)


@pytest.mark.parametrize("source, size", [(224, 96), (64, 64), (32, 96), (101, 33)])
def test_resizing_is_torchvisions_antialiased_resize(source, size):
    image = torch.rand(1, source, source, generator=torch.Generator().manual_seed(0))
    matrix = simclr.resize_matrix(torch.zeros(1), torch.full((1,), float(source)), source, size)
    ours = matrix @ image @ matrix.transpose(1, 2)
    assert torch.allclose(ours, tv.resize(image, [size, size], antialias=True), atol=1e-4)


def test_blur_is_a_gaussian_of_a_share_of_the_view_along_both_axes():
    views = augmented(NOISE, 48, {}, {"sigma": 1.5 / 48})
    expected = gaussian_filter(NOISE[0] / 255, 1.5, truncate=10)
    inner = slice(10, 38)  # at the edges ours renormalises, SciPy's reflects
    assert np.allclose(views[1][inner, inner], expected[inner, inner], atol=1e-5)
    assert views[1].mean() == pytest.approx(views[0].mean().item(), abs=0.01)


def test_jitter_scales_brightness_then_contrast_about_the_views_mean():
    """Clipped to 0..1 after each, as torchvision's ColorJitter; the order shows where it clips."""
    both = [(1.4, 0.6), (1.0, 1.4)]
    views = augmented(NOISE, 48, *({"brightness": b, "contrast": c} for b, c in both))
    for view, (brightness, contrast) in zip(views, both, strict=True):
        bright = np.clip(NOISE[0] / 255 * brightness, 0, 1)
        expected = np.clip(bright.mean() + contrast * (bright - bright.mean()), 0, 1)
        assert np.allclose(view, expected, atol=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero_as_a_cosine():
    """In 10 of 100 steps here; a function of the step and the number of steps alone."""
    rates = [simclr.learning_rate(step, 100, 0.1, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx(np.linspace(0.05, 0.5, 10))
    assert rates[10:] == pytest.approx(0.25 * (1 + np.cos(np.pi * np.arange(90) / 90)))
    assert simclr.learning_rate(0, 1, 0, 0.5) == 0.5
    assert simclr.learning_rate(1, 3, 1, 0.3) == pytest.approx(0.2)
    # a part of a step is rounded: 38 of the study's 375 warm up, not 37
    assert simclr.learning_rate(36, 375, 0.1, 0.38) == pytest.approx(0.37)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_weights_decay_and_adapt_but_batch_norm_and_biases_do_not(optimizer):
    """SimCLR; each parameter is in one group. LARS: momentum 0.9, trust 0.001 (You et al.)."""
    model, chosen = built(optimizer=optimizer, lr=0.2, weight_decay=0.03)
    kinds = {p: type(module) for module in model.modules() for p in module.parameters(False)}
    biases = {module.bias for module in model.modules() if isinstance(module, nn.Linear)}
    weights, others = chosen.param_groups
    assert {kinds[p] for p in weights["params"]} == {nn.Conv2d, nn.Linear}
    assert {kinds[p] for p in set(others["params"]) - biases} == {nn.BatchNorm1d, nn.BatchNorm2d}
    assert not biases & {*weights["params"]}
    assert len(weights["params"] + others["params"]) == len(kinds)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.03, 0)
    assert (weights["adapt"], others["adapt"]) == (True, False)
    assert weights["lr"] == others["lr"] == 0.2
    assert (simclr.MOMENTUM, simclr.TRUST_COEFFICIENT) == (0.9, 0.001)
    if optimizer == "adamw":
        assert isinstance(chosen, torch.optim.AdamW) and weights["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("lr", [2.0, torch.tensor(2.0)])
def test_lars_steps_as_the_formula_says(monkeypatch, lr):
    """You et al. 2017: v = m v + trust |w| / |g + d w| (g + d w); w -= lr v, tensor by tensor.

    Without adapting it is SGD with momentum. A norm of 0 scales by 1. Momenta are allocated once.
    The rate is a number, or a tensor, as in a CUDA graph.
    """
    expected = [np.array(values) for values in ([3.0, 4], [-0.5, 0.1], [0.0, 0], [1.0, -2])]
    tensors = [nn.Parameter(torch.tensor(values).float()) for values in expected]
    groups = [
        {"params": tensors[:3], "weight_decay": 0.5, "adapt": True},
        {"params": tensors[3:], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = simclr.LARS(groups, lr)
    velocity = [0.0] * 4
    for step in range(3):
        for i, w in enumerate(tensors):
            gradient = np.random.default_rng([step, i]).normal(size=w.shape)
            w.grad = torch.from_numpy(gradient).float()
            update = gradient + (0.5 if i < 3 else 0) * expected[i]
            norm = np.linalg.norm(expected[i])
            scale = 0.001 * norm / np.linalg.norm(update) if i < 3 and norm > 0 else 1
            velocity[i] = 0.9 * velocity[i] + scale * update
            expected[i] = expected[i] - 2.0 * velocity[i]
        optimizer.step()
        monkeypatch.setattr(torch, "zeros_like", None)
    for w, values in zip(tensors, expected, strict=True):
        assert np.allclose(w.detach().numpy(), values, rtol=1e-5, atol=1e-6)


def test_lars_leaves_weights_without_gradient_and_decay_as_they_are():
    """A share of 0 / 0 would make them NaN."""
    weights = nn.Parameter(torch.ones(2))
    weights.grad = torch.zeros(2)
    simclr.LARS([{"params": [weights], "weight_decay": 0.0, "adapt": True}], lr=1.0).step()
    assert weights.tolist() == [1, 1]
