"""`make check-gpu`: the first thing to run on a machine with GPUs. Under five minutes; prints what passed.

The tests marked `cuda`, a short run on one GPU and on all, the benchmarks of the losses on the GPU. Exit status 0: all
passed, 1: not all, 3: torch finds no CUDA device and nothing was checked.
"""

import sys

from hloss.study.gpu_check import check_gpus

if __name__ == "__main__":
    sys.exit(check_gpus())
