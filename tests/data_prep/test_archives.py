"""Reading archives and folders: equal content from tgz, zip and folder; unsafe and damaged archives are refused."""

import gzip
import io
import os
import stat
import tarfile
import zipfile

import pytest

from data_prep import archives
from data_prep.archives import extract, open_source, read_files, verify
from data_prep.originals import Original
from data_prep.prepared import PreparationError
from tests.helpers.miniatures import write_folder, write_tgz, write_zip

FILES = {"top/list.txt": b"a line\n", "top/images/b.jpg": b"bbb", "top/images/a.jpg": b"aaaa", "other.txt": b"x"}


def tar_with(path, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return path


def zip_with(path, name, content=b"x", mode=stat.S_IFREG | 0o644):
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize("write", [write_tgz, write_zip, write_folder])
def test_tgz_zip_and_folder_give_the_same_files(write, tmp_path):
    source = open_source(write(tmp_path / "source", FILES), texts=("list.txt",)).relative_to("list.txt")
    assert source.prefix == "top/"
    assert source.files == {"list.txt": 7, "images/a.jpg": 4, "images/b.jpg": 3}
    assert source.text("list.txt") == "a line\n"
    wanted = ["images/a.jpg", "images/b.jpg"]
    assert dict(read_files(source, wanted)) == {"images/a.jpg": b"aaaa", "images/b.jpg": b"bbb"}
    if source.kind != "tgz":
        assert [name for name, _ in read_files(source, wanted)] == wanted


@pytest.mark.parametrize("write", [write_tgz, write_zip, write_folder])
def test_ignores_and_counts_hidden_and_system_files(write, tmp_path):
    stray = ("top/Thumbs.db", "top/images/Thumbs.db", "top/images/._a.jpg", "__MACOSX/top/x.jpg", "__MACOSX/top/y.jpg")
    hidden = ("top/.ipynb_checkpoints/a.jpg", ".git/objects/x", "@eaDir/a.jpg", "top/images/.hidden.jpg")
    source = open_source(write(tmp_path / "source", FILES | dict.fromkeys(stray + hidden, b"")))
    assert source.files.keys() == FILES.keys()
    assert source.ignored == {
        ".git/": 1,
        ".hidden.jpg": 1,
        ".ipynb_checkpoints/": 1,
        "._a.jpg": 1,
        "@eaDir/": 1,
        "Thumbs.db": 2,
        "__MACOSX/": 2,
    }


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "C:/evil.jpg", "..\\evil.jpg"])
def test_refuses_a_member_with_a_path_outside_of_the_archive(name, tmp_path):
    tgz = tar_with(tmp_path / "a.tgz", (name, tarfile.REGTYPE, b"x"))
    for archive in (tgz, zip_with(tmp_path / "a.zip", name)):
        with pytest.raises(PreparationError, match=r"member .*evil.* has a path outside of the archive"):
            open_source(archive)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_refuses_a_link_or_device_in_a_tgz(kind, tmp_path):
    with pytest.raises(PreparationError, match=r"member link\.jpg is a link, a device or a sparse file"):
        open_source(tar_with(tmp_path / "a.tgz", ("link.jpg", kind, b"")))


def test_refuses_a_link_in_a_zip(tmp_path):
    archive = zip_with(tmp_path / "a.zip", "link.jpg", b"/etc/passwd", stat.S_IFLNK | 0o777)
    with pytest.raises(PreparationError, match=r"member link\.jpg is a link or a device"):
        open_source(archive)


def test_refuses_a_link_out_of_a_folder(tmp_path):
    outside = tmp_path / "secret.jpg"
    outside.write_bytes(b"x")
    folder = write_folder(tmp_path / "source", FILES)
    (folder / "top" / "inside.jpg").symlink_to(folder / "other.txt")
    assert "top/inside.jpg" in open_source(folder).files
    (folder / "top" / "out.jpg").symlink_to(outside)
    with pytest.raises(PreparationError, match=r"out\.jpg is a link to a file outside of"):
        open_source(folder)
    (folder / "top" / "out.jpg").unlink()
    (folder / "top" / "out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(PreparationError, match="out is a link to a folder"):
        open_source(folder)
    (folder / "top" / "out").unlink()
    (folder / "top" / "gone.jpg").symlink_to(tmp_path / "nothing")
    with pytest.raises(PreparationError, match=r"gone\.jpg is a broken link"):
        open_source(folder)


def test_accepts_links_in_folders_that_are_not_read(tmp_path):
    folder = write_folder(tmp_path / "source", FILES | {".venv/bin/python": b"x"})
    (folder / ".venv" / "lib64").symlink_to(tmp_path, target_is_directory=True)
    assert open_source(folder).files.keys() == FILES.keys()
    (folder / "venv").symlink_to(tmp_path, target_is_directory=True)
    wanted = {"top/images/a.jpg", ".venv/bin/python"}
    source = open_source(folder, wanted=wanted)
    assert source.files.keys() == FILES.keys() | {".venv/bin/python"}
    assert source.ignored == {}
    with pytest.raises(PreparationError, match="venv is a link to a folder"):
        open_source(folder, wanted={"venv/a.jpg"})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_two_members_of_the_same_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"1")
        archive.writestr("a.jpg", b"2")
    tgz = tar_with(tmp_path / "a.tgz", ("a.jpg", tarfile.REGTYPE, b"1"), ("./a.jpg", tarfile.REGTYPE, b"2"))
    for file in (tmp_path / "a.zip", tgz):
        with pytest.raises(PreparationError, match=r"member a\.jpg occurs twice"):
            open_source(file)


def test_refuses_an_encrypted_zip(tmp_path):
    archive = zip_with(tmp_path / "a.zip", "a.jpg")
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the encryption flag in the central directory
    archive.write_bytes(content)
    with pytest.raises(PreparationError, match="is encrypted; unpack the archive"):
        open_source(archive)


def test_refuses_a_zip_bomb_before_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for i in range(2):
            archive.writestr(f"{i}.jpg", bytes(archives.FREE_BYTES))
    with pytest.raises(
        PreparationError, match=r"bomb\.zip is a decompression bomb: its .* unpack to 134,217,728 or more"
    ):
        open_source(tmp_path / "bomb.zip")


def test_refuses_a_tgz_bomb_while_reading(tmp_path):
    bomb = tmp_path / "bomb.tgz"
    with tarfile.open(bomb, "w:gz", compresslevel=9) as archive:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = archives.FREE_BYTES
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(PreparationError, match="a decompression bomb"):
        open_source(bomb)


def test_refuses_a_huge_header_in_a_tgz(tmp_path):
    """The limit stops a member name of 4 GB, which tarfile would read into memory."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**32
    with gzip.open(tmp_path / "bomb.tgz", "wb", compresslevel=1) as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        for _ in range(80):
            file.write(bytes(2**20))
    with pytest.raises(PreparationError, match="decompression bomb"):
        open_source(tmp_path / "bomb.tgz")


def test_refuses_a_file_above_the_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 3)
    with pytest.raises(
        PreparationError,
        match=r"(top/images/a\.jpg is too large: got 4|top/list\.txt is too large: got 7) bytes; files of at most 3",
    ):
        open_source(write_tgz(tmp_path / "a.tgz", FILES))
    for source in (open_source(write_zip(tmp_path / "a.zip", FILES)), open_source(write_folder(tmp_path / "f", FILES))):
        with pytest.raises(PreparationError, match=r"top/images/a\.jpg is too large: got 4 bytes"):
            list(read_files(source, ["top/images/a.jpg"]))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("write", [write_tgz, write_zip])
def test_refuses_a_truncated_archive(write, share, tmp_path):
    content = {f"{i}.jpg": os.urandom(2000) for i in range(20)}
    archive = write(tmp_path / "archive", content)
    archive.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
    with pytest.raises(PreparationError, match="archive is truncated or damaged"):
        open_source(archive)


def test_refuses_a_truncated_tar_inside_a_whole_gzip_file(tmp_path):
    whole = gzip.decompress(
        write_tgz(tmp_path / "a.tgz", {f"{i}.jpg": os.urandom(2000) for i in range(20)}).read_bytes()
    )
    (tmp_path / "a.tgz").write_bytes(gzip.compress(whole[:20000]))
    with pytest.raises(PreparationError, match="truncated or damaged"):
        open_source(tmp_path / "a.tgz")


def test_refuses_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", FILES)
    scan = os.scandir

    def denied(place):
        if str(place).endswith("images"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PreparationError, match=r"top/images cannot be read \(Permission denied\)"):
        open_source(source)


def test_refuses_other_files_and_archives(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"Rar!....")
    with pytest.raises(
        PreparationError, match=r"--source must be a folder, a zip archive or a tgz archive: got .*a\.rar"
    ):
        open_source(tmp_path / "a.rar")
    with pytest.raises(PreparationError, match=r"must be an existing file or folder: got .*nothing"):
        open_source(tmp_path / "nothing")
    with pytest.raises(PreparationError, match=r"does not contain images\.txt; give the original archive"):
        open_source(write_folder(tmp_path / "f", FILES)).relative_to("images.txt")


def test_refuses_another_checksum_unless_overridden(tmp_path):
    archive = write_zip(tmp_path / "a.zip", FILES)
    digests = verify(archive, Original("a", "A", "a.zip", "page", "terms", 1, 1), any_checksum=False)
    right = {"md5": digests["md5"], "sha256": digests["sha256"], "size": archive.stat().st_size}
    for wrong in ({"md5": "0" * 32}, {"sha256": "0" * 64}, {"size": 1}):
        original = Original("a", "A", "a.zip", "page", "terms", 1, 1, **{**right, **wrong})
        with pytest.raises(
            PreparationError, match=r"not the published a\.zip: got .* \(published: .*\); .*--any-checksum"
        ):
            verify(archive, original, any_checksum=False)
        assert verify(archive, original, any_checksum=True)["checksum"] == "overridden by --any-checksum"
    original = Original("a", "A", "a.zip", "page", "terms", 1, 1, **right)
    assert verify(archive, original, any_checksum=False)["checksum"] == "as published"


def test_extracts_one_file(tmp_path):
    folder = open_source(write_folder(tmp_path / "f", FILES)).relative_to("list.txt")
    assert extract(folder, "list.txt", tmp_path) == tmp_path / "f" / "top" / "list.txt"
    packed = open_source(write_zip(tmp_path / "a.zip", FILES)).relative_to("list.txt")
    assert extract(packed, "list.txt", tmp_path).read_bytes() == b"a line\n"
