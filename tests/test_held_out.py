"""--hold-out: volumes that are never trained on, and what the log says of them."""

import numpy as np
import pytest
import torch
from test_pretrain import TINY, log
from test_simclr import nt_xent_double_loop

import pretrain
from common import batches, simclr
from common.encoder import to_input
from common.store import Selection, Store


@pytest.mark.parametrize("share, volumes", [(0.01, 1), (0.4, 4)])
def test_whole_volumes_are_held_out_of_every_sample(share, volumes):
    """Also where the slice that stands for another lies in another volume."""
    n, groups = np.arange(102), np.array_split(np.arange(102), 9)
    chosen = Selection(Store(None, None, None, [], groups), n[::5], n // 5 * 5, "digest")
    parts, volume = batches.hold_out(chosen, share, seed=3), chosen.store.volume_index
    inside = [batches.epoch_slices(part, "all", 0, 0) for part in parts]
    assert sorted(np.concatenate(inside)) == n.tolist()
    assert len(set(volume[inside[1]])) == volumes == 9 - len(set(volume[inside[0]]))
    for part, its in zip(parts, inside, strict=True):
        assert batches.epoch_slices(part, "kept", 0, 0).tolist() == [i for i in its if i % 5 == 0]
        for epoch in range(9):
            drawn = batches.epoch_slices(part, "clusters", 0, epoch)
            assert set(drawn) <= set(its) and (drawn // 5 * 5).tolist() == part.kept.tolist()
    assert len({len(batches.hold_out(chosen, share, seed)[0].kept) for seed in range(9)}) > 1
    assert batches.hold_out(chosen, 0, 3) == (chosen, None)


def slow_metrics(model, held_out, args):
    """View by view, so that none can depend on another; loss and cosine pair by pair."""
    found = []
    for i, indices in enumerate(batches.epoch_batches(held_out, args, 0)):
        n, slices = len(indices), torch.from_numpy(held_out.store.slices[indices])
        rng = np.random.default_rng([args.seed, i, batches.AUGMENT, 0])
        views = simclr.augment(slices, simclr.draw_augmentation(2 * n, rng), args.size)
        z = torch.cat([model(to_input(view[None])) for view in views])
        cosines = [torch.cosine_similarity(z[k], z[k + n], dim=0).item() for k in range(n)]
        found.append((nt_xent_double_loop(z, args.temperature).item(), np.mean(cosines)))
    assert len(found) == 2
    return tuple(np.mean(found, axis=0))


def test_the_log_has_their_loss_and_cosine(store, here, stopped, monkeypatch, tmp_path):
    """With running statistics, and the same views in each line; training does not notice."""
    measure, slow = pretrain.held_out_metrics, []

    def compare(model, held_out, args, *rest):
        drawn = batches.hold_out(pretrain.read_selection(args.selection), 0.4, seed=1)
        assert held_out.kept.tolist() == drawn[1].kept.tolist()
        slow.append(slow_metrics(model.eval(), held_out, args))
        before = [tensor.clone() for tensor in model.state_dict().values()]
        metrics = measure(model, held_out, args, *rest)
        assert model.training and all(map(torch.equal, before, model.state_dict().values()))
        return metrics

    monkeypatch.setattr(pretrain, "held_out_metrics", compare)
    command = ["pretrain.py", store / "all.csv", tmp_path, *TINY, "--batch-size", 10, "--epochs", 2]
    command += ["--precision", "float32", "--device", "cpu", "--seed", 1, "--hold-out"]
    here(*command, 0.4)
    header, *lines = log(tmp_path)
    assert header["settings"]["slices"] in (39, 40) and header["step"] == "eager"
    for line, expected in zip(lines, slow, strict=True):
        assert (line["held_out_loss"], line["held_out_positive"]) == pytest.approx(expected, 1e-4)
    assert slow[0] != slow[1] and " 0 slices to train on make" in stopped(*command, 1)
    assert " slices held out make batches of " in stopped(*command, 0.4, "--loss-groups", 11)
