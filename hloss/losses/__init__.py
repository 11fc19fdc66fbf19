"""Losses on embeddings. Import them from `hloss`.

- `reference`: the histogram loss as the paper states it, equations 1-6. Read it first.
- `histogram`: `HistogramLoss`, the fast version, and the functions that describe a batch.
- `densities`: how the fast version bins pairs (equations 1, 2) and computes the loss (4, 6) and its slopes (5).
- `pairs`, `streaming`: the pairs of a batch, block by block, on a CPU.
- `fused`, `passes`, `triton_kernels`: the fast version on CUDA.
- `baselines`, `pairwise`: the other losses, and the similarities and distances that they use.
- `distributed`: a loss over the batches of all processes.
"""
