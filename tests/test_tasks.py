"""The downstream data sets, in the layouts in which they are published."""

import numpy as np
from PIL import Image

from common.tasks import load_task, split_of


def test_the_covid_and_head_ct_folders(tmp_path):
    """Layouts of the public sets; the duplicated head stays on one side of every split."""
    rng = np.random.default_rng(0)

    def picture(path, pixels=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8) if pixels is None else pixels).save(path)

    for kind in ("COVID", "NonCOVID"):
        for part, n in (("train", 4), ("val", 2), ("test", 3)):
            listing = tmp_path / "covid" / "Data-split" / kind / f"{part}CT_{kind}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(f"{part} {i}.png\n" for i in range(n)))
            for i in range(n):
                picture(tmp_path / "covid" / f"CT_{kind}" / f"{part} {i}.png")
    task = load_task("covid-ct", tmp_path / "covid", 24)
    assert {part: len(rows) for part, rows in split_of(task, 0).items()} == {"train": 8, "val": 4, "test": 6}
    assert task.images.shape == (18, 24, 24) and task.labels.sum() == 9 and task.vertical_flip

    twin = rng.integers(0, 256, (40, 30), dtype=np.uint8)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "labels.csv").write_text("id, hemorrhage\n" + "".join(f"{i},{int(i < 20)}\n" for i in range(40)))
    for i in range(40):
        picture(tmp_path / "head" / "head_ct" / f"{i:03d}.png", twin if i in (28, 29) else None)
    task = load_task("head-ct", tmp_path / "head", 24)
    for seed in range(20):
        split = split_of(task, seed)
        assert sorted(np.concatenate(list(split.values()))) == list(range(40))
        assert any({28, 29} <= set(rows) for rows in split.values())
        assert all(4 <= task.labels[split[part]].sum() <= 12 for part in split)
    assert any(not np.array_equal(split_of(task, 0)["test"], split_of(task, s)["test"]) for s in range(1, 5))
