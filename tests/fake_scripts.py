"""Stands in for Python where reproduce.sh's own logic is tested: the three scripts take no time.

They leave the files that reproduce.sh looks at, and a line each in $CALLS. $FAIL names a run whose
pre-training fails, $SLOW one that takes a while, $EDIT one during which common/simclr.py is edited;
$PRECISION is the machine's. Imports little, for speed.
"""

import csv
import fcntl
import json
import os
import sys
import time
import zlib
from pathlib import Path

COLUMNS = os.environ["COLUMNS_OF_RESULTS"].split(",")


def reduce(ct, out, *flags):
    flags = dict(zip(flags[::2], flags[1::2]))
    strategy = flags["--strategy"]
    out.mkdir(parents=True, exist_ok=True)
    pixels = zlib.crc32(b"".join(path.read_bytes() for path in sorted(ct.iterdir())))
    (out / "store.json").write_text(json.dumps({"crc32": {"slices.npy": pixels}}))
    if "--encoder" in flags:
        Path(flags["--encoder"]).read_text()
    name = "hash-6" if strategy == "hash" else f"{strategy}-{flags.get('--seed', '')}"
    (out / f"{name}.csv").write_text(str(pixels))
    (out / f"{name}.json").write_text('{"kept": 5}')
    print(f"{name}: kept 5 of 9 slices -> {out / name}.csv")


def pretrain(selection, run, *flags):
    if os.environ.get("SLOW") == run.name:
        time.sleep(2)
    if os.environ.get("EDIT") == run.name:
        with open("common/simclr.py", "a") as file:
            file.write("\nEDITED = True\n")
    if os.environ.get("FAIL") == run.name:
        sys.exit("error: it failed")
    run.mkdir(parents=True, exist_ok=True)
    (run / "encoder.pt").write_text(selection.read_text() + " ".join(flags))
    precision = os.environ.get("PRECISION", "bfloat16")
    first = {"command": "pretrain.py", "device": "cpu", "settings": {"precision": precision}}
    (run / "log.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps({'step': 5})}\n")


def evaluate(task, data, *flags):
    flags = dict(zip(flags[::2], flags[1::2]))
    line = dict.fromkeys(COLUMNS, "1") | {"task": task, "name": flags["--name"]}
    line |= {"seed": str(int(flags["--seeds"]) - 1), "protocol": flags["--protocol"]}
    line["folds"] = "5x10" if "--folds" in flags else ""
    shares = ["0.01", "0.1", "1"] if "--label-share" in flags else ["1"]
    results = Path(flags["--results"])
    with open(f"{results}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        head, *lines = results.read_text().splitlines() if results.exists() else [",".join(COLUMNS)]
        new = [",".join((line | {"label_share": share}).values()) for share in shares]
        results.write_text("\n".join([head, *(old for old in lines if old not in new), *new, ""]))


script, *arguments = sys.argv[1:]
if arguments[:1] == ["common.files"]:
    print(zlib.crc32(b"".join(Path(name).read_bytes() for name in arguments[1:])))
    sys.exit()
if script == "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
if script == "-c" and "importlib" in arguments[0]:  # that would read all flags
    print(f"cpu torch.{os.environ.get('PRECISION', 'bfloat16')}")
    sys.exit()
if script == "-c":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as file:
    csv.writer(file).writerow([script, *arguments])
if script == "reduce.py":
    reduce(Path(arguments[0]), Path(arguments[1]), *arguments[2:])
elif script == "pretrain.py":
    pretrain(Path(arguments[0]), Path(arguments[1]), *arguments[2:])
elif script == "evaluate.py" and arguments[0] not in ("tables", "study"):
    evaluate(*arguments)
