#!/usr/bin/env bash
# Reproduces the tables: reduce, pre-train and evaluate every row, print the tables. See usage below.
set -euo pipefail

usage() {
  cat <<'TEXT'
bash reproduce.sh                  the whole pipeline on toy CT made on the spot: minutes on a laptop, nothing downloaded
bash reproduce.sh --data DIR       the same rows on real CT
bash reproduce.sh --test           the tests
bash reproduce.sh --install        only installs
bash reproduce.sh --study DIR      the study of results/study/plan.md on real CT, seed by seed over all rows; a day or more on 2 cores

On first use it makes .venv and installs requirements.txt there (Python 3.11 or newer). With PYTHON=/path/to/python set
it uses that Python as it is, for example one with PyTorch's CPU build, which spares 5 GB of CUDA libraries.
Stopped and started again, it goes on where it was. After an edit of the code it makes again what the edit decides, or
refuses where that would destroy something: give another --out.

  --out DIR          results (default: results/toy, results/NAME of the data folder, or for a study results/NAME-study)
  --seeds K          pre-training runs a row (default: 1; toy: 2; study: as many as planned, at most K)
  --embedding E      encoder of the rows Embedding: a file or imagenet (default: the encoder of ALL, seed 0)
  --rows "A B"       of the rows below
  --reduce "..."     flags for every reduce.py (default for real data: none; toy: --size 64; study: --size 128)
  --pretrain "..."   flags for every pretrain.py (default for real data: --epochs 100 --warmup 0.1; study: below)
  --evaluate "..."   flags for every evaluate.py (default for real data: none, which is the paper's fine-tuning; study: below)
  --jobs N           study: runs at a time, each on its share of the cores (default: 1)
  --steps N          study: optimiser steps of a row without a length in its name (default: 750)

Rows (name | reduce.py | pretrain.py; # is any whole number; KEEP slices are as many as Hash-6 keeps):
TEXT
  echo "scratch           random weights$rows_table"
  echo "Rows by default: $default_rows"
  echo "On toy data: $toy_rows"
  echo "Study: --pretrain \"$study_pretrain\" --evaluate \"$study_evaluate\""
  awk -F' *[|] *' 'NF > 1 { row = row sep $1 " " $2; sep = ", " } END { print "Study, rows and their runs: " row }' <<< "$study_rows" |
    fold -s -w 118
  cat <<'TEXT'
Any row but scratch with -steps after its name is trained for as many optimiser steps as ALL, with -steps-x3 for three
times as many, instead of for as many epochs.

DIR must hold ct/ and at least one of the others; a link to a folder will do:
  ct/         any tree of DICOM series or PNG slices to pre-train on. The paper used, both free and without an account:
                LIDC-IDRI            1,010 chest CT, 243,958 slices, 128 GB, CC BY 3.0
                FDG-PET-CT-Lesions   whole-body PET/CT, 560,796 CT slices (the paper: 541,439 of them), CC BY 4.0,
                  296 GB (411 GB with its PET series)
              pip install idc-index, then (the flags are those of its --help; not tried from here)
                idc download-from-selection --collection-id lidc_idri --analysis-results exclude --download-dir DIR/ct
              and the same with fdg_pet_ct_lesions. PET series beside the CT are left out and counted.
  covid-ct/   COVID-CT: CT_COVID/, CT_NonCOVID/ and Data-split/ unpacked from github.com/UCSD-AI4H/COVID-CT
                (figures collected from papers; for research)
  organ/      organsmnist.npz of MedMNIST, medmnist.com (pip install medmnist downloads it too), CC BY 4.0
  head-ct/    Head CT - hemorrhage (200 images, labels.csv), Kaggle (felipekitamura/head-ct-hemorrhage), no licence
                stated; it stands in for the paper's brain CT, which is not public
Access and licences change: read them at the source before you use the data.
TEXT
}

rows_table='
ALL               | --strategy all                                      |
EveryN            | --strategy every-n --keep KEEP                      |
Random            | --strategy random --keep KEEP --seed SEED           |
Random-matched    | --strategy random --like HASH6 --seed SEED          |
Hash-#            | --strategy hash --threshold #                       |
HashAll           | --strategy hash --threshold 6 --scope dataset       |
SSIM              | --strategy ssim                                     |
MI                | --strategy mi                                       |
Embedding         | --strategy embedding --encoder ENCODER              |
SSIM-budget       | --strategy ssim --keep KEEP                         |
MI-budget         | --strategy mi --keep KEEP                           |
Embedding-budget  | --strategy embedding --encoder ENCODER --keep KEEP  |
Redundant         | --strategy redundant --like HASH6                   |
ALL-masked        | --strategy all                                      | --mask-negatives 6
Clusters-#        | --strategy hash --threshold #                       | --sample clusters
ALL-c#            | --strategy all                                      | --neighbours #
ALL-c#-masked     | --strategy all                                      | --neighbours # --mask-negatives 6
ALL-c#-masked-volume | --strategy all                                   | --neighbours # --mask-negatives 64
ALL-c#-random     | --strategy all                                      | --neighbours # --mask-negatives 6 --mask-random
ALL-double        | --strategy all                                      | --batch-size 256 --loss-groups 2
ALL-c#-double     | --strategy all                                      | --neighbours # --batch-size 256 --loss-groups 2'

# The study: row | pre-training runs. Its evaluations: task | evaluate.py.
study_rows='
scratch                    | 12
ALL                        | 12
Hash-6                     | 8
Random-matched             | 8
ALL-masked                 | 8
Clusters-6                 | 8
ALL-c32                    | 6
ALL-c32-masked             | 6
ALL-c32-masked-volume      | 6
ALL-c32-random             | 6
ALL-c8                     | 6
ALL-c8-masked              | 6
ALL-double                 | 6
ALL-c32-double             | 6
EveryN                     | 3
SSIM-budget                | 3
MI-budget                  | 3
Embedding-budget           | 3
Redundant                  | 3
ALL-steps-x0.5             | 4
Hash-6-steps-x0.5          | 4
Random-matched-steps-x0.5  | 4
ALL-steps-x3               | 4
Hash-6-steps-x3            | 4
Random-matched-steps-x3    | 4
Hash-6-steps-x0.146        | 4
Random-matched-steps-x0.146 | 4'
study_evaluations='
organ    | --label-share 0.01 0.1 1
covid-ct | --folds 5 --repeats 10
covid-ct |
head-ct  | --folds 5 --repeats 10'
study_steps=750
study_pretrain='--arch resnet18 --size 64 --optimizer adamw --warmup 0.1'
study_evaluate='--protocol linear --arch resnet18 --size 64'
decisive_code='reduce.py pretrain.py evaluate.py common/auc.py common/batches.py common/ct.py common/dicom.py common/encoder.py
  common/hashing.py common/reduction.py common/similarity.py common/simclr.py common/store.py common/tasks.py
  common/volumes.py'
default_rows='scratch ALL EveryN Random Random-matched Hash-3 Hash-6 Hash-12 HashAll SSIM MI Embedding SSIM-budget MI-budget
  Embedding-budget Redundant ALL-masked Clusters-6 ALL-c32 ALL-c32-masked Hash-6-steps Random-steps'
toy_rows='scratch ALL EveryN Random-matched Hash-6 SSIM MI Embedding Redundant ALL-masked Clusters-6 ALL-c32 ALL-c32-masked
  Hash-6-steps'

main() {
  parse "$@"
  cd "$(dirname "${BASH_SOURCE[0]}")"
  prepare_python
  case $mode in
    install) exit ;;
    test) exec "$python" -m pytest -q tests ;;
  esac
  prepare_data
  check_flags
  mkdir -p "$out/done"
  code=$("$python" -m common.files $decisive_code)

  reduce=("$python" reduce.py "$ct" "$out/slices" $reduce_flags)
  "${reduce[@]}" --strategy all # always called: it notices when the CT has changed
  select_row Hash-6 0
  hash6=$out/slices/hash-6.csv
  keep=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["kept"])' "${hash6%.csv}.json")
  if [ "$mode" = study ]; then study; exit; fi
  if [[ $rows == *-steps* || ($rows == *Embedding* && -z $encoder) ]]; then pretrain_row ALL 0; fi
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
  "$python" evaluate.py figure "$out/results.csv" "$out/figure.svg"
  cat "$out/tables.md"
  echo
  echo "Written to $out/tables.md and figure.svg; selections to look at: $out/slices/*.png"
}

# study: seed by seed over all rows, so that a study cut short is balanced. A run that runs.jsonl holds is not made again,
# even where its encoder is gone. One of other code, flags, CT or precision stops the study, also with --rows.
study() {
  local seed row runs started=()
  exec 9> "$out/.study-lock"
  flock -n 9 || stop "$out: another study is at work there"
  trap 'for job in $(jobs -p); do pkill -P "$job"; kill "$job"; done 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM
  "$python" -m common.runs "$out" "$machine" || stop "see the line above"
  while read -r row seed; do is_evaluated "$row" "$seed"; done < <(
    sed -nE 's/^\{"row": "([^"]+)", "seed": ([0-9]+),.*/\1 \2/p' "$out/runs.jsonl"
  )
  OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / jobs))
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
  for ((seed = 0; seed < seeds; seed++)); do
    while IFS=' |' read -r row runs; do
      if [[ " $rows " != *" $row "* ]] || ((seed >= runs)) || is_evaluated "$row" "$seed"; then continue; fi
      while (($(jobs -rp | wc -l) >= jobs)); do wait_for_one; done
      if [[ $row == Embedding* && -z $encoder ]]; then
        wait_for_all # ALL may be in training
        pretrain_row ALL 0
      fi
      if [ "$row" != scratch ]; then select_row "${row%%-steps*}" "$seed"; fi
      study_run "$row" "$seed" < /dev/null > "$out/done/log-$row-$seed.txt" 2>&1 &
      started+=("$row $seed")
    done <<< "${study_rows#?}"
  done
  wait_for_all
  for run in "${started[@]}"; do is_evaluated $run || stop "$run was killed: start the study again"; done
  {
    printf 'All numbers, with a p for each row. The planned analysis, with three p: evaluate.py study results.csv.\n\n'
    "$python" evaluate.py tables "$out/results.csv"
  } > "$out/tables.md.tmp"
  mv "$out/tables.md.tmp" "$out/tables.md"
  "$python" evaluate.py study "$out/results.csv" --figure "$out/figure.svg" > "$out/README.md.tmp"
  mv "$out/README.md.tmp" "$out/README.md"
  cat "$out/README.md"
}

wait_for_all() { while [ -n "$(jobs -p)" ]; do wait_for_one; done; }
wait_for_one() { wait -n || stop "a run of the study failed: see the newest of $out/done/log-*.txt"; }

# study_run ROW SEED: pre-trains and evaluates, then adds the run to runs.jsonl.
study_run() {
  local weights=scratch task flags
  if [ "$1" != scratch ]; then
    pretrain_row "$1" "$2"
    weights=$out/runs/$1-seed-$2/encoder.pt
  fi
  while IFS=' |' read -r task flags; do
    "$python" evaluate.py "$task" "$data/$task" --encoder "$weights" --seeds $(($2 + 1)) --name "$1" \
      --results "$out/results.csv" $evaluate_flags $flags
  done <<< "${study_evaluations#?}"
  # for results-draws.jsonl: the study may go on where the test scores are not
  "$python" evaluate.py tables "$out/results.csv" > /dev/null
  [ "$("$python" -m common.files $decisive_code)" = "$code" ] || stop "the code was edited while $1 seed $2 was made"
  "$python" -m common.runs "$out" "$1" "$2" "$(study_digest "$1")"
}

# is_evaluated ROW SEED: whether runs.jsonl says so; stops at one that other code or other flags have made.
is_evaluated() {
  local found
  found=$(grep -F "{\"row\": \"$1\", \"seed\": $2," "$out/runs.jsonl") || return 1
  [[ $found == *"\"made_by\": \"$(study_digest "$1")\""* ]] ||
    stop "$out/runs.jsonl: $1 seed $2 was made by other code or other flags: give another --out"
}

# study_digest ROW: of all that made the row's runs, but for the CT.
study_digest() {
  local embedding=''
  if [[ $1 = Embedding* ]]; then embedding=$encoder; fi
  if [ -f "$embedding" ]; then embedding=$(cksum < "$encoder"); fi
  cksum <<< "$code $reduce_flags $pretrain_flags --steps $study_steps $evaluate_flags $study_evaluations $embedding $(line_of "${1%%-steps*}")" |
    tr ' ' '-'
}

# select_row ROW SEED: writes the row's selection, unless it is there.
select_row() {
  local key
  key=$(selection_key "$1" "$2")
  [ -f "$(selection_of "$1" "$2")" ] || rm -f "$out/done/$key"
  once "$key" "${reduce[@]}" $(flags_of "$1" "$2" 2)
}

# pretrain_row ROW SEED: selects the row's slices and trains on them.
pretrain_row() {
  local name=${1%%-steps*} flags
  select_row "$name" "$2"
  flags=$(flags_of "$name" "$2" 3)
  case $1 in
    *-steps) flags="$flags --steps $(steps_of_all 1)" ;;
    *-steps-x*) flags="$flags --steps $(steps_of_all "${1##*-x}")" ;;
    *) if [ "$mode" = study ]; then flags="$flags --steps $study_steps"; fi ;;
  esac
  [ -f "$out/runs/$1-seed-$2/encoder.pt" ] || rm -f "$out/done/pretrain-$1-$2"
  once "pretrain-$1-$2" "$python" pretrain.py "$(selection_of "$name" "$2")" "$out/runs/$1-seed-$2" \
    --seed "$2" $pretrain_flags $flags
}

# flags_of ROW SEED COLUMN: what rows_table says, with its placeholders filled in.
flags_of() {
  local number line
  number=$(tr -dc '0-9' <<< "$1")
  line=$(line_of "$1")
  cut -d'|' -f"$3" <<< "$line" | sed -e "s/#/$number/g; s/KEEP/${keep:-}/; s/SEED/$2/" \
    -e "s|HASH6|${hash6:-}|; s|ENCODER|${encoder:-$out/runs/ALL-seed-0/encoder.pt}|"
}

# is_row ROW: whether it is scratch, or a row of rows_table with or without another length.
is_row() {
  local name=${1%%-steps*}
  local length=${1#"$name"}
  if [ "$1" = scratch ]; then return; fi
  [[ $length =~ ^(-steps(-x[0-9]+(\.[0-9]+)?)?)?$ && ! $length =~ -x[0.]+$ ]] && [ -n "$(line_of "$name")" ]
}

# line_of ROW: its line of rows_table, where # stands for a whole number; empty for no row.
line_of() {
  awk -F' *[|] *' -v row="$1" '{ name = $1; gsub(/#/, "[0-9]+", name) } NF && row ~ "^" name "$"' <<< "$rows_table"
}

# selection_key ROW SEED: what `once` calls its selection; some rows draw anew for every pre-training seed.
selection_key() {
  if [[ $(line_of "$1") == *SEED* ]]; then echo "select-$1-$2"; else echo "select-$1"; fi
}

# selection_of ROW SEED: the file that reduce.py named in its last line.
selection_of() { sed -n 's/.* -> //p' "$out/done/$(selection_key "$1" "$2").txt" 2>/dev/null || true; }

# steps_of_all FACTOR: that many times the optimiser steps of ALL.
steps_of_all() {
  local steps=$study_steps
  if [ "$mode" != study ]; then steps=$(sed -nE '1s/.*"steps": ([0-9]+).*/\1/p' "$out/runs/ALL-seed-0/log.jsonl"); fi
  awk -v steps="$steps" -v factor="$1" 'BEGIN { printf "%.0f", steps * factor }'
}

# lines_of_row TASK ROW: a checksum of the row's lines of results.csv.
lines_of_row() { { grep "^$1,$2," "$out/results.csv" 2>/dev/null || true; } | cksum; }

# evaluate_row ROW ENCODER...
evaluate_row() {
  local name=$1 task folder lines
  shift
  for task in $tasks; do
    if [ "$mode" = toy ]; then folder=$out/toy; else folder=$data/$task; fi
    lines=$out/done/evaluate-$name-$task.lines # where one is gone, it is evaluated again
    [ "$(lines_of_row "$task" "$name")" = "$(cat "$lines" 2>/dev/null)" ] || rm -f "${lines%.lines}"
    once "evaluate-$name-$task" "$python" evaluate.py "$task" "$folder" \
      --encoder "$@" --results "$out/results.csv" --name "$name" $evaluate_flags
    lines_of_row "$task" "$name" > "$lines"
  done
}

# once KEY COMMAND...: runs the command unless it has ended well before: word for word, by the same code, on the same
# store and with the same files in its arguments (Python and the script left out, which $code tells of).
once() {
  local key=$1 done_file=$out/done/$1 words argument
  shift
  words="$code $* $(cksum < "$out/slices/store.json")"
  for argument in "${@:3}"; do
    if [ -f "$argument" ] && [ "$argument" != "$out/results.csv" ]; then words="$words $(cksum < "$argument")"; fi
  done
  if [ "$(cat "$done_file" 2>/dev/null)" = "$words" ]; then return; fi
  printf '\n--- %s\n' "$key"
  "$@" | tee "$done_file.txt"
  printf '%s\n' "$words" > "$done_file"
}

parse() {
  mode=toy data='' out='' seeds='' jobs=1 for_study='' encoder='' reduce_flags='' pretrain_flags='' evaluate_flags='' rows=''
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage; exit ;;
      --test | --install) mode=${1#--}; shift; continue ;;
    esac
    case $1 in
      --data) mode=real data=${2-} ;;
      --study) mode=study data=${2-} ;;
      --out) out=${2-} ;;
      --seeds) seeds=${2-} ;;
      --jobs) jobs=${2-} for_study=$1 ;;
      --steps) study_steps=${2-} for_study=$1 ;;
      --rows) rows=${2-} ;;
      --embedding) encoder=${2-} ;;
      --reduce) reduce_flags=${2-} ;;
      --pretrain) pretrain_flags=${2-} ;;
      --evaluate) evaluate_flags=${2-} ;;
      *) stop "$1 is not an option" ;;
    esac
    [ $# -gt 1 ] || stop "$1 needs a value"
    shift 2
  done
  if [ -z "$rows" ]; then
    case $mode in
      toy) rows=$toy_rows ;;
      study) rows=$(sed 's/|.*//' <<< "$study_rows") ;;
      *) rows=$default_rows ;;
    esac
  fi
  rows=$(echo $rows) # one line
  for row in $rows; do
    is_row "$row" || stop "--rows: $row is not a row"
    if [ "$mode" = study ]; then
      grep -q "^$row  *|" <<< "$study_rows" || stop "--rows: $row is not a row of the study"
    fi
  done
  [[ $seeds =~ ^([1-9][0-9]*)?$ ]] || stop "--seeds $seeds: must be a whole number, at least 1"
  [[ $jobs =~ ^[1-9][0-9]*$ ]] || stop "--jobs $jobs: must be a whole number, at least 1"
  [[ $study_steps =~ ^[1-9][0-9]*$ ]] || stop "--steps $study_steps: must be a whole number, at least 1"
  [ "$mode" = study ] || [ -z "$for_study" ] || stop "$for_study is for --study"
  if [ -n "$data" ]; then
    [ -d "$data/ct" ] || stop "$data/ct: no such folder"
    data=$(cd "$data" && pwd)
  fi
  [[ -z $encoder || $encoder = imagenet || -f $encoder ]] || stop "--embedding $encoder: no such file, and not imagenet"
  if [ -f "$encoder" ]; then encoder=$(cd "$(dirname "$encoder")" && pwd)/$(basename "$encoder"); fi
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
    out=${out:-$PWD/results/toy} tasks='toy-lesion toy-organ' seeds=${seeds:-2}
    reduce_flags=${reduce_flags:---size 64}
    pretrain_flags=${pretrain_flags:---arch resnet18 --size 32 --batch-size 64 --epochs 2 --warmup 0.1 --optimizer adamw}
    evaluate_flags=${evaluate_flags:---protocol linear --arch resnet18 --size 64 --seeds 2}
    ct=$out/toy/ct
    [ -d "$out/toy" ] || "$python" -m common.toy "$out/toy"
    [ "$(cat "$out/toy/code.txt" 2>/dev/null)" = "$("$python" -m common.files common/toy.py)" ] ||
      stop "$out/toy: was made by another version of common/toy.py: give another --out, or delete $out"
    return
  fi
  ct=$data/ct tasks=''
  if [ "$mode" = study ]; then
    seeds=${seeds:-12}
    out=${out:-$PWD/results/$(basename "$data")-study} reduce_flags=${reduce_flags:---size 128}
    pretrain_flags=${pretrain_flags:-$study_pretrain}
    evaluate_flags=${evaluate_flags:-$study_evaluate}
  fi
  out=${out:-$PWD/results/$(basename "$data")} seeds=${seeds:-1}
  pretrain_flags=${pretrain_flags:---epochs 100 --warmup 0.1}
  for task in covid-ct organ head-ct; do
    if [ -d "$data/$task" ]; then tasks="$tasks $task"; else echo "$data/$task: no such folder, so this task is left out"; fi
  done
  [ "$mode" != study ] || [ "$tasks" = ' covid-ct organ head-ct' ] || stop "$data: the study needs covid-ct, organ and head-ct"
  [ -n "$tasks" ] || stop "$data: holds none of covid-ct, organ and head-ct"
}

# Every flag is read by the script it is for before hours of work begin. Sets machine: device and precision to train in.
check_flags() {
  local encoders='' evaluation evaluations='|'
  for ((seed = 0; seed < seeds; seed++)); do encoders="$encoders run-$seed/encoder.pt"; done
  if [ "$mode" = study ]; then evaluations=${study_evaluations#?}; fi
  machine=$({
    echo "reduce data out --strategy all $reduce_flags"
    echo "pretrain selection.csv run $pretrain_flags"
    while IFS= read -r evaluation; do
      echo "evaluate ${tasks##* } data --results results.csv $evaluate_flags ${evaluation#*|} --encoder$encoders"
    done <<< "$evaluations"
  } | "$python" -c "$read_flags") || stop '--reduce, --pretrain or --evaluate: see the line above'
}
read_flags='
import importlib, sys
for line in sys.stdin:
    script, *flags = line.split()
    sys.argv = [script + ".py", *flags]
    module = importlib.import_module(script)
    try:
        args = module.parse_args()
    except SystemExit as stopped:
        sys.exit(stopped.code or f"error: {line}")  # also at --help
    if script == "pretrain":
        device = module.join_processes(args.device)[2]
        try:
            print(device.type, module.simclr.choose_precision(args.precision, device, args.size))
        except ValueError as error:
            sys.exit(f"error: --precision: {error}")
'

stop() {
  echo "error: $1 (bash reproduce.sh --help)" >&2
  exit 1
}

{ main "$@"; exit; } # read whole, so that an edit does not reach a run at work
