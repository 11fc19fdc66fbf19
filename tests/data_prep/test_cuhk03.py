"""CUHK03 from files of its exact structure: empty cells, identities with one view, the 20 test sets."""

import fcntl

import numpy as np
import pytest
from scipy.io import savemat

from data_prep import cuhk03
from data_prep.prepared import PreparationError
from tests.helpers.miniatures import a_batch, evaluated, expect, prepared, write_folder, write_mat, write_zip

SIZES = (9, 6, 3, 2, 2)


def mini_slots(pair, person):
    """Give three images of each view; the first identity has only one view, the second has all ten images."""
    if (pair, person) == (1, 1):
        return (1, 2, 3)
    return range(1, 11) if (pair, person) == (1, 2) else (1, 2, 4, 6, 7, 9)


MINI_IMAGES = 3 + 10 + 6 * (sum(SIZES) - 2)


def mini(monkeypatch, **others):
    values = {"PAIR_SIZES": SIZES, "TEST_SIZE": 4, "CLASSES_767": {"train classes": 12, "test classes": 10}, **others}
    expect(monkeypatch, cuhk03, {"labeled": MINI_IMAGES, "detected": MINI_IMAGES}, **values)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Write the extracted folder of the archive; return its file and its test sets."""
    mini(monkeypatch)
    (tmp_path / "cuhk03_release").mkdir()
    file = tmp_path / "cuhk03_release" / "cuhk-03.mat"
    return file, write_mat(file, SIZES, mini_slots, ("labeled", "detected"), test_size=4, shape=(3, 12, 32))


def identities(index, split):
    """Return pair and person of each identity of a split, from the image names."""
    names = index.source[index.split == split].str.split("_")
    return {(int(name[0]), int(name[1])) for name in names}


def test_published_counts_equal_the_papers():
    assert sum(cuhk03.PAIR_SIZES) == 1_467
    assert sum(cuhk03.PAIR_SIZES[:3]) == 1_360 == 1_160 + 100 + 100
    for boxes, counts in cuhk03.PUBLISHED_767.items():
        assert sum(counts.values()) == cuhk03.PUBLISHED[boxes]
    assert sum(cuhk03.CLASSES_767.values()) == 1_467


def test_prepares_and_evaluates_the_archive(source, tmp_path, monkeypatch):
    file, test_sets = source
    archive = write_zip(tmp_path / "cuhk03_release.zip", {"cuhk03_release/cuhk-03.mat": file.read_bytes()})
    expect(monkeypatch, cuhk03, cuhk03.PUBLISHED, archive)
    dataset = prepared("cuhk03", archive, tmp_path / "data" / "cuhk03", "--val-fraction", "3")
    assert sorted(p.name for p in (tmp_path / "data" / "cuhk03").iterdir()) == [
        "card.json",
        "images.npy",
        "index.parquet",
    ]
    index, card = dataset.index, dataset.card
    assert card["original"]["checksum"] == "as published"
    assert card["classes"] == {"train": 11, "val": 3, "test": 4}
    assert identities(index, "test") == test_sets[0]
    assert len(index) == 3 + 10 + 6 * (18 - 2)
    assert set(index.role) == {"both"}
    names = index.source.str.split("_", expand=True).astype(int)
    assert (index.camera == names[2]).all()
    assert (names[2] == np.where(names[3] <= 5, 1, 2)).all()
    assert (index.label == names[0].map({1: 0, 2: 9, 3: 15}) + names[1] - 1).all()
    assert set(index.camera[(names[0] == 1) & (names[1] == 1)]) == {1}
    assert dataset.images.shape[1:] == (160, 60, 3)
    table = dataset.against_published()
    assert len(table) >= 2
    assert (table["published"] == table["here"]).all()
    images, _ = a_batch(dataset, batch_size=8, images_per_class=4)
    assert images.shape == (8, 3, 160, 60)
    retrieval = evaluated(dataset)
    assert retrieval.protocol == "cuhk03-single-shot"
    assert {f"recall@{k}" for k in (1, 5, 10, 15, 20)} <= retrieval.metrics.keys()
    assert retrieval.metrics["recall@1"] > 0.5  # an identity is one colour with noise


def test_reads_a_file_that_another_program_has_locked(source, tmp_path):
    file, _ = source
    with open(file) as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert len(prepared("cuhk03", file.parent, tmp_path / "cuhk03", "--val-fraction", "3").index)


def test_pixels_are_upright_and_in_order(source, tmp_path):
    h5py = pytest.importorskip("h5py")
    file, _ = source
    with h5py.File(file, "r+") as mat:
        cell = mat[mat[mat["labeled"][0, 0]][3, 1]]  # pair 1, slot 4, person 2
        pixels = np.zeros((3, 12, 32), np.uint8)  # (channels, width, height)
        pixels[0, :, :16], pixels[2, 6:, 16:] = 200, 100  # the upper half red, lower right blue
        cell[...] = pixels
    dataset = prepared("cuhk03", file.parent, tmp_path / "cuhk03", "--val-fraction", "3")
    image = dataset.images[dataset.index.source == "1_002_1_04"][0].astype(int)
    assert image[40, 30].tolist() == [200, 0, 0]
    assert image[120, 50].tolist() == [0, 0, 100]
    assert image[120, 10].tolist() == [0, 0, 0]


def test_prepares_other_test_sets_and_all_camera_pairs(source, tmp_path):
    file, test_sets = source
    for number in (1, 7, 20):
        options = ("--test-set", str(number), "--camera-pairs", "5", "--val-fraction", "3")
        dataset = prepared("cuhk03", file.parent, tmp_path / "cuhk03", *options)
        assert identities(dataset.index, "test") == test_sets[number - 1]
        assert sum(dataset.card["classes"].values()) == sum(SIZES)
    assert dataset.card["settings"]["test_set"] == 20
    assert dataset.card["settings"]["camera_pairs"] == 5


def index_file(path, names, parts):
    """Write a file like cuhk03_new_protocol_config_labeled.mat."""
    cells = np.empty((len(names), 1), object)
    cells[:, 0] = [f"{name}.png" for name in names]
    people = [int("".join(name.split("_")[:2])) for name in names]
    rows = {f"{part}_idx": 1 + np.array([[i] for i, p in enumerate(parts) if p == part]) for part in set(parts)}
    savemat(path, {"filelist": cells, "labels": np.array(people)[:, None], "camId": np.ones((len(names), 1)), **rows})
    return path


def expected_part(name):
    """Odd identities are for training; of the others, the first image of each view is a query."""
    pair, person, _, slot = map(int, name.split("_"))
    if (pair, person) == (1, 1) or person % 2:
        return "train"
    return "query" if slot in (1, 6) else "gallery"


@pytest.fixture
def protocol_767(source, tmp_path, monkeypatch):
    file, _ = source
    whole = prepared("cuhk03", file.parent, tmp_path / "whole" / "cuhk03", "--camera-pairs", "5", "--val-fraction", "3")
    names = sorted(whole.index.source, reverse=True)
    parts = [expected_part(name) for name in names]
    counts = {f"{part} images": parts.count(part) for part in ("train", "query", "gallery")}
    monkeypatch.setattr(cuhk03, "PUBLISHED_767", {"labeled": counts, "detected": counts})
    return names, parts


def test_prepares_the_767_700_protocol_from_its_index_file(source, protocol_767, tmp_path):
    names, parts = protocol_767
    index_mat = index_file(tmp_path / "index.mat", names, parts)
    options = ("--index-file", str(index_mat), "--val-fraction", "3")
    dataset = prepared("cuhk03", source[0].parent, tmp_path / "new" / "cuhk03", *options)
    index = dataset.index
    assert dataset.card["classes"] == {"train": 9, "val": 3, "test": 10}
    assert all(index.role == [{"train": "both"}.get(expected_part(n), expected_part(n)) for n in index.source])
    assert set(index.role[index.split != "test"]) == {"both"}
    assert dataset.card["settings"]["index_file"] == "index.mat"
    table = dataset.against_published()
    assert len(table) == 5
    assert (table["published"] == table["here"]).all()
    retrieval = evaluated(dataset)
    assert retrieval.protocol == "cuhk03-767-700"
    assert retrieval.n_queries == 20


def test_refuses_an_index_file_that_contradicts_the_images(source, protocol_767, tmp_path):
    names, parts = protocol_767
    data = tmp_path / "data"

    def refused(match, names, parts):
        variant = cuhk03.Variant(index_file=index_file(tmp_path / "index.mat", names, parts))
        with pytest.raises(PreparationError, match=match):
            cuhk03.prepare(source[0].parent, data / "cuhk03", variant=variant)
        assert list(data.iterdir()) == []

    refused("of which 133 are in cuhk-03.mat", [*names, "5_009_1_01"], [*parts, "gallery"])
    swapped = list(parts)
    swapped[parts.index("gallery")] = "train"
    refused(r"got 13 train classes \(published: 12\)", names, swapped)
    refused("is not an index file of the 767/700 protocol", names, ["train"] * len(names))


def test_refuses_an_index_file_with_wrong_labels(source, protocol_767, tmp_path):
    names, parts = protocol_767
    file = index_file(tmp_path / "index.mat", names, parts)
    content = {k: v for k, v in cuhk03.loadmat(file).items() if not k.startswith("__")}
    content["labels"][0] = content["labels"][-1]
    savemat(file, content)
    with pytest.raises(PreparationError, match="labels contradict the identities in the file names"):
        cuhk03.prepare(source[0].parent, tmp_path / "data" / "cuhk03", variant=cuhk03.Variant(index_file=file))


def test_refuses_other_structures(source, tmp_path, monkeypatch):
    file, _ = source
    out = tmp_path / "data" / "cuhk03"

    def refused(match, folder=file.parent, **variant):
        with pytest.raises(PreparationError, match=match):
            cuhk03.prepare(folder, out, variant=cuhk03.Variant(**variant))
        assert not out.parent.exists() or list(out.parent.iterdir()) == []

    monkeypatch.setattr(cuhk03, "PAIR_SIZES", (9, 6, 4, 2, 2))
    refused(r"identities per camera pair \(labeled\) must be \(9, 6, 4, 2, 2\): got \(9, 6, 3, 2, 2\)")
    mini(monkeypatch, TEST_SIZE=5)
    refused(r"test set 1 must have 5 existing identities: got 4, of which 0 do not exist")
    mini(monkeypatch)
    monkeypatch.setattr(cuhk03, "PUBLISHED", {"labeled": 7, "detected": 7})
    refused(r"got 133 detected images \(published: 7\)", boxes="detected")
    mini(monkeypatch)
    refused("--test-set must be from 1 to 20: got 21", test_set=21)
    refused("--index-file cannot be combined with --camera-pairs or --test-set", index_file=file, test_set=2)
    refused(r"--index-file must be an existing file: got .*none\.mat", index_file=tmp_path / "none.mat")
    (tmp_path / "text.mat").write_text("nonsense")
    refused(r"text\.mat is not an index file of the 767/700 protocol", index_file=tmp_path / "text.mat")
    broken = write_folder(tmp_path / "broken", {"cuhk03_release/cuhk-03.mat": file.read_bytes()[:3000]})
    refused(r"cuhk-03\.mat is damaged or of another form", folder=broken)
    refused(r"does not contain cuhk-03\.mat", folder=write_folder(tmp_path / "other", {"a.txt": b""}))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Write a file of the full structure: 1,467 identities and 14,096 images of 3 x 8 pixels."""
    folder = tmp_path_factory.mktemp("full") / "cuhk03_release"
    folder.mkdir()
    people = [(pair, person) for pair, size in enumerate(cuhk03.PAIR_SIZES, 1) for person in range(1, size + 1)]
    lacking = 10 * len(people) - cuhk03.PUBLISHED["labeled"]
    short = {who: min(5, lacking - 5 * i) for i, who in enumerate(people[4::11]) if lacking > 5 * i}
    assert sum(short.values()) == lacking

    def slots(pair, person):  # The last slots are empty; some identities have no image of the second view.
        return range(1, 11 - short.get((pair, person), 0))

    return folder, write_mat(folder / "cuhk-03.mat", cuhk03.PAIR_SIZES, slots)


def test_split_sizes_of_the_full_structure_equal_the_papers(full, tmp_path):
    dataset = prepared("cuhk03", full[0], tmp_path / "cuhk03", "--size", "8x3")
    assert dataset.card["classes"] == {"train": 1_160, "val": 100, "test": 100}
    assert identities(dataset.index, "test") == full[1][0]
    assert len(identities(dataset.index, "val")) == 100
    assert dataset.card["settings"]["val_fraction"] == 100


def test_split_sizes_of_all_20_test_sets_equal_the_papers(full):
    h5py = pytest.importorskip("h5py")
    folder, test_sets = full
    with h5py.File(folder / "cuhk-03.mat") as mat:
        images = cuhk03.read_images(mat, "labeled")
        assert len(images) == 14_096
        for number in range(1, 21):
            tested = cuhk03.read_test_set(mat, number)
            assert tested == test_sets[number - 1]
            index = cuhk03.split_single_shot(images, tested, cuhk03.Variant(test_set=number))
            index = cuhk03.hold_out(index, 100, seed=number)
            assert dict(index.groupby("split").label.nunique()) == {"train": 1_160, "val": 100, "test": 100}
            assert identities(index, "test") == tested


def test_the_seed_decides_the_validation_identities(source, tmp_path):
    def validation_identities(name, *options):
        dataset = prepared("cuhk03", source[0].parent, tmp_path / name / "cuhk03", "--val-fraction", "3", *options)
        return frozenset(identities(dataset.index, "val"))

    assert validation_identities("a") == validation_identities("b") == validation_identities("c", "--boxes", "detected")
    assert len({validation_identities(f"d{seed}", "--seed", str(seed)) for seed in range(5)}) > 1
