import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from common import simclr


def nt_xent_double_loop(z, temperature, excluded=None):
    """SimCLR, eq. 1, term by term; rows k and k + n / 2 are the two views of a sample."""
    n = len(z)
    samples = n // 2
    z = [row / row.norm() for row in z.double()]
    total = 0.0
    for i in range(n):
        partner = (i + samples) % n
        others = 0.0
        for k in range(n):
            masked = excluded is not None and excluded[i % samples][k % samples]
            if k != i and not masked:
                others = others + torch.exp(z[i] @ z[k] / temperature)
        total = total - torch.log(torch.exp(z[i] @ z[partner] / temperature) / others)
    return total / n


SHAPES = [(2, 8, 0.5), (3, 4, 0.1), (16, 128, 0.1), (7, 2, 1.0)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n, dimensions, temperature", SHAPES)
def test_nt_xent_is_the_double_loop(n, dimensions, temperature, masked):
    """Values and gradients; masked: with some pairs of samples that are no negatives."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(2 * n, dimensions, generator=generator, requires_grad=True)
    excluded = None
    if masked:
        excluded = torch.rand(n, n, generator=generator) < 0.3
        excluded = (excluded | excluded.T).fill_diagonal_(False)
    loss, _ = simclr.nt_xent(z, temperature, excluded)
    [gradient] = torch.autograd.grad(loss, z)
    slow = nt_xent_double_loop(z, temperature, excluded)
    [expected] = torch.autograd.grad(slow, z)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-6)


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
    length = torch.full((1,), float(source))
    flipped = simclr.resize_matrix(torch.zeros(1), length, source, size, flip=torch.ones(1))
    assert torch.allclose(flipped, matrix.flip(1), atol=1e-5)


def test_blur_is_a_gaussian_and_zero_leaves_the_slice():
    matrix = simclr.blur_matrix(torch.tensor([0.0, 1.5]), 33)
    assert torch.equal(matrix[0], torch.eye(33))
    kernel = np.exp(-((np.arange(33) - 16.0) ** 2) / (2 * 1.5**2))
    assert np.allclose(matrix[1, 16].numpy(), kernel / kernel.sum(), atol=1e-6)


def test_every_view_gets_its_own_parameters():
    """The same slice 32 times: no two of 64 views alike, all in range, the same from the same seed."""
    slice8 = np.random.default_rng(0).integers(0, 256, (1, 64, 64), dtype=np.uint8)
    slices = torch.from_numpy(slice8).repeat(32, 1, 1)

    def views(seed):
        parameters = simclr.draw_augmentation(64, np.random.default_rng(seed))
        return simclr.augment(slices, parameters, 32)

    first = views(1)
    assert first.shape == (64, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert len(torch.unique(first.flatten(1), dim=0)) == 64
    assert torch.equal(first, views(1)) and not torch.equal(first, views(2))


def test_a_view_is_what_its_parameters_say():
    """Crop, flip, brightness and contrast by torchvision and plain arithmetic, without blur."""
    slice8 = torch.arange(0, 256, dtype=torch.uint8).reshape(1, 16, 16)
    same = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    changed = [0.25, 0.5, 0.5, 0.5, 1.0, 0.0, 1.2, 0.7]
    plain, view = simclr.augment(slice8, torch.tensor([same, changed]).T, 16)
    grey = slice8[0] / 255
    assert torch.allclose(plain, grey, atol=1e-6)
    expected = tv.resize(grey[None, 4:12, 8:16].flip(2), [16, 16], antialias=True)[0]
    inner = slice(2, 14)  # at its edges our crop sees the pixels beside it, torchvision's does not
    expected = (expected * 1.2).clamp(0, 1)
    mean = expected.mean()
    expected = (mean + 0.7 * (expected - mean)).clamp(0, 1)
    assert torch.allclose(view[inner, inner], expected[inner, inner], atol=0.02)


def test_crops_stay_inside_and_in_range():
    top, height, left, width = simclr.random_crop(10_000, np.random.default_rng(0))
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, ratio = height * width, width / height
    assert 0.075 < area.min() < 0.09 and area.max() <= 1
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34
    for parameter in (top, height, left, width):
        assert len(np.unique(parameter)) > 9_000


def test_learning_rate_warms_up_and_falls_to_zero():
    """In 10 of 100 steps here; a function of the step and the number of steps alone."""
    rates = [simclr.learning_rate(step, 100, 0.1, 0.5) for step in range(100)]
    assert rates[0] == 0.05 and max(rates) == rates[9] == rates[10] == 0.5 and 0 < rates[99] < 0.001
    assert simclr.learning_rate(0, 1, 0, 0.5) == 0.5
    assert [simclr.learning_rate(step, 3, 1, 0.3) for step in range(3)] == pytest.approx(
        [0.1, 0.2, 0.3]
    )


def test_precision_is_chosen_by_hardware_and_never_where_it_is_broken(monkeypatch):
    cpu = torch.device("cpu")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(simclr, "bf16_pays", lambda device, native=native: native)
        assert simclr.choose_precision("auto", cpu, 96) == dtype
        assert simclr.choose_precision("auto", cpu, 16) == torch.float32
        assert simclr.choose_precision("float32", cpu, 96) == torch.float32
        assert simclr.choose_precision("bfloat16", cpu, 17) == torch.bfloat16
    with pytest.raises(ValueError, match="more than 16 pixels"):
        simclr.choose_precision("bfloat16", cpu, 16)


def test_lars_step_on_one_tensor(monkeypatch):
    """You et al. 2017: v = m v + trust |w| / |g + d w| (g + d w); w -= lr v.

    The momentum is allocated once, not at every step.
    """
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
        monkeypatch.setattr(torch, "zeros_like", None)
    assert np.allclose(w.detach().numpy()[0], expected, atol=1e-6)
