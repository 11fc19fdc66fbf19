"""Exact nearest neighbours, by faiss if it is installed (on a GPU if faiss supports it), else by torch.

Both backends propose a few more candidates than needed, from float32 products. These are sorted by float64 similarity
and, for ties, by index. The backends differ only if more than `SPARE` images are tied with the k-th.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from hloss.numerics import exact_products, one_of, whole_number
from hloss.retrieval.similarity import centre, checked_embeddings

BACKENDS = ("faiss", "torch")
SPARE = 16
QUERIES = 256  # Queries of a block on a CPU.
PAIRS = 2**27  # Pairs of a block on a GPU.
COMPONENTS = 2**24  # Numbers of a block of candidates.


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
        metric: "cosine", or "euclidean" for the embeddings as they are.
        own: index of each query in the gallery (q,), which is not among its neighbours.
        backend: "faiss" or "torch"; None chooses faiss if it is installed.

    Returns:
        Float64 cosines or Euclidean distances (q, k), and int64 indices into the gallery (q, k), on the CPU.

    Raises:
        ValueError: metric or backend is unknown, k is out of range, or embeddings are wrong; rows are named.
    """
    backend = backend or ("faiss" if find_spec("faiss") else "torch")
    one_of("backend", backend, BACKENDS)
    queries, gallery, scale = _checked(queries, gallery, metric)
    most = len(gallery) - (own is not None)
    if whole_number("k", k, 1) > most:
        raise ValueError(f"k must be between 1 and {most}, the number of images: got {k!r}")
    if metric == "cosine":
        queries, gallery = F.normalize(queries.double()), F.normalize(gallery.double())
    else:
        origin = centre(gallery)
        queries, gallery = queries.double() - origin, gallery.double() - origin
    n_candidates = min(k + SPARE, len(gallery))
    propose = _proposed_by_faiss if backend == "faiss" else _proposed_by_torch
    candidates = propose(queries.float(), gallery.float(), n_candidates, metric).sort(1).values
    similarity = _exact_similarity(queries, gallery, candidates, metric)
    if own is not None:
        similarity.masked_fill_(candidates == own.to(candidates.device)[:, None], -torch.inf)
    similarity, place = similarity.sort(dim=1, descending=True, stable=True)
    nearest = candidates.gather(1, place)[:, :k]
    return (similarity if metric == "cosine" else -similarity / scale)[:, :k].cpu(), nearest.cpu()


def _checked(queries: Tensor, gallery: Tensor, metric: str) -> tuple[Tensor, Tensor, float]:
    """Return checked embeddings, and by what they were multiplied so that their squares are finite."""
    (queries, a), (gallery, b) = (
        checked_embeddings(*side, metric) for side in (("queries", queries), ("gallery", gallery))
    )
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries must be (q, {gallery.shape[1]}) as the gallery: got {tuple(queries.shape)}")
    if a == b:
        return queries, gallery, a
    scale = min(a, b)
    return queries.double() * (scale / a), gallery.double() * (scale / b), scale


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
    similarity = []
    for block, chosen in zip(queries.split(rows), candidates.split(rows), strict=True):
        others = gallery[chosen]
        if metric == "cosine":
            similarity.append((block[:, None] * others).sum(2))
        else:
            similarity.append(-(block[:, None] - others).square().sum(2).sqrt())
    return torch.cat(similarity)
