"""Prepared datasets: reading and checks; crops and flips of batches."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.prepared import create_images, finish, new_folder
from hloss.retrieval.protocols import PROTOCOLS, evaluate
from hloss.runs.datasets import COLUMNS, ROLES, open_dataset, query_counts
from hloss.runs.errors import DatasetError
from hloss.runs.images import augment, center_crop, stripes


@pytest.fixture
def folder(tiny_data, tmp_path):
    """A copy of the tiny dataset that a test may damage."""
    return shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")


def change_card(folder, **values):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({k: v for k, v in {**card, **values}.items() if v is not None}))


def test_images_are_a_read_only_memory_map(folder):
    dataset = open_dataset(folder)
    assert isinstance(dataset.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.images[0] = 0
    batch = dataset.pixels(np.array([3, 1]))
    assert (batch.shape, batch.dtype) == ((2, 1, 16, 16), torch.uint8)
    assert np.array_equal(batch[0, 0].numpy(), dataset.images[3, :, :, 0])
    batch.zero_()  # a copy
    assert open_dataset(folder).images[3].any()
    dataset.check_pixels()


def test_columns_and_counts_of_the_index(tmp_path):
    published = {"train images": 2, "query and junk images": 3, "test classes": 1}
    with new_folder(tmp_path / "people") as folder:
        images = create_images(folder, 4, 8, 6, 3)
        images[:] = np.arange(4)[:, None, None, None]
        images.flush()
        rows = [
            (0, "train", "both", 1, "a"),
            (1, "val", "both", 2, "b"),
            (2, "test", "query", 3, "c"),
            (-1, "test", "junk", 4, "d"),
        ]
        index = pd.DataFrame(rows, columns=list(COLUMNS))
        finish(folder, index, {"name": "people", "protocol": "market1501", "recall_at": [1], "published": published})
    dataset = open_dataset(tmp_path / "people")
    test = dataset.rows("test")
    assert test.tolist() == [2, 3]
    assert dataset.labels(test).tolist() == [2, -1]
    assert dataset.cameras(test).tolist() == [3, 4]
    assert dataset.roles(test) == ["query", "junk"]
    assert dataset.pixels(test)[:, 2, 7, 5].tolist() == [2, 3]
    assert dataset.card["classes"] == {"train": 1, "val": 1, "test": 1}
    assert "pool" not in dataset.card["roles"]
    assert dataset.counts()["images"].to_dict() == {"train": 1, "val": 1, "test": 2}
    assert dataset.counts()["classes"].to_dict() == {"train": 1, "val": 1, "test": 1}
    assert dataset.counts()["cameras"].to_dict() == {"train": 1, "val": 1, "test": 2}
    assert dataset.against_published().to_dict("index") == {
        "train images": {"published": 2, "here": 2},
        "query and junk images": {"published": 3, "here": 2},
        "test classes": {"published": 1, "here": 1},
    }


@given(
    st.sampled_from([name for name in PROTOCOLS if name != "market1501-multi-query"]),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(ROLES[:4]), st.integers(0, 2)), min_size=1, max_size=30),
)
def test_query_counts_equal_the_ranks_of_the_protocol(protocol, images):
    """With equal embeddings every rival precedes the match: its rank is the number of rivals plus one."""
    two_views = "single-shot" in protocol
    if two_views:
        images = [(label, "both", camera % 2) for label, _, camera in images]
    index = pd.DataFrame(images, columns=["label", "role", "camera"])
    index.loc[index.role.isin(["junk", "distractor"]) & (protocol != "all-vs-rest"), "label"] = -1
    counts = query_counts(index, protocol)
    try:
        found = evaluate(
            protocol,
            torch.ones(len(index), 2),
            torch.tensor(index.label.to_numpy()),
            cameras=torch.tensor(index.camera.to_numpy()),
            roles=index.role.tolist(),
        )
    except ValueError:
        no_gallery = not index.role.isin(["gallery", "both"]).any()
        assert not len(counts) or (no_gallery and not counts.matches.any())
        return
    drawings = 100 if two_views else 1
    expected = np.where(counts.matches > 0, counts.rivals + 1, 0)
    assert found.n_queries == len(counts) * drawings
    assert found.n_unmatched == (counts.matches == 0).sum() * drawings
    assert sorted(found.ranks.tolist()) == sorted(expected.tolist() * drawings)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"format": 2}, "has format 2, but this version reads format 1"),
        ({"protocol": None}, r"card\.json lacks the keys protocol; prepare the dataset again"),
        ({"images": 7}, r"must match the counts in card\.json \(images 7, .*\): got images 180, "),
        ({"classes": {"train": 17, "val": 6, "test": 8}}, r"'train': 17.*: got .*'train': 16"),
        ({"roles": {"both": 179}}, r"'both': 179.*: got .*'both': 180"),
        (
            {"image_shape": [16, 16, 3]},
            r"images\.npy is uint8 \(180, 16, 16, 1\), .* requires uint8 \(180, 16, 16, 3\)",
        ),
        ({"index_sha256": "0"}, r"index\.parquet: its hash differs from the one in .*card\.json"),
    ],
)
def test_refuses_a_card_that_does_not_match_the_files(folder, values, match):
    change_card(folder, **values)
    with pytest.raises(DatasetError, match=match):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("card.json", b"{", r"card\.json is not JSON"),
        ("index.parquet", b"PAR1", r"index\.parquet cannot be read"),
        ("index.parquet", None, r"index\.parquet cannot be read"),
        ("images.npy", b"\x93NUMPY", r"images\.npy cannot be read as a memory map"),
        ("images.npy", None, r"images\.npy cannot be read as a memory map"),
    ],
)
def test_refuses_missing_and_broken_files(folder, name, content, match):
    (folder / name).unlink()
    if content:
        (folder / name).write_bytes(content)
    with pytest.raises(DatasetError, match=match):
        open_dataset(folder)


def test_refuses_an_index_with_other_columns(folder):
    index = pd.read_parquet(folder / "index.parquet")
    index.rename(columns={"role": "part"}).to_parquet(folder / "index.parquet")
    with pytest.raises(DatasetError, match=r"index\.parquet must have the columns .*role.*: got .*part"):
        open_dataset(folder)


def test_refuses_truncated_images(folder):
    content = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=r"images\.npy cannot be read as a memory map"):
        open_dataset(folder)


def test_refuses_pickled_images(folder):
    np.save(folder / "images.npy", np.array([{}] * 3, object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"images\.npy cannot be read as a memory map"):
        open_dataset(folder)


def test_check_pixels_finds_a_changed_pixel(folder):
    content = bytearray((folder / "images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images.npy").write_bytes(content)
    with pytest.raises(DatasetError, match=r"images\.npy: its hash differs from the card's"):
        open_dataset(folder).check_pixels()


def numbered(n, height, width):
    """Images whose channels are the row (0), the column (1) and the number of the image (2)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, i)]) for i in range(n)]).to(torch.uint8)


@given(st.integers(1, 6), st.integers(2, 20), st.integers(2, 20), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_augment_returns_crops_of_the_images(n, height, width, crop, horizontal_flip, seed):
    crop = min(crop, height, width)
    views = augment(numbered(n, height, width), crop, horizontal_flip, torch.Generator().manual_seed(seed))
    assert views.shape == (n, 3, crop, crop)
    assert views.is_contiguous()
    for i, view in enumerate(views.int()):
        assert (view[2] == i).all()
        assert (view[0] == view[0, 0, 0] + torch.arange(crop)[:, None]).all()
        steps = view[1, 0].diff()
        assert (steps == 1).all() or (horizontal_flip and (steps == -1).all())
        assert view[0].max() < height
        assert view[1].max() < width


def test_augment_draws_positions_and_flips_uniformly():
    views = augment(numbered(1, 10, 8).expand(6000, -1, -1, -1), 6, True, torch.Generator().manual_seed(0)).int()
    mirrored = views[:, 1, 0, 0] > views[:, 1, 0, 1]
    tops, lefts = views[:, 0].amin((1, 2)), views[:, 1].amin((1, 2))
    assert abs(mirrored.double().mean() - 0.5) < 4 * 0.5 / 6000**0.5
    for places, n in ((tops, 5), (lefts, 3)):
        share = torch.bincount(places, minlength=n) / 6000
        assert len(share) == n
        assert (share - 1 / n).abs().max() < 4 * (1 / n * (1 - 1 / n) / 6000) ** 0.5
    assert np.corrcoef(np.stack([mirrored, tops, lefts]))[np.triu_indices(3, 1)] == pytest.approx(0, abs=0.06)


def test_augment_depends_on_the_generator_only():
    images = numbered(5, 12, 12)

    def drawn(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        view = augment(images, **{"crop": 7, "horizontal_flip": True, **settings}, generator=generator)
        return view, generator.get_state()

    torch.manual_seed(1)
    first, state = drawn(0)
    torch.manual_seed(2)
    assert torch.equal(drawn(0)[0], first)
    assert not torch.equal(drawn(1)[0], first)
    for settings in ({"crop": None}, {"horizontal_flip": False}):  # The settings do not change the number of draws.
        assert torch.equal(drawn(0, **settings)[1], state)
    assert torch.equal(drawn(0, crop=None, horizontal_flip=False)[0], images)


def test_center_crop_returns_the_centre():
    views = center_crop(numbered(2, 11, 9), 5)
    assert views.shape == (2, 3, 5, 5)
    assert views[1, :, 0, 0].tolist() == [3, 2, 1]
    images = numbered(2, 11, 9)
    assert torch.equal(center_crop(images, None), images)
    full = center_crop(numbered(1, 256, 256), 227)
    assert full[0, :2, 0, 0].tolist() == [14, 14]


def test_refuses_a_crop_that_does_not_fit():
    for crop in (0, 10, -1):
        match = rf"crop={crop} does not fit into images of 11 x 9 pixels; allowed are 1 to 9"
        with pytest.raises(ValueError, match=match):
            augment(numbered(1, 11, 9), crop, True, torch.Generator())
        with pytest.raises(ValueError, match=match):
            center_crop(numbered(1, 11, 9), crop)


def test_stripes_overlap_by_ten_rows():
    images = numbered(2, 160, 60)
    parts = stripes(images)
    assert (parts.shape, parts.dtype) == ((2, 9, 60, 60), torch.uint8)
    for part, start in enumerate((0, 50, 100)):
        assert torch.equal(parts[:, 3 * part : 3 * part + 3], images[:, :, start : start + 60])
    assert parts[1, 3, 0, 0] == 50
    assert torch.equal(parts[:, :3, 50:], parts[:, 3:6, :10])
    with pytest.raises(ValueError, match=r"images must have shape \(n, 3, 160, 60\): got \(1, 3, 160, 61\)"):
        stripes(numbered(1, 160, 61))
