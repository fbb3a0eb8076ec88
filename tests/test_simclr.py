import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from common import simclr


def nt_xent_double_loop(z, temperature):
    """SimCLR, eq. 1, term by term; rows k and k + n / 2 are the two views of a sample."""
    n = len(z)
    z = [row / row.norm() for row in z.double()]
    total = 0.0
    for i in range(n):
        partner = (i + n // 2) % n
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i)
        total -= math.log(math.exp(z[i] @ z[partner] / temperature) / others)
    return total / n


@pytest.mark.parametrize(
    "n, dimensions, temperature", [(2, 8, 0.5), (3, 4, 0.1), (16, 128, 0.1), (7, 2, 1.0)]
)
def test_nt_xent_is_the_double_loop(n, dimensions, temperature):
    z = torch.randn(2 * n, dimensions, generator=torch.Generator().manual_seed(n))
    loss, _ = simclr.nt_xent(z, temperature)
    assert loss.item() == pytest.approx(nt_xent_double_loop(z, temperature), rel=1e-5)


def test_contrastive_top1_counts_found_partners():
    z = torch.eye(4).repeat(2, 1)
    assert simclr.nt_xent(z, 0.1)[1] == 1
    assert simclr.nt_xent(torch.cat([z[:4], z[:4].roll(1, 0)]), 0.1)[1] == 0


@pytest.mark.parametrize("source, size", [(224, 96), (64, 64), (32, 96), (101, 33)])
def test_resizing_is_torchvisions_antialiased_resize(source, size):
    image = torch.rand(1, source, source, generator=torch.Generator().manual_seed(0))
    matrix = simclr.resize_matrix(torch.zeros(1), torch.full((1,), float(source)), source, size)
    ours = matrix @ image @ matrix.transpose(1, 2)
    assert torch.allclose(ours, tv.resize(image, [size, size], antialias=True), atol=1e-4)
    flipped = simclr.resize_matrix(
        torch.full((1,), float(source)), torch.full((1,), -float(source)), source, size
    )
    assert torch.allclose(flipped, matrix.flip(1), atol=1e-5)


def test_blur_is_a_gaussian_and_zero_leaves_the_slice():
    matrix = simclr.blur_matrix(torch.tensor([0.0, 1.5]), 33)
    assert torch.equal(matrix[0], torch.eye(33))
    kernel = np.exp(-((np.arange(33) - 16.0) ** 2) / (2 * 1.5**2))
    assert np.allclose(matrix[1, 16].numpy(), kernel / kernel.sum(), atol=1e-6)


def test_every_sample_of_a_batch_gets_its_own_parameters():
    """The same slice 64 times: no two views alike, all in range, the same again from the same seed."""
    slice8 = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (1, 64, 64), dtype=np.uint8)
    )
    views = [
        simclr.augment(slice8.repeat(64, 1, 1), 32, torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert views[0].shape == (64, 32, 32) and views[0].min() >= 0 and views[0].max() <= 1
    assert len(torch.unique(views[0].flatten(1), dim=0)) == 64
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_crops_stay_inside_and_in_range():
    top, tall, left, wide = simclr.random_crop(10_000, torch.Generator().manual_seed(0))
    assert (
        min(top.min(), left.min()) >= 0 and max((top + tall).max(), (left + wide).max()) <= 1 + 1e-6
    )
    area, ratio = tall * wide, wide / tall
    assert (
        0.075 < area.min() < 0.09
        and area.max() <= 1
        and 0.74 < ratio.min() < 0.76
        and 1.32 < ratio.max() < 1.34
    )
    for parameter in (top, tall, left, wide):
        assert len(parameter.unique()) > 9_000


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [simclr.learning_rate(step, 100, 10, 0.5) for step in range(100)]
    assert rates[0] == 0.05 and max(rates) == rates[9] == rates[10] == 0.5 and 0 < rates[99] < 0.001
    assert simclr.learning_rate(0, 1, 0, 0.5) == 0.5


def test_lars_step_on_one_tensor():
    """You et al. 2017: v = m v + trust |w| / |g + d w| (g + d w); w -= lr v."""
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = simclr.LARS([{"params": [w], "weight_decay": 0.5, "adapt": True}], lr=2.0)
    expected, velocity = np.array([3.0, 4.0]), 0
    for gradient in ([1.0, 0.0], [0.0, -2.0]):
        w.grad = torch.tensor([gradient])
        optimizer.step()
        update = np.array(gradient) + 0.5 * expected
        velocity = (
            0.9 * velocity + 0.001 * np.linalg.norm(expected) / np.linalg.norm(update) * update
        )
        expected = expected - 2.0 * velocity
    assert np.allclose(w.detach().numpy()[0], expected, atol=1e-6)
