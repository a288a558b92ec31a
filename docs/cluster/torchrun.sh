#!/bin/bash
# A training on the GPUs of one machine, or on each of NODES machines with the address of the first and their number:
#   GPUS=8 ./torchrun.sh method=toco dataset=voc dataset.root=DIR
#   GPUS=8 NODES=4 MAIN=node0 ./torchrun.sh method=toco dataset=voc dataset.root=DIR      on each of the four
# With RESTARTS=3 processes that fail, as on a lost machine, are started again; resume=auto goes on with what is saved.
gpus=${GPUS:-8}
nodes=${NODES:-1}
wsss_train=$(command -v wsss-train)
exec torchrun --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts="${RESTARTS:-0}" \
  --rdzv-backend=c10d --rdzv-endpoint="${MAIN:-localhost}:${PORT:-29400}" --rdzv-id="${RUN:-wsss}" \
  "$wsss_train" "$@" resume=auto trainer.devices="$gpus" trainer.num_nodes="$nodes" trainer.strategy=ddp
