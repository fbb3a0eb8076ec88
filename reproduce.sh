#!/usr/bin/env bash
# Reproduces the tables: reduce, pre-train and evaluate every row, print the tables. See usage below.
set -euo pipefail

usage() {
  cat <<'TEXT'
bash reproduce.sh                  the whole pipeline on toy CT made on the spot: minutes on a laptop, nothing downloaded
bash reproduce.sh --data DIR       the same rows on real CT
bash reproduce.sh --test           the tests

On first use it makes .venv and installs requirements.txt there (Python 3.11 or newer). With PYTHON=/path/to/python set
it uses that Python as it is. Stopped and started again, it goes on where it was.

  --out DIR          results (default: results/toy, or results/<name of the data folder>)
  --seeds K          pre-training runs a row (default: 1)
  --embedding E      encoder of the rows Embedding: a file or imagenet (default: the encoder of ALL, seed 0)
  --rows "A B"       of the rows below (default: all of them)
  --pretrain "..."   flags for every pretrain.py (default for real data: "--epochs 100", the rest pretrain.py's)
  --evaluate "..."   flags for every evaluate.py (default for real data: evaluate.py's, the paper's fine-tuning)

Rows: scratch (random weights), ALL, Hash-3, Hash-6, Hash-12, HashAll (Hash-6 over all volumes at once), SSIM, MI and
Embedding at reduce.py's default thresholds; and as many slices as Hash-6 keeps, so that the choice of slices can be told
from their number: EveryN, Random, SSIM-budget, MI-budget, Embedding-budget. Any row but scratch with -steps after its name
is trained as many optimiser steps as ALL instead of as many epochs; of these, Hash-6-steps and Random-steps are default.

DIR must hold ct/ and at least one of the others; a link to a folder will do:
  ct/         any tree of DICOM series or PNG slices to pre-train on. The paper used
                LIDC-IDRI            1,010 chest CT, cancerimagingarchive.net, CC BY 3.0
                FDG-PET-CT-Lesions   the CT of 891 whole-body scans, cancerimagingarchive.net, licence and access: see its page
  covid-ct/   COVID-CT: CT_COVID/, CT_NonCOVID/ and Data-split/ unpacked from github.com/UCSD-AI4H/COVID-CT
                (figures collected from papers; for research)
  organ/      organsmnist.npz of MedMNIST, medmnist.com, CC BY 4.0
  head-ct/    Head CT - hemorrhage (200 images, labels.csv), Kaggle (felipekitamura/head-ct-hemorrhage), no licence
                stated; it stands in for the paper's brain CT, which is not public
Access and licences change: read them at the source before you use the data.
TEXT
}

all_rows='scratch ALL EveryN Random Hash-3 Hash-6 Hash-12 HashAll SSIM MI Embedding SSIM-budget MI-budget Embedding-budget Hash-6-steps Random-steps'

main() {
  parse "$@"
  cd "$(dirname "${BASH_SOURCE[0]}")"
  prepare_python
  if [ "$mode" = test ]; then exec "$python" -m pytest -q tests; fi
  prepare_data
  mkdir -p "$out/done"

  reduce --strategy all # always called: it notices when the CT has changed
  once hash-6 reduce --strategy hash --threshold 6
  budget=$("$python" -c 'import json, sys; s = json.load(open(sys.argv[1])); print(round(s["kept"] / s["slices"], 4))' "$out/slices/hash-6.json")
  for row in $rows; do
    if [ "$row" = scratch ]; then evaluate_row scratch scratch; continue; fi
    encoders=()
    for ((seed = 0; seed < seeds; seed++)); do
      pretrain_row "$row" "$seed"
      encoders+=("$out/runs/$row-seed-$seed/encoder.pt")
    done
    evaluate_row "$row" "${encoders[@]}"
  done

  "$python" evaluate.py tables "$out/results.csv" > "$out/tables.md.tmp"
  mv "$out/tables.md.tmp" "$out/tables.md"
  cat "$out/tables.md"
  echo
  echo "Written to $out/tables.md; selections to look at: $out/slices/*.png"
}

pretrain_row() {
  local flags=$pretrain_flags
  if [[ $1 == *-steps ]]; then # as many steps as ALL made
    pretrain_row ALL 0
    flags="$(sed -E 's/--(epochs|steps) +[0-9]+//' <<< "$flags") --steps $(steps_of ALL)"
  fi
  select_row "${1%-steps}" "$2"
  once "pretrain-$1-$2" "$python" pretrain.py "$out/slices/$selection.csv" "$out/runs/$1-seed-$2" --seed "$2" $flags
}

steps_of() { sed -nE '1s/.*"steps": ([0-9]+).*/\1/p' "$out/runs/$1-seed-0/log.jsonl"; }

# Makes the selection of a row; leaves its name in $selection. Random draws anew for every pre-training seed.
select_row() {
  local flags
  case $1 in
    ALL) selection=all flags='--strategy all' ;;
    HashAll) selection=hash-6-dataset flags='--strategy hash --threshold 6 --scope dataset' ;;
    Hash-*) selection=hash-${1#Hash-} flags="--strategy hash --threshold ${1#Hash-}" ;;
    EveryN) selection=every-n-keep-$budget flags="--strategy every-n --keep $budget" ;;
    Random)
      selection=random-keep-$budget flags="--strategy random --keep $budget --seed $2"
      if [ "$2" != 0 ]; then selection=$selection-seed-$2; fi ;;
    SSIM) selection=ssim-0.7 flags='--strategy ssim --threshold 0.7' ;;
    MI) selection=mi-0.45 flags='--strategy mi --threshold 0.45' ;;
    Embedding) selection=embedding-0.997 flags='--strategy embedding --threshold 0.997' ;;
    *-budget)
      selection=${1%-budget}
      selection=$(tr '[:upper:]' '[:lower:]' <<< "$selection")-keep-$budget
      flags="--strategy ${selection%%-*} --keep $budget" ;;
  esac
  if [[ $1 != Embedding* ]]; then once "$selection" reduce $flags; return; fi
  local this=$selection encoder=$embedding
  if [ -z "$encoder" ]; then pretrain_row ALL 0; encoder=$out/runs/ALL-seed-0/encoder.pt; fi
  selection=$this
  once "$selection" reduce $flags --encoder "$encoder"
}

evaluate_row() {
  local name=$1 task folder
  shift
  for task in $tasks; do
    if [ "$mode" = toy ]; then folder=$out/toy; else folder=$data/$task; fi
    once "evaluate-$name-$task" "$python" evaluate.py "$task" "$folder" \
      --encoder "$@" --results "$out/results.csv" --name "$name" $evaluate_flags
  done
}

reduce() { "$python" reduce.py "$ct" "$out/slices" $reduce_flags "$@"; }

# once KEY COMMAND...: runs the command unless it has ended well before, word for word.
once() {
  local key=$1
  shift
  if [ -f "$out/done/$key" ] && [ "$(cat "$out/done/$key")" = "$*" ]; then return; fi
  printf '\n--- %s\n' "$key"
  "$@"
  printf '%s\n' "$*" > "$out/done/$key"
}

parse() {
  mode=toy data='' out='' seeds=1 embedding='' reduce_flags='' pretrain_flags='' evaluate_flags='' rows=$all_rows
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage; exit ;;
      --test) mode=test; shift; continue ;;
      --data | --out | --seeds | --rows | --embedding | --pretrain | --evaluate) [ $# -gt 1 ] || stop "$1 needs a value" ;;
      *) stop "$1 is not an option" ;;
    esac
    case $1 in
      --data) mode=real data=$2 ;;
      --out) out=$2 ;;
      --seeds) seeds=$2 ;;
      --rows) rows=$2 ;;
      --embedding) embedding=$2 ;;
      --pretrain) pretrain_flags=$2 ;;
      --evaluate) evaluate_flags=$2 ;;
    esac
    shift 2
  done
  for row in $rows; do
    case " $all_rows " in *" $row "* | *" ${row%-steps} "*) ;; *) stop "--rows: $row is not a row" ;; esac
  done
  if [ "$mode" = real ]; then
    [ -d "$data/ct" ] || stop "$data/ct: no such folder"
    data=$(cd "$data" && pwd)
  fi
  if [ -f "$embedding" ]; then embedding=$(cd "$(dirname "$embedding")" && pwd)/$(basename "$embedding"); fi
  if [ -n "$out" ]; then mkdir -p "$out" && out=$(cd "$out" && pwd); fi
}

prepare_python() {
  if [ -n "${PYTHON:-}" ]; then python=$PYTHON; return; fi
  python=.venv/bin/python
  if cmp -s requirements.txt .venv/installed.txt; then return; fi
  local found=''
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$candidate; break; fi
  done
  [ -n "$found" ] || stop "needs Python 3.11 or newer, and found none on PATH"
  echo "Installing requirements.txt into .venv (about 5 GB, minutes) ..."
  "$found" -m venv .venv || stop "$found cannot make a virtual environment: on Debian or Ubuntu, apt-get install python3-venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt || stop "pip could not install requirements.txt"
  cp requirements.txt .venv/installed.txt
}

prepare_data() {
  if [ "$mode" = toy ]; then
    out=${out:-$PWD/results/toy} reduce_flags='--size 128' tasks='toy-lesion toy-organ'
    pretrain_flags=${pretrain_flags:---arch resnet18 --size 32 --batch-size 64 --epochs 4 --optimizer adamw}
    evaluate_flags=${evaluate_flags:---protocol linear --arch resnet18 --size 64 --seeds 4}
    ct=$out/toy/ct
    [ -d "$out/toy" ] || "$python" -m common.toy "$out/toy"
    return
  fi
  out=${out:-$PWD/results/$(basename "$data")} ct=$data/ct tasks=''
  pretrain_flags=${pretrain_flags:---epochs 100}
  for task in covid-ct organ head-ct; do
    if [ -d "$data/$task" ]; then tasks="$tasks $task"; else echo "$data/$task: no such folder, so this task is left out"; fi
  done
  [ -n "$tasks" ] || stop "$data: holds none of covid-ct, organ and head-ct"
}

stop() {
  echo "error: $1 (bash reproduce.sh --help)" >&2
  exit 1
}

main "$@"
