"""Losses on embeddings. Import them from `hloss`.

- `reference`: the histogram loss as the paper states it, equations 1-6. Read it first.
- `histogram`: `HistogramLoss`, the fast implementation, and functions that describe the pairs of a batch.
- `densities`: the densities of the similarities (equations 1, 2), the loss (equations 4, 6), its slopes (equation 5).
- `pairs`, `streaming`: the implementation in PyTorch operations, which processes the pairs in blocks.
- `fused`, `passes`, `triton_kernels`: the implementation on CUDA: autograd functions, launches, and Triton kernels.
- `baselines`, `pairwise`: the baseline losses, and the similarities and distances from which they are computed.
- `distributed`: a loss over the batches of all processes.
"""
