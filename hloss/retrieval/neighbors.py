"""The k nearest images of a gallery: through faiss where it is installed (on a GPU where faiss has one), else torch.

Exact, and the same from both: they propose some more candidates than asked for by float32 products, which are put in
order by their float64 similarity, equals by their index. Only which of more than `SPARE` images that are as near as the
k-th are listed is left to the backend. Nothing of the size of all pairs is stored.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import exact_products
from hloss.retrieval.ranks import METRICS

BACKENDS = ("faiss", "torch")
SPARE = 16
QUERIES = 256  # rows of similarity held at once on the CPU
PAIRS = 2**27  # and pairs on a GPU
COMPONENTS = 2**24  # of candidates held at once


@torch.no_grad()
def neighbors(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str = "cosine",
    own: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery images of each query, nearest first.

    Args:
        queries, gallery: embeddings (q, d) and (n, d), floating.
        k: at most n, or n - 1 with `own`.
        metric: "cosine" or "euclidean" (of the raw embeddings).
        own: (q,) the index of each query in the gallery, never among its neighbors.
        backend: "faiss" or "torch"; None takes faiss where it is installed.

    Returns (q, k) float64 cosines, or Euclidean distances, and (q, k) int64 indices into the gallery, on the CPU.
    ValueError for an unknown metric or backend and a k out of range.
    """
    backend = backend or ("faiss" if find_spec("faiss") else "torch")
    _check_settings(k, len(gallery) - (own is not None), metric, backend)
    if metric == "cosine":
        queries, gallery = F.normalize(queries.double()), F.normalize(gallery.double())
    else:  # distances do not change, and float32 keeps their digits
        centre = gallery.mean(0, dtype=torch.float64)
        queries, gallery = queries.double() - centre, gallery.double() - centre
    n_candidates = min(k + SPARE, len(gallery))
    propose = _proposed_by_faiss if backend == "faiss" else _proposed_by_torch
    candidates = propose(queries.float(), gallery.float(), n_candidates, metric).sort(1).values
    similarity = _exact_similarity(queries, gallery, candidates, metric)
    if own is not None:
        similarity.masked_fill_(candidates == own.to(candidates.device)[:, None], -torch.inf)
    similarity, place = similarity.sort(dim=1, descending=True, stable=True)
    nearest = candidates.gather(1, place)[:, :k]
    return (similarity if metric == "cosine" else -similarity)[:, :k].cpu(), nearest.cpu()


def _check_settings(k: int, most: int, metric: str, backend: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, known are {', '.join(METRICS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, known are {', '.join(BACKENDS)}")
    if not 1 <= k <= most:
        raise ValueError(f"k must be between 1 and {most}, the images to choose from, got {k!r}")


def _proposed_by_torch(queries: Tensor, gallery: Tensor, k: int, metric: str) -> Tensor:
    half_squares = gallery.square().sum(1) / 2 if metric == "euclidean" else 0
    at_once = max(PAIRS // len(gallery), 1) if gallery.is_cuda else QUERIES
    with exact_products(gallery.device):
        nearest = [(block @ gallery.T - half_squares).topk(k).indices for block in queries.split(at_once)]
    return torch.cat(nearest)


def _proposed_by_faiss(queries: Tensor, gallery: Tensor, k: int, metric: str) -> Tensor:
    import faiss

    measure = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if torch.cuda.is_available() and getattr(faiss, "get_num_gpus", int)():
        import faiss.contrib.torch_utils  # faiss then takes tensors, on a GPU or not, and returns them on their device

        device = gallery.device.index if gallery.is_cuda else -1
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, gallery, k, metric=measure, device=device)[1]
    nearest = faiss.knn(queries.cpu().numpy(), gallery.cpu().numpy(), k, measure)[1]
    return torch.from_numpy(nearest).to(gallery.device)


def _exact_similarity(queries: Tensor, gallery: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """Float64 cosine, or minus the Euclidean distance, of each query with each of its candidates."""
    rows = max(COMPONENTS // (candidates.shape[1] * gallery.shape[1]), 1)
    similarity = []
    for block, chosen in zip(queries.split(rows), candidates.split(rows), strict=True):
        others = gallery[chosen]
        if metric == "cosine":
            similarity.append((block[:, None] * others).sum(2))
        else:
            similarity.append(-(block[:, None] - others).square().sum(2).sqrt())
    return torch.cat(similarity)
