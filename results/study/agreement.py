"""How much selections of one store agree: agreement.md beside this file.

    python results/study/agreement.py OUT/all.csv OUT/hash-6.csv OUT/random-keep-857.csv ...

Prints, as Markdown, what each keeps and its dose, and for every pair the Jaccard index of the kept
slices: the share of those in either that are in both.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.files import Flags, fail, run_script
from common.reduction import expected_dose
from common.store import read_selection


def main():
    parser = Flags(description=__doc__)
    parser.add_argument("selections", type=Path, nargs="+", metavar="SELECTION.csv")
    paths = parser.parse_args().selections
    if len({path.resolve().parent for path in paths}) > 1:
        fail("the selections belong to several stores: give those of one")
    selections = {path.stem: read_selection(path) for path in paths}
    print("| selection | slices | share | share of a volume, min to max | dose |")
    print("|---|---|---|---|---|")
    for name, (store, kept, *_) in selections.items():
        shares = [np.isin(slices, kept).mean() for slices in store.volumes]
        share = f"{len(kept) / len(store.slices):.1%} | {min(shares):.1%} to {max(shares):.1%}"
        dose = expected_dose(store.hashes[kept], store.volume_index[kept])
        print(f"| {name} | {len(kept)} | {share} | {dose:.2f} |")
    print(f"\n| Jaccard | {' | '.join(selections)} |")
    print("|---" * (len(selections) + 1) + "|")
    for name, (_, kept, *_) in selections.items():
        jaccard = [
            len(np.intersect1d(kept, other.kept)) / len(np.union1d(kept, other.kept))
            for other in selections.values()
        ]
        print(f"| {name} | {' | '.join(f'{share:.2f}' for share in jaccard)} |")


if __name__ == "__main__":
    run_script(main)
