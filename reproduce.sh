#!/usr/bin/env bash
# Reproduces the tables: reduces, pre-trains and evaluates every row, then prints them.
set -euo pipefail

usage() {
  cat <<'TEXT'
bash reproduce.sh              the whole pipeline on toy CT made on the spot: minutes on a laptop, nothing downloaded
bash reproduce.sh --data DIR   the same rows on real CT: DIR/ct, and DIR/covid-ct, organ or head-ct (see README.md)
bash reproduce.sh --test       the tests
bash reproduce.sh --install    only installs

On first use it makes .venv and installs requirements.txt there (Python 3.11 or newer); with PYTHON=/path/to/python set
it uses that Python as it is. Stopped and started again, it goes on where it was. What other code, flags or data made is
never taken for new: the scripts refuse it, and say whether another --out or another --results will do.

  --out FOLDER         for all that is made (default: results/toy, or results/NAME of DIR)
  --results NAME.csv   in --out, for an ablation of the evaluation that reuses its encoders (default: results.csv)
  --seeds K            pre-training runs a row (default: 1; toy: 2)
  --rows "A B"         only these of the rows below; Embedding and -steps need ALL (toy: some of them by default)
  --reduce, --pretrain, --evaluate "..."   flags for every call of that script (defaults: settings_for_real below)
TEXT
  echo "Rows: $(row_names)" | fold -s -w 118
}

hash_6='--strategy hash --threshold 6'
# row NAME "flags of reduce.py" "flags of pretrain.py": the rows of the tables, in their order. Paths are below --out.
table_rows() {
  row scratch
  row ALL              "--strategy all"
  row EveryN           "--strategy every-n --keep slices/Hash-6.csv"
  row Random           "--strategy random --keep slices/Hash-6.csv --seed SEED"
  row Random-matched   "--strategy random --like slices/Hash-6.csv --seed SEED"
  row Hash-3           "--strategy hash --threshold 3"
  row Hash-6           "$hash_6"
  row Hash-12          "--strategy hash --threshold 12"
  row HashAll          "--strategy hash --threshold 6 --scope dataset"
  row SSIM             "--strategy ssim"
  row MI               "--strategy mi"
  row Embedding        "--strategy embedding --encoder runs/ALL-0/encoder.pt"
  row SSIM-budget      "--strategy ssim --keep slices/Hash-6.csv"
  row MI-budget        "--strategy mi --keep slices/Hash-6.csv"
  row Embedding-budget "--strategy embedding --encoder runs/ALL-0/encoder.pt --keep slices/Hash-6.csv"
  row Redundant        "--strategy redundant --like slices/Hash-6.csv"
  row ALL-masked       "--strategy all"                     "--mask-negatives 6"
  row Clusters-6       "$hash_6"                            "--sample clusters"
  row ALL-c32          "--strategy all"                     "--neighbours 32"
  row ALL-c32-masked   "--strategy all"                     "--neighbours 32 --mask-negatives 6"
  row Hash-6-steps     "$hash_6"                            "--steps-of runs/ALL-0"
  row Random-steps     "--strategy random --keep slices/Hash-6.csv --seed SEED" "--steps-of runs/ALL-0"
}
toy_rows='scratch ALL EveryN Random-matched Hash-6 SSIM MI Embedding Redundant ALL-masked Clusters-6 ALL-c32 ALL-c32-masked
  Hash-6-steps'

main() {
  mode=toy data='' out='' results=results.csv seeds='' rows='' reduce='' pretrain='' evaluate=''
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage; exit ;;
      --test | --install) mode=${1#--} ;;
      --data | --out | --results | --seeds | --rows | --reduce | --pretrain | --evaluate)
        [ $# -gt 1 ] || stop "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift ;;
      *) stop "$1 is not an option" ;;
    esac
    shift
  done
  if [ -n "$data" ]; then mode=real data=$(cd "$data" && pwd); fi
  here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also through a link
  install
  if [ "$mode" = test ]; then cd "$here" && exec "$python" -m pytest -q tests; fi
  [ "$mode" != install ] || exit 0
  "settings_for_$mode"
  rows=$(echo ${rows:-$(row_names)}) # on one line
  for name in $rows; do [[ " $(row_names) " == *" $name "* ]] || stop "--rows: $name is not a row"; done
  mkdir -p "$out/done" && cd "$out"
  if [ "$mode" = toy ]; then PYTHONPATH=$here "$python" -m common.toy toy; fi
  if [ ! -e "$results" ]; then rm -f done/evaluate-*; fi
  select_slices Hash-6 "$hash_6" # for the budgets of other rows
  table_rows
  "$python" "$here/evaluate.py" tables "$results" > tables.md.tmp
  mv tables.md.tmp tables.md
  "$python" "$here/evaluate.py" figure "$results" figure.svg
  cat tables.md
  printf '\nWritten to %s, with figure.svg beside it; selections to look at: %s\n' "$PWD/tables.md" "$PWD/slices/*.png"
}

install() {
  python=${PYTHON:-$here/.venv/bin/python}
  if [[ $python == */* ]]; then python=$(realpath -sm "$python"); fi # the work is done in --out
  if [ -n "${PYTHON:-}" ] || cmp -s "$here/requirements.txt" "$here/.venv/installed.txt"; then return; fi
  echo 'Installing requirements.txt into .venv (about 5 GB, minutes) ...'
  python3 -m venv "$here/.venv" || stop 'python3 -m venv failed: on Debian or Ubuntu, apt-get install python3-venv'
  "$python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt" || stop 'pip could not install'
  cp "$here/requirements.txt" "$here/.venv/installed.txt"
}

settings_for_toy() {
  out=${out:-$here/results/toy} data=toy tasks='toy-lesion.npz toy-organ.npz' seeds=${seeds:-2} rows=${rows:-$toy_rows}
  reduce=${reduce:---size 64}
  pretrain=${pretrain:---arch resnet18 --size 32 --batch-size 64 --epochs 2 --warmup 0.1 --optimizer adamw}
  evaluate=${evaluate:---protocol linear --arch resnet18 --size 64 --seeds 2}
}

settings_for_real() {
  out=${out:-$here/results/$(basename "$data")} tasks='' seeds=${seeds:-1}
  pretrain=${pretrain:---epochs 100 --warmup 0.1}
  evaluate=${evaluate:---protocol finetune --seeds $((seeds > 5 ? seeds : 5))}
  for task in covid-ct organ head-ct; do
    if [ -d "$data/$task" ]; then tasks="$tasks $task"; else echo "$data/$task: no such folder, so it is left out"; fi
  done
  [ -n "$tasks" ] || stop "$data: holds none of covid-ct, organ and head-ct"
}

row() {
  local name=$1 encoders=() flags seed task
  if [[ " $rows " != *" $name "* ]]; then return; fi
  if [ $# = 1 ]; then encoders=("$name"); fi # scratch
  for ((seed = 0; $# > 1 && seed < seeds; seed++)); do
    select_slices "$name" "$2"
    read -ra flags <<< "$pretrain ${3-}"
    once "pretrain-$name-$seed" "runs/$name-$seed/encoder.pt" "$selection" \
      pretrain.py "$selection" "runs/$name-$seed" --seed "$seed" "${flags[@]}"
    encoders+=("runs/$name-$seed/encoder.pt")
  done
  read -ra flags <<< "$evaluate"
  for task in $tasks; do
    once "evaluate-$name-$task" "$results" "$data/$task" \
      evaluate.py "${task%.npz}" "$data/$task" --encoder "${encoders[@]}" --name "$name" --results "$results" "${flags[@]}"
  done
}

row_names() { (row() { printf '%s ' "$1"; }; table_rows); }

# select_slices NAME "FLAGS": makes the row's selection; some are drawn anew for every seed.
select_slices() {
  local name=$1 flags
  if [[ $2 == *SEED* ]]; then name=$1-$seed; fi
  selection=slices/$name.csv
  read -ra flags <<< "$reduce ${2/SEED/${seed-}}"
  once "select-$name" "$selection" "$data/ct" reduce.py "$data/ct" slices --name "$name" "${flags[@]}"
}

# once NAME PRODUCT DATA SCRIPT WORD...: runs the script, unless PRODUCT is there and the same words, scripts, files of
# DATA and among the words (names, sizes, times) have made it. Otherwise the script itself knows what is done.
once() {
  local name=$1 product=$2 data=$3 key word inputs=()
  shift 3
  for word in "$@" "${@/%//encoder.pt}"; do # with those of runs
    if [ -f "$word" ] && [ "$word" != "$product" ]; then inputs+=("$word"); fi
  done
  key=$(printf '%s\n' "$@"; cat "$here"/*.py "$here"/common/*.py | cksum
    { ls -lnLR --time-style=full-iso "$data" "${inputs[@]}" 2> /dev/null || true; } | cksum)
  if [ -e "$product" ] && [ "$(cat "done/$name" 2>/dev/null)" = "$key" ]; then return; fi
  printf '\n--- %s\n' "$name"
  "$python" "$here/$1" "${@:2}"
  printf '%s\n' "$key" > "done/$name"
}

stop() { echo "error: $1 (bash reproduce.sh --help)" >&2; exit 1; }
main "$@"; exit # on one line, so that an edit of this file does not reach a run at work
