#!/bin/bash
# A training on the 8 GPUs of a node, or of several, that goes on after its time limit and after a preemption:
#   sbatch slurm.sh method=toco dataset=voc dataset.root=DIR
#   sbatch --nodes=4 slurm.sh method=toco dataset=voc dataset.root=DIR
#SBATCH --job-name=wsss
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

# one process for each GPU; two minutes before the time is over SLURM sends them SIGTERM, they save and end with 143
srun --kill-on-bad-exit=1 wsss-train "$@" resume=auto \
  trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES" trainer.strategy=ddp
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID" # the same job once more, which finds its run directory
fi
exit "$code"
