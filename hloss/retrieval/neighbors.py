"""Exact nearest neighbours, by faiss if it is installed (on a GPU if faiss supports it), else by torch.

Both backends propose a few more candidates than needed, from float32 products. The candidates are sorted by float64
similarity and, for ties, by index. Results of the backends can differ only if `SPARE` or more other images are as
similar to the query as its k-th neighbour, up to float32 rounding.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import exact_products, one_of, whole_number
from hloss.retrieval.similarity import centre, checked_embeddings

SPARE = 16
QUERIES = 256  # Number of queries in a block on a CPU.
PAIRS = 2**27  # Number of pairs in a block on a GPU.
COMPONENTS = 2**24  # Number of components of the candidates in a block.


@torch.no_grad()
def neighbors(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: str = "cosine",
    own: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest gallery images of each query, nearest first.

    Args:
        queries: floating-point embeddings (q, d).
        gallery: floating-point embeddings (n, d).
        k: number of neighbours, from 1 to n, or to n - 1 with `own`.
        metric: "cosine", or "euclidean" without normalisation.
        own: index of each query in the gallery (q,), to exclude a query from its own neighbours.
        backend: "faiss" or "torch"; None chooses faiss if it is installed.

    Returns:
        Float64 cosines or Euclidean distances (q, k), and int64 indices into the gallery (q, k), on the CPU.

    Raises:
        ValueError: metric or backend is unknown, k is out of range, or embeddings are invalid (the message lists the
            rows).
    """
    backend = backend or ("faiss" if find_spec("faiss") else "torch")
    one_of("backend", backend, ("faiss", "torch"))
    queries, gallery, scale = _vectors(queries, gallery, metric)
    most = len(gallery) - (own is not None)
    if whole_number("k", k, 1) > most:
        others = "other " if own is not None else ""
        raise ValueError(f"k must be between 1 and {most}, the number of {others}images in the gallery: got {k!r}")
    propose = _proposed_by_faiss if backend == "faiss" else _proposed_by_torch
    candidates = propose(queries.float(), gallery.float(), min(k + SPARE, len(gallery)), metric).sort(1).values
    similarity = _exact_similarity(queries, gallery, candidates, metric)
    if own is not None:
        similarity.masked_fill_(candidates == own.to(candidates.device)[:, None], -torch.inf)
    similarity, place = similarity.sort(dim=1, descending=True, stable=True)
    nearest = candidates.gather(1, place)[:, :k]
    return (similarity if metric == "cosine" else -similarity / scale)[:, :k].cpu(), nearest.cpu()


def _vectors(queries: Tensor, gallery: Tensor, metric: str) -> tuple[Tensor, Tensor, float]:
    """Return float64 queries and gallery, and the factor by which they are multiplied.

    For the cosine, they have norm 1, and the factor is 1. Otherwise they are multiplied by a power of two, and then
    the centre of the gallery is subtracted.
    """
    queries, a = checked_embeddings("queries", queries, metric)
    gallery, b = checked_embeddings("gallery", gallery, metric)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries must have shape (q, {gallery.shape[1]}), like gallery: got {tuple(queries.shape)}")
    if metric == "cosine":
        return F.normalize(queries.double()), F.normalize(gallery.double()), 1.0
    scale = min(a, b)  # One factor for both, so that all squares are finite.
    queries, gallery = queries.double() * (scale / a), gallery.double() * (scale / b)
    origin = centre(gallery)
    return queries - origin, gallery - origin, scale


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
        import faiss.contrib.torch_utils  # It makes faiss accept and return tensors.

        device = gallery.device.index if gallery.is_cuda else -1
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, gallery, k, metric=measure, device=device)[1]
    nearest = faiss.knn(queries.cpu().numpy(), gallery.cpu().numpy(), k, measure)[1]
    return torch.from_numpy(nearest).to(gallery.device)


def _exact_similarity(queries: Tensor, gallery: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """Return the float64 cosine, or minus the Euclidean distance, of each query with each of its candidates."""
    rows = max(COMPONENTS // (candidates.shape[1] * gallery.shape[1]), 1)
    similarity, is_cosine = [], metric == "cosine"
    for block, chosen in zip(queries.split(rows), candidates.split(rows), strict=True):
        query, others = block[:, None], gallery[chosen]
        similarity.append((query * others).sum(2) if is_cosine else -(query - others).square().sum(2).sqrt())
    return torch.cat(similarity)
