"""Ranks, recall, precision and the protocols against a brute force that sorts everything and names each exclusion."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hloss.numerics import NotFiniteError
from hloss.retrieval import protocols, ranks
from hloss.retrieval.neighbors import neighbors
from hloss.retrieval.protocols import PROTOCOLS, evaluate
from hloss.retrieval.ranks import METRICS, first_match_ranks, recall_at_k


def gallery_with_ties(n, seed, classes=6):
    """Embeddings of norm 3 or 5 on an integer grid (cosines tie), in float64, some classes with a single image."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[3, 0, 0], [0, 3, 0], [0, 0, 3], [3, 4, 0], [0, 3, 4], [4, 0, 3]], dtype=torch.float64)
    embeddings = corners[torch.randint(len(corners), (n,), generator=generator)]
    embeddings = embeddings * (2 * torch.randint(2, (n, 1), generator=generator) - 1)
    return embeddings, torch.randint(classes, (n,), generator=generator)


def scores(query, embeddings, metric):
    if metric == "cosine":
        return [float(query @ other / query.norm() / other.norm()) for other in embeddings]
    return [-float((query - other).norm()) for other in embeddings]


def match_ranks(similarity, match, ignored):
    """Ranks of the matches in a sorting by falling similarity, rivals first among (nearly) equals."""
    ranked = [j for j in range(len(similarity)) if not ignored[j]]
    ranked.sort(key=lambda j: (-round(float(similarity[j]), 9), bool(match[j])))
    return [rank for rank, j in enumerate(ranked, 1) if match[j]]


def first_match_oracle(embeddings, labels, metric="cosine"):
    ranks = []
    for i, query in enumerate(embeddings):
        itself = torch.arange(len(labels)) == i
        hits = match_ranks(scores(query, embeddings, metric), (labels == labels[i]) & ~itself, itself)
        ranks.append(hits[0] if hits else 0)
    return ranks


def precision_oracle(ranks):
    """The four precisions of one query from the ranks of its matches, each as its definition is printed."""
    n = len(ranks)
    trapezoid, old_recall, old_precision = 0.0, 0.0, 1.0
    for rank in range(1, max(ranks) + 1):  # the Oxford buildings' walk down the ranking
        hits = sum(r <= rank for r in ranks)
        recall, precision = hits / n, hits / rank
        trapezoid += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return {
        "map": sum(sum(r <= rank for r in ranks) / rank for rank in ranks) / n,
        "map_trapezoid": trapezoid,
        "r_precision": sum(r <= n for r in ranks) / n,
        "map@r": sum(sum(r <= i for r in ranks) / i for i in range(1, n + 1) if i in ranks) / n,
    }


def assert_measures(result, all_ranks, k, prefix=""):
    """`all_ranks`: of each query the ranks of its matches, by brute force."""
    matched = [ranks for ranks in all_ranks if ranks]
    for at in k:
        expected = sum(ranks[0] <= at for ranks in matched) / len(matched)
        assert result.metrics[f"{prefix}recall@{at}"] == pytest.approx(expected)
    for name in ("map", "map_trapezoid", "r_precision", "map@r"):
        expected = sum(precision_oracle(ranks)[name] for ranks in matched) / len(matched)
        assert result.metrics[prefix + name] == pytest.approx(expected, rel=1e-12)
    if not prefix:
        assert result.ranks.tolist() == [ranks[0] if ranks else 0 for ranks in all_ranks]
        assert (result.n_queries, result.n_unmatched) == (len(all_ranks), len(all_ranks) - len(matched))


# ------------------------------------------------------------------------------------------------- the first match


@settings(max_examples=40)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000), classes=st.integers(1, 25))
def test_first_match_ranks_with_ties_and_singletons(n, seed, classes):
    embeddings, labels = gallery_with_ties(n, seed, classes)
    for metric in METRICS:
        assert first_match_ranks(embeddings, labels, metric).tolist() == first_match_oracle(embeddings, labels, metric)


def test_recall_counts_the_queries_that_have_a_match():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert first_match_ranks(embeddings, labels).tolist() == [2, 3, 2, 2, 0]
    assert recall_at_k(embeddings, labels, k=(1, 2, 3)) == {1: 0.0, 2: 0.75, 3: 1.0}


def test_equal_embeddings_count_against_the_query():
    embeddings = torch.ones(9, 4)
    assert first_match_ranks(embeddings, torch.arange(9) // 3).tolist() == [7] * 9


def ranks_of(similarity, labels):
    """First-match ranks from the matrix of all similarities."""
    same = labels[:, None] == labels
    match = same & ~torch.eye(len(labels), dtype=torch.bool)
    best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
    return torch.where(match.any(1), ((similarity >= best) & ~same).sum(1) + 1, 0)


def exact_ranks(embeddings, labels, metric, copies=None):
    """First-match ranks from float64 similarities of the distinct embeddings, `copies` telling which each image is."""
    x = embeddings.double()
    x = F.normalize(x) if metric == "cosine" else x
    similarity = x @ x.T if metric == "cosine" else -(x[:, None] - x).square().sum(2)
    similarity = (similarity + similarity.T) / 2
    return ranks_of(similarity if copies is None else similarity[copies][:, copies], labels)


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize(("metric", "scaled"), [("cosine", False), ("cosine", True), ("euclidean", False)])
def test_copies_under_other_labels_tie_wherever_their_blocks_are(monkeypatch, block, metric, scaled):
    """Copies of a query's best match stand before it, although other products computed their similarities."""
    monkeypatch.setattr(ranks, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    n, distinct = (400, 130) if block == 16 else (2500, 800)
    images = torch.randn(distinct, 67, generator=generator)
    copies, labels = torch.randint(distinct, (2, n), generator=generator)
    labels %= n // 4
    embeddings = images[copies] * (2.0 ** (torch.arange(n) % 7)[:, None] if scaled else 1)
    expected = exact_ranks(images, labels, metric, copies)
    assert torch.equal(first_match_ranks(embeddings, labels, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_rounding_decides_nothing_among_nearly_equal_embeddings(monkeypatch, metric):
    """Of a collapsed network: many similarities differ by less than float32 products can tell."""
    monkeypatch.setattr(ranks, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    embeddings = 1 + 1e-3 * torch.randn(300, 24, generator=generator)
    labels = torch.randint(60, (300,), generator=generator)
    expected = exact_ranks(embeddings, labels, metric)
    assert torch.equal(first_match_ranks(embeddings, labels, metric), expected)
    plain = F.normalize(embeddings)
    assert metric == "euclidean" or (ranks_of(plain @ plain.T, labels) != expected).sum() > 10


@pytest.mark.parametrize("sizes", [[500, 300, 200, 1], [5] * 200, [1] * 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_and_small_classes_in_any_order_and_precision(monkeypatch, sizes, dtype):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    labels = 5 - 3 * labels[torch.randperm(len(labels), generator=generator)]
    embeddings = torch.randn(len(labels), 9, generator=generator).to(dtype)
    for metric in METRICS:
        expected = exact_ranks(embeddings, labels, metric)
        for block in (128, 1024):
            monkeypatch.setattr(ranks, "BLOCK", block)
            assert torch.equal(first_match_ranks(embeddings, labels, metric), expected)


def test_recall_equals_faiss():
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(800, (3000,), generator=generator)
    embeddings = torch.randn(800, 64, generator=generator)[labels] + torch.randn(3000, 64, generator=generator)
    embeddings = F.normalize(embeddings)
    index = faiss.IndexFlatIP(64)
    index.add(embeddings.numpy())
    nearest = torch.from_numpy(index.search(embeddings.numpy(), 101)[1])
    itself = nearest == torch.arange(3000)[:, None]
    assert itself.any(1).all()
    others = nearest[~itself].view(3000, 100)
    hit = (labels[others] == labels[:, None]).cumsum(1) > 0
    matched = first_match_ranks(embeddings, labels) > 0
    recall = recall_at_k(embeddings, labels, (1, 10, 100))
    assert 0.2 < recall[1] < recall[100] < 1
    for at, value in recall.items():
        assert value == pytest.approx(hit[matched, at - 1].double().mean().item(), abs=1 / 3000)


# ---------------------------------------------------------------------------------------------------- the protocols


@pytest.mark.parametrize("metric", METRICS)
def test_all_vs_rest_measures_every_match(metric):
    embeddings, labels = gallery_with_ties(90, seed=1, classes=40)
    result = evaluate("all-vs-rest", embeddings, labels, k=(1, 4), metric=metric)
    all_ranks = []
    for i, query in enumerate(embeddings):
        itself = torch.arange(90) == i
        all_ranks.append(match_ranks(scores(query, embeddings, metric), (labels == labels[i]) & ~itself, itself))
    assert_measures(result, all_ranks, (1, 4))
    assert result.n_unmatched > 0
    assert result.query_index.tolist() == list(range(90))
    assert torch.equal(result.ranks, first_match_ranks(embeddings, labels, metric))


def test_average_precision_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(120, 6, generator=generator), torch.arange(120) % 17
    similarity = F.normalize(embeddings.double()) @ F.normalize(embeddings.double()).T
    expected = []
    for i in range(120):
        others = torch.arange(120) != i
        expected.append(metrics.average_precision_score(labels[others] == labels[i], similarity[i, others]))
    result = evaluate("all-vs-rest", embeddings, labels)
    assert result.metrics["map"] == pytest.approx(sum(expected) / 120, rel=1e-12)


def street(seed, identities=25, n=250, ties=False):
    """Queries, gallery, junk, distractors and a pool over six cameras; some queries have no match."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, labels = gallery_with_ties(n, seed, identities)
    if not ties:
        embeddings = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    roles = torch.randint(5, (n,), generator=generator)
    cameras = torch.randint(6, (n,), generator=generator)
    pool = embeddings[roles == 0].repeat(2, 1)  # two more images of each query's identity and camera
    embeddings = torch.cat([embeddings, pool + 0.1 * torch.randn(pool.shape, generator=generator).double()])
    labels = torch.cat([labels, labels[roles == 0].repeat(2)])
    cameras = torch.cat([cameras, cameras[roles == 0].repeat(2)])
    names = ["query", "gallery", "gallery", "junk", "distractor"]
    return embeddings, labels, cameras, [names[r] for r in roles] + ["pool"] * len(pool)


def street_oracle(embeddings, labels, cameras, roles, metric, query_of=None):
    all_ranks = []
    for i, role in enumerate(roles):
        if role != "query":
            continue
        query = embeddings[i] if query_of is None else query_of(i)
        similarity, match, ignored = scores(query, embeddings, metric), [], []
        for j in range(len(roles)):
            same = labels[j] == labels[i] and roles[j] == "gallery"
            seen = same and cameras[j] == cameras[i]
            ignored.append(roles[j] not in ("gallery", "distractor") or bool(seen))
            match.append(bool(same) and not seen)
        all_ranks.append(match_ranks(similarity, match, ignored))
    return all_ranks


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03-767-700"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_own_camera_and_junk_are_left_out_and_distractors_are_rivals(protocol, metric, ties):
    embeddings, labels, cameras, roles = street(0, identities=60, ties=ties)
    result = evaluate(protocol, embeddings, labels, (1, 5), metric, cameras, roles)
    assert_measures(result, street_oracle(embeddings, labels, cameras, roles, metric), (1, 5))
    assert result.n_unmatched > 0
    assert [roles[i] for i in result.query_index] == ["query"] * result.n_queries


@pytest.mark.parametrize("metric", METRICS)
def test_multi_query_pools_the_images_of_identity_and_camera(metric):
    embeddings, labels, cameras, roles = street(1)
    result = evaluate("market1501-multi-query", embeddings, labels, (1, 5), metric, cameras, roles)
    unit = F.normalize(embeddings) if metric == "cosine" else embeddings
    is_pool = torch.tensor([role == "pool" for role in roles])

    def members(i):
        return unit[is_pool & (labels == labels[i]) & (cameras == cameras[i])]

    by_mean = street_oracle(embeddings, labels, cameras, roles, metric, lambda i: members(i).mean(0))
    by_maximum = street_oracle(embeddings, labels, cameras, roles, metric, lambda i: members(i).amax(0))
    assert by_mean != by_maximum
    assert_measures(result, by_mean, (1, 5))
    assert_measures(result, by_maximum, (1, 5), prefix="max_")


def test_a_query_without_a_pool_is_refused():
    embeddings, labels, cameras, roles = street(1)
    without = roles.index("pool")
    lonely = [r if r != "pool" or i == without else "junk" for i, r in enumerate(roles)]
    with pytest.raises(ValueError, match="queries have no image of role pool of their identity and camera"):
        evaluate("market1501-multi-query", embeddings, labels, cameras=cameras, roles=lonely)


def views(seed, identities=12, most=3, missing=True):
    """Up to `most` images per identity and view; one identity lacks the second view, another the first."""
    generator = torch.Generator().manual_seed(seed)
    labels, cameras = [], []
    for identity, view in itertools.product(range(identities), (0, 1)):
        if not (missing and (identity, view) in ((3, 1), (7, 0))):
            count = int(torch.randint(1, most + 1, (1,), generator=generator))
            labels += [identity] * count
            cameras += [view] * count
    embeddings = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
    embeddings = embeddings + 2 * torch.randn(identities, 4, generator=generator, dtype=torch.float64)[labels]
    return embeddings, torch.tensor(labels), torch.tensor(cameras)


def expected_cmc_by_enumeration(embeddings, labels, cameras, k, a=0, b=1):
    """The mean over every choice of a query and of a gallery of one image per identity."""
    unit = F.normalize(embeddings)
    places = list(zip(labels.tolist(), cameras.tolist(), strict=True))
    images = {v: {i: [j for j, place in enumerate(places) if place == (i, v)] for i, _ in places} for v in (a, b)}
    gallery = [js for js in images[b].values() if js]
    cmc = []
    for identity, own in images[a].items():
        if own and images[b][identity]:
            hits = total = 0
            for query, shots in itertools.product(own, itertools.product(*gallery)):
                match = next(j for j in shots if labels[j] == identity)
                rank = sum(float(unit[query] @ unit[j]) >= float(unit[query] @ unit[match]) for j in shots)
                hits, total = hits + (rank <= k), total + 1
            cmc.append(hits / total)
    return cmc


@pytest.mark.parametrize("seed", [0, 1])
def test_the_single_shot_expectation_is_the_mean_over_all_drawings(seed):
    embeddings, labels, cameras = views(seed, identities=8, most=2)
    one = evaluate("cuhk03-single-shot", embeddings, labels, (1, 3, 20), cameras=cameras)
    two = evaluate("cuhk03-single-shot-two-way", embeddings, labels, (1, 3, 20), cameras=cameras)
    for at in (1, 3, 20):
        there = expected_cmc_by_enumeration(embeddings, labels, cameras, at)
        back = expected_cmc_by_enumeration(embeddings, labels, cameras, at, 1, 0)
        assert one.metrics[f"expected_recall@{at}"] == pytest.approx(sum(there) / len(there), rel=1e-12)
        both = there + back
        assert two.metrics[f"expected_recall@{at}"] == pytest.approx(sum(both) / len(both), rel=1e-12)
    assert 0 < one.metrics["expected_recall@1"] < one.metrics["expected_recall@3"] <= 1
    assert one.metrics["expected_recall@20"] == 1


def test_the_single_shot_expectation_has_its_closed_form():
    """Five identities stand before the match with probability 1/2 each: the CMC is that of Binomial(5, 1/2)."""
    query = torch.tensor([[1.0, 0.0, 0.0]])
    match, nearer, farther = torch.tensor([[0.8, 0.6, 0.0], [0.9, 0.19**0.5, 0.0], [0.0, 0.0, 1.0]]).split(1)
    embeddings = torch.cat([query, match, *[nearer, farther] * 5])
    labels = torch.tensor([0, 0, *torch.arange(1, 6).repeat_interleave(2)])
    cameras = torch.tensor([0] + [1] * 11)
    result = evaluate("cuhk03-single-shot", embeddings, labels, (1, 2, 3, 4, 5, 6), cameras=cameras)
    cumulative = 0.0
    for at in range(1, 7):
        cumulative += math.comb(5, at - 1) / 2**5
        assert result.metrics[f"expected_recall@{at}"] == pytest.approx(cumulative)
        assert (
            abs(result.metrics[f"recall@{at}"] - cumulative) < 4 * (cumulative * (1 - cumulative) / 100) ** 0.5 + 1e-9
        )


@pytest.mark.parametrize("protocol", ["cuhk03-single-shot", "cuhk03-single-shot-two-way"])
def test_single_shot_drawings_are_seeded_ranked_and_near_their_expectation(protocol):
    embeddings, labels, cameras = views(0, identities=60, most=5)
    cameras = 4 + 3 * cameras
    result = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras)
    again = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras)
    other = evaluate(protocol, embeddings, labels, (1, 5), cameras=cameras, seed=1)
    assert torch.equal(result.ranks, again.ranks)
    assert torch.equal(result.query_index, again.query_index)
    assert not torch.equal(result.ranks, other.ranks)
    assert other.metrics["expected_recall@1"] == result.metrics["expected_recall@1"]
    directions = 2 if "two-way" in protocol else 1
    assert result.n_queries == directions * 100 * 59
    assert result.n_unmatched == directions * 100
    assert set(cameras[result.query_index].tolist()) == ({4, 7} if directions == 2 else {4})
    for at in (1, 5):
        assert result.metrics[f"recall@{at}"] == pytest.approx(result.metrics[f"expected_recall@{at}"], abs=0.02)
    matched = result.ranks[result.ranks > 0]
    assert result.metrics["recall@5"] == pytest.approx((matched <= 5).double().mean().item())


def test_a_drawing_ranks_as_brute_force_does(monkeypatch):
    monkeypatch.setattr(protocols, "DRAWS", 1)
    embeddings, labels, cameras = views(3, most=1)  # one image each: nothing is left to draw
    result = evaluate("cuhk03-single-shot", embeddings, labels, (1,), cameras=cameras)
    expected = []
    for i in result.query_index:
        ranks = match_ranks(scores(embeddings[i], embeddings, "cosine"), labels == labels[i], cameras == 0)
        expected.append(ranks[0] if ranks else 0)
    assert result.ranks.tolist() == expected


def test_unusable_input_is_refused_by_name():
    embeddings, labels = gallery_with_ties(10, seed=0)
    with pytest.raises(ValueError, match="unknown protocol 'cub', known are all-vs-rest, cuhk03-single-shot"):
        evaluate("cub", embeddings, labels)
    with pytest.raises(ValueError, match="unknown metric 'cosin', known are cosine, euclidean"):
        evaluate("all-vs-rest", embeddings, labels, metric="cosin")
    with pytest.raises(ValueError, match="labels must be integers"):
        first_match_ranks(embeddings, labels[1:])
    with pytest.raises(NotFiniteError, match=r"rows \[0\]"):
        first_match_ranks(embeddings * torch.tensor([[float("nan")], *[[1.0]] * 9]), labels)
    with pytest.raises(ValueError, match="'cuhk03-single-shot' needs cameras"):
        evaluate("cuhk03-single-shot", embeddings, labels)
    with pytest.raises(ValueError, match=r"exactly two views, got \[0, 1, 2\]"):
        evaluate("cuhk03-single-shot", embeddings, labels, cameras=torch.arange(10) % 3)
    with pytest.raises(ValueError, match=r"cameras must be integers of shape \(10,\)"):
        evaluate("cuhk03-single-shot", embeddings, labels, cameras=torch.ones(9).long())
    with pytest.raises(ValueError, match="'market1501' needs roles"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10))
    with pytest.raises(ValueError, match=r"roles must be 10 of both, query, .* got 10 of probe"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10), roles=["probe"] * 10)
    with pytest.raises(ValueError, match="needs rows of role query or both, there are none"):
        evaluate("market1501", embeddings, labels, cameras=torch.arange(10), roles=["junk"] * 10)


def test_every_protocol_is_documented_by_name():
    assert all(f'"{name}":' in evaluate.__doc__ for name in PROTOCOLS)


# -------------------------------------------------------------------------------------------------------- neighbors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_neighbours_are_those_of_a_full_sort(metric, backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    gallery = 3 + torch.randn(700, 9, generator=generator)
    gallery[300:310] = gallery[5]  # equals are ordered by index
    queries = gallery[:400]
    similarity, nearest = neighbors(queries, gallery, 7, metric, own=torch.arange(400), backend=backend)
    for i in (0, 5, 123, 302, 399):
        similarity = torch.tensor(scores(queries[i].double(), gallery.double(), metric), dtype=torch.float64)
        ranked = sorted((j for j in range(700) if j != i), key=lambda j, s=similarity: (-round(float(s[j]), 12), j))
        assert nearest[i].tolist() == ranked[:7]
        expected = similarity[ranked[:7]] if metric == "cosine" else -similarity[ranked[:7]]
        torch.testing.assert_close(similarity[i], expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_the_backends_give_the_same(metric):
    pytest.importorskip("faiss")
    gallery = torch.randn(2000, 33, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    by_faiss, by_torch = (neighbors(gallery[:300], gallery, 50, metric, backend=b) for b in ("faiss", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(by_faiss, by_torch, strict=True))


def test_neighbours_refuse_what_they_cannot_find():
    gallery = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="k must be between 1 and 4, the images to choose from, got 5"):
        neighbors(gallery, gallery, 5, own=torch.arange(5))
    with pytest.raises(ValueError, match="unknown backend 'annoy'"):
        neighbors(gallery, gallery, 1, backend="annoy")
    with pytest.raises(ValueError, match="unknown metric 'dot'"):
        neighbors(gallery, gallery, 1, metric="dot")
