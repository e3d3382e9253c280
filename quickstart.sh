#!/usr/bin/env bash
# The whole pipeline on the embedded data set, on a fresh machine, CPU or GPU. Nothing is downloaded but packages.
# A VAE is trained from scratch, then fine-tuned twice, for equally many steps: with alignment (Send-VAE) and
# without. For both: latents, a SiT, samples, Frechet distance, probe. In the end: a report.
#   ./quickstart.sh                          # writes out/quickstart/; the same command continues after a stop
#   SEED=1 ./quickstart.sh out/quickstart1   # another seed, into another folder
#   ./quickstart.sh long                     # writes out/long/: larger networks, more steps, better pictures
#   PYTHON=python ./quickstart.sh            # an interpreter that has the packages; no .venv is made
set -euo pipefail
cd "$(dirname "$0")"
refuse() { echo "error: $1; usage: [SEED=0] [DEVICE=auto|cuda|mps|cpu] [SAMPLES=1000]" \
  "[PRETRAIN_STEPS=n] [VAE_STEPS=n] [SIT_STEPS=n] ./quickstart.sh [long] [DIR]" >&2; exit 2; }
recipe=short
if [ "${1:-}" = long ]; then recipe=long; shift; fi
case "${1:-}" in -*) refuse "$1 is no folder";; esac
[ $# -le 1 ] || refuse "$# arguments, want one folder"
SEED="${SEED:-0}" DEVICE="${DEVICE:-auto}" SAMPLES="${SAMPLES:-1000}"
batch=32 compile=off  # networks so small are done before they are compiled
if [ $recipe = short ]; then  # a quarter of an hour on two CPU cores
  OUT="${1:-out/quickstart}"
  PRETRAIN_STEPS="${PRETRAIN_STEPS:-600}" VAE_STEPS="${VAE_STEPS:-1500}" SIT_STEPS="${SIT_STEPS:-3000}"
  vae="--vae tiny --lr 5e-3" sit="--model tiny/1 --lr 1e-2"
elif [ "$DEVICE" = cuda ] || { [ "$DEVICE" = auto ] && nvidia-smi -L > /dev/null 2>&1; }; then
  OUT="${1:-out/long}" DEVICE=cuda batch=256 compile=auto  # a GPU has room for more
  PRETRAIN_STEPS="${PRETRAIN_STEPS:-1000}" VAE_STEPS="${VAE_STEPS:-3000}" SIT_STEPS="${SIT_STEPS:-8000}"
  vae="--vae small --lr 4e-3" sit="--model S/2 --lr 1e-3"
else  # about two hours on two CPU cores; latents of 8 x 8
  OUT="${1:-out/long}"
  PRETRAIN_STEPS="${PRETRAIN_STEPS:-1500}" VAE_STEPS="${VAE_STEPS:-6000}" SIT_STEPS="${SIT_STEPS:-16000}"
  vae="--vae small --lr 4e-3" sit="--model small/2 --lr 5e-3"
fi
for name in SEED PRETRAIN_STEPS VAE_STEPS SIT_STEPS SAMPLES; do  # before anything is written or installed
  case "$name ${!name}" in
    *" "|*" "*[!0-9]*|*" "??????????*) refuse "$name=${!name}, want a whole number below 1,000,000,000";;
    "SEED "*) ;;
    *" 0"*) refuse "$name=${!name}, want 1 or more";;
  esac
done
case "$DEVICE" in auto|cuda|mps|cpu) ;; *) refuse "DEVICE=$DEVICE is no device";; esac
# One thread each: networks this small are slower with two. An idle one sleeps, and leaves its core to others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# glibc gives memory back after each step, and takes it anew in the next: a twentieth of the time.
export MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=1073741824

check_version() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 ||
    { echo "error: Python 3.11 or newer is needed, and $1 is not" >&2; exit 2; }
}
if [ -n "${PYTHON:-}" ]; then  # an interpreter that has the packages already
  check_version "$PYTHON"
else
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    check_version python3
    echo "making .venv and installing requirements.txt into it: a minute or more"
    python3 -m venv .venv
  fi
  check_version "$PYTHON"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ] || refuse "$OUT is no folder that can be written"
settings="SEED=$SEED PRETRAIN_STEPS=$PRETRAIN_STEPS VAE_STEPS=$VAE_STEPS SIT_STEPS=$SIT_STEPS SAMPLES=$SAMPLES"
if [ -f "$OUT/settings.txt" ] && [ "$(cat "$OUT/settings.txt")" != "$settings" ]; then
  echo "error: $OUT was made with $(cat "$OUT/settings.txt"), this run has $settings; give another folder" >&2
  exit 2
fi
echo "$settings" > "$OUT/settings.txt"
begin=$SECONDS

# stage NAME COMMAND...: run the command and say on fd 3 how long it took. A finished stage is not run again.
stage() {
  local name="$1" start=$SECONDS; shift
  if grep -qsxF "$name $*" "$OUT/done.txt"; then echo "== $name: done before" >&3; return; fi
  echo "== $name: $PYTHON $*"
  "$PYTHON" "$@"
  echo "$name $*" >> "$OUT/done.txt"
  echo "$name $((SECONDS - start))" >> "$OUT/seconds.txt"
  echo "== $name: $((SECONDS - start)) s" >&3
}

run="--seed $SEED --device $DEVICE --compile $compile"
vae="$vae --data shapes --rec l2 --lpips 0 --gan 0 --batch-size $batch --beta2 0.99 --warmup 50 --eval-every 500
  --save-every 500"
sit="$sit --batch-size $batch --steps $SIT_STEPS --beta2 0.99 --warmup 100 --cooldown $((SIT_STEPS * 7 / 10))
  --ema 0.99 --t-sampling lognormal --sample-every 0 --save-every 1000 --workers 0"

# arm plain|send: everything that is done with one of the two VAEs.
arm() {
  trap 'exit 143' TERM  # a stage that was stopped is not done, whatever its exit code is
  local cfg name="$1" dir="$OUT/$1" align="--align 0"
  # Noise before the mapper costs more than it gives at this scale (docs/results.md). train_vae.py's default: on.
  if [ "$name" = send ]; then align="--align 0.2 --teacher shapes --projector-dim 256 --mapper-noise off"; fi
  stage "$name-vae"     train_vae.py $vae --init "$OUT/pretrained" $align --steps "$VAE_STEPS" \
    --cooldown $((VAE_STEPS * 8 / 10)) $run --out "$dir/vae"
  stage "$name-rfid"    fid.py rfid shapes --vae "$dir/vae" --features shapes --device "$DEVICE" --out "$dir/rfid.json"
  stage "$name-latents" encode.py --data shapes --vae "$dir/vae" $run --out "$dir/latents"
  stage "$name-sit"     train_sit.py --latents "$dir/latents" $sit $run --out "$dir/sit"
  for cfg in 1 2; do
    stage "$name-sample$cfg" sample.py --ckpt "$dir/sit" --cfg "$cfg" --sampler heun --steps 8 --num "$SAMPLES" \
      --batch-size 100 --npz $run --out "$dir/samples/cfg$cfg"
  done
  stage "$name-fid"     fid.py gfid shapes "$dir/samples/cfg1/samples.npz" "$dir/samples/cfg2/samples.npz" \
    --features shapes --device "$DEVICE" --out "$dir/gfid.json"
}

exec 3>&1
trap 'exit 130' INT  # a stage that was stopped is not done, whatever its exit code is
trap 'exit 143' TERM
stage pretrain train_vae.py $vae --init none --align 0 --steps "$PRETRAIN_STEPS" $run --out "$OUT/pretrained"
# The two arms run side by side.
echo "== plain and Send-VAE side by side; this shows Send-VAE, the plain one writes to $OUT/plain.log"
set -m  # each arm gets a process group, so that a stop of this script reaches all of its processes
arm plain > "$OUT/plain.log" 2>&1 & plain=$!
arm send & send=$!
set +m
trap 'kill -- "-$plain" "-$send" 2>/dev/null || true; wait; echo "stopped; the same command continues" >&2' EXIT
wait "$send"  # both are in the background because a signal interrupts wait, but never a foreground command
wait "$plain" || { echo "error: the plain VAE failed; the end of $OUT/plain.log:" >&2
                   tail -n 5 "$OUT/plain.log" >&2; exit 1; }
trap - EXIT
stage probe  probe.py --data shapes --vae "$OUT/plain/vae" "$OUT/send/vae" --device "$DEVICE" \
  --out "$OUT/probe.json"
"$PYTHON" -m shapes.report "$OUT"
echo "quickstart: $((SECONDS - begin)) s in this run; report: $OUT/report.md"
