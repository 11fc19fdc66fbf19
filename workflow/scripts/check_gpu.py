"""`make check-gpu`: check a machine with GPUs in under five minutes, before the first study.

Runs the tests marked `cuda`, a short training run on one GPU and on all GPUs, and the benchmarks of the losses. Exit
status: 0 if all checks passed, 1 if not, 3 if torch finds no CUDA device.
"""

import sys

from hloss.study.gpu_check import check_gpus

if __name__ == "__main__":
    sys.exit(check_gpus())
