#!/usr/bin/env bash
# A network on UCI digits: dense, then uniform and searched bits at the BitOPs of W4A4 and W3A3; its rows in
# measurements/networks_on_digits.csv.
#
# measurements/networks_on_digits.sh ARCH INPUT_SIZE DENSE_EPOCHS [dotted.key=value ...]     (keys of joint training)
# PYTHON names the interpreter. What is there already is not computed again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
arch=$1 size=$2 epochs=$3
shift 3
kind=$(echo "$*" | tr -c 'a-z0-9\n' '_')
name=${arch}_digits${kind:+_$kind}
common=(wandb.mode=disabled arch="$arch" dataloader.input_size="$size" dataloader.batch_size=64 threads=1 quan.excepts=auto
        quan.act.all_positive=auto opt=adamw weight_decay=0.01)
dense=../quantization_training/results/${arch}_digits_dense/${arch}_digits_dense_checkpoint.pth.tar
joint=results/${name}/${name}_checkpoint.pth.tar

(cd quantization_training && $python main.py ../measurements/digits.yaml "${common[@]}" name="${arch}_digits_dense" \
    fp_model=true epochs="$epochs" lr=0.002 warmup_epochs=2)
(cd indicators_pretraining && $python main.py ../measurements/digits.yaml "${common[@]}" name="$name" \
    pre_trained="$dense" target_bits='[6,5,4,3,2]' epochs=6 lr=0.0005 "$@")
(cd indicators_pretraining && $python importance_extractor.py "$joint" --output "results/$name/indicators.pkl")
for bits in 4 3; do
    policy=../quantization_search/results/${name}_w${bits}a${bits}.yaml
    (cd quantization_search && $python search.py --model "$arch" --i "../indicators_pretraining/results/$name/indicators.pkl" \
        --b 6 5 4 3 2 --wb $bits --ab $bits --cr 0 --bops True --output "results/${name}_w${bits}a${bits}.yaml")
    (cd quantization_training && $python main.py ../measurements/digits.yaml "${common[@]}" name="${name}_uniform$bits" \
        init_from="../indicators_pretraining/$joint" weight_bits=$bits act_bits=$bits epochs=10 lr=0.0005 "$@")
    (cd quantization_training && $python main.py ../measurements/digits.yaml "${common[@]}" name="${name}_searched$bits" \
        init_from="../indicators_pretraining/$joint" policy="$policy" epochs=10 lr=0.0005 "$@")
done
$python - "$name" "${arch}_digits_dense" "${name}_uniform4" "${name}_searched4" "${name}_uniform3" "${name}_searched3" <<'PYTHON'
import csv, sys, yaml
table, name = "measurements/networks_on_digits.csv", sys.argv[1]
with open(table, newline="", encoding="utf-8") as file:
    columns, *rows = csv.reader(file)
rows = [row for row in rows if row[0] != name]
for run in sys.argv[2:]:
    facts = yaml.safe_load(open(f"quantization_training/results/{run}/summary.yaml"))
    rows.append([name, run, *(f"{facts[key]:.4f}" for key in ("top1", "size_mb", "ratio", "gbitops"))])
with open(table, "w", newline="", encoding="utf-8") as file:
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
PYTHON
