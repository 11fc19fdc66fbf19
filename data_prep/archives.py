"""Read an original archive or its extracted folder, without unpacking it to disk.

Archives are not trusted. Before any image is decoded, these are refused: members with a path outside the archive, links
and devices, duplicate names, encrypted members, truncated archives, and archives that unpack to more than MAX_RATIO
times their size. Hidden and system files and folders (`ignored_part`) are ignored and counted.
"""

import gzip
import hashlib
import os
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from data_prep.originals import Original
from data_prep.prepared import DOWNLOAD_AGAIN, PreparationError

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
SYSTEM_FOLDERS = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "lost+found",
    "CVS",
)
MAX_RATIO = 100  # unpacked bytes per packed byte; the original archives have about 1
FREE_BYTES = 2**26  # archives that unpack to less may have any ratio
MAX_FILE_BYTES = 2**27  # limit for one file, which is read into memory
CHUNK = 2**20
UNSAFE = "the original archives contain no such member; do not use this archive"
DAMAGED = (EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """An opened folder or archive.

    Attributes:
        path: The folder or archive.
        kind: "folder", "zip" or "tgz".
        files: Size in bytes of each file, by its path relative to `prefix`.
        texts: Content of the text files that were requested from `open_source`, by path.
        ignored: Number of ignored files, by file name or by the hidden or system folder (with a slash) around them.
        prefix: The folder inside the source that paths are relative to; empty or with a final slash.
    """

    path: Path
    kind: str  # folder, zip or tgz
    files: dict[str, int]
    texts: dict[str, bytes]
    ignored: dict[str, int]
    prefix: str = ""

    def relative_to(self, anchor: str) -> "Source":
        """Return the source with paths relative to the folder that contains `anchor`.

        Args:
            anchor: A file name, or a folder name with a final slash. The outermost match is used.

        Returns:
            A source without the files outside of that folder.

        Raises:
            PreparationError: there is no such file or folder.
        """
        places = [name for name in self.files if name.startswith(anchor) or f"/{anchor}" in name]
        if not places:
            raise PreparationError(
                f"{self.path} does not contain {anchor}; give the original archive or its extracted folder "
                "(`python -m data_prep list` shows where to download it)"
            )
        prefix = min((f"/{name}".partition(f"/{anchor}")[0] for name in places), key=len)[1:]
        prefix += "/" if prefix else ""

        def inside(files: dict) -> dict:
            return {name.removeprefix(prefix): v for name, v in files.items() if name.startswith(prefix)}

        return replace(self, files=inside(self.files), texts=inside(self.texts), prefix=prefix)

    def text(self, name: str) -> str:
        """Return the content of a text file.

        Args:
            name: Path of a file that was requested from `open_source`.

        Returns:
            The text; bytes that are not UTF-8 are replaced.

        Raises:
            PreparationError: the source does not contain the file.
        """
        if name not in self.texts:
            raise PreparationError(f"{self.path} does not contain {self.prefix}{name}; {DOWNLOAD_AGAIN}")
        return self.texts[name].decode("utf-8", errors="replace")


def open_source(path: Path, texts: Collection[str] = (), wanted: Collection[str] | None = None) -> Source:
    """List the files of a folder, a zip archive or a gzipped tar archive, and read its text files.

    Args:
        path: The folder or archive. The content of an archive decides its type, not its extension.
        texts: Names of text files to read, without their folder.
        wanted: Paths in a folder that will be read, if known. These are never ignored, and links elsewhere in the
            folder are not checked.

    Returns:
        The opened source.

    Raises:
        PreparationError: the path does not exist, is not such an archive, or is damaged or unsafe.
    """
    path = existing_source(path)
    if path.is_dir():
        return _open_folder(path, texts, wanted)
    with open(path, "rb") as file:
        start = file.read(4)
    with reported_damage(path):
        if start[:2] == b"PK":
            return _open_zip(path, texts)
        if start[:2] == b"\x1f\x8b":
            return _open_tgz(path, texts)
    raise PreparationError(f"--source must be a folder, a zip archive or a tgz archive: got {path}")


def existing_source(path: Path) -> Path:
    """Return the path of a source; raise PreparationError if it does not exist."""
    if not Path(path).exists():
        raise PreparationError(f"--source must be an existing file or folder: got {path}")
    return Path(path)


def read_files(source: Source, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the content of files.

    Args:
        source: The opened source.
        names: Paths of the files.

    Yields:
        Path and content of each file, in the order of `names`; for a tgz archive in the order of the archive.

    Raises:
        PreparationError: the archive is damaged, or a file is larger than MAX_FILE_BYTES.
    """
    with reported_damage(source.path):
        if source.kind == "folder":
            for name in names:
                _check_size(source.path, name, source.files[name])
                yield name, (source.path / source.prefix / name).read_bytes()
        elif source.kind == "zip":
            with zipfile.ZipFile(source.path) as archive:
                members = {_checked_name(source.path, m.filename): m for m in archive.infolist()}
                for name in names:
                    _check_size(source.path, name, source.files[name])
                    yield name, archive.read(members[source.prefix + name])
        else:
            wanted = {source.prefix + name for name in names}
            for member, file in _tgz_members(source.path):
                if file and member.name in wanted:
                    yield member.name.removeprefix(source.prefix), file.read()


def read_table(
    source: Source, name: str, columns: int, numbers: Collection[int], header: bool = False
) -> list[list[str]]:
    """Read a text file whose columns are separated by blanks.

    Args:
        source: The opened source.
        name: Path of a text file that was requested from `open_source`.
        columns: Number of columns.
        numbers: Columns, from 0, that must contain whole numbers.
        header: Whether the first line is a header, which is skipped.

    Returns:
        The fields of each line that is not blank.

    Raises:
        PreparationError: the file is missing, or a line has another form.
    """
    lines = [line for line in source.text(name).splitlines() if line.strip()]
    rows = [line.split() for line in lines[int(header) :]]
    for row in rows:
        if len(row) != columns or not all(row[i].isdigit() for i in numbers):
            form = f"{columns} columns, with whole numbers in columns {', '.join(str(i + 1) for i in numbers)}"
            raise PreparationError(
                f"{source.path}: {name} has a line of another form: got {' '.join(row)!r}; expected {form}; "
                f"{DOWNLOAD_AGAIN}"
            )
    return rows


def extract(source: Source, name: str, folder: Path) -> Path:
    """Return a path at which a file of the source can be opened.

    Args:
        source: A folder or a zip archive.
        name: Path of the file in the source.
        folder: Where a file of an archive is unpacked to.

    Returns:
        The file itself in a folder, or its unpacked copy.

    Raises:
        PreparationError: the archive is damaged.
    """
    if source.kind == "folder":
        return source.path / source.prefix / name
    target = folder / PurePosixPath(name).name
    with reported_damage(source.path), zipfile.ZipFile(source.path) as archive:
        size = source.files[name]
        bar = tqdm(total=size, desc=f"unpacking {target.name}", unit="B", unit_scale=True, mininterval=1)
        with archive.open(source.prefix + name) as packed, open(target, "wb") as file, bar:
            while chunk := packed.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return target


def verify(path: Path, original: Original, any_checksum: bool) -> dict:
    """Compare size and checksums of an archive with the published ones.

    Args:
        path: The archive, or its extracted folder, which has no checksum.
        original: The published archive.
        any_checksum: Whether to accept another size or checksum.

    Returns:
        What the card states about the source: kind, file name, bytes, md5, sha256, and the result.

    Raises:
        PreparationError: the path does not exist, or size or checksum differ and `any_checksum` is False.
    """
    path = existing_source(path)
    if path.is_dir():
        return {"kind": "extracted folder", "checksum": "an extracted folder has none; its counts were checked"}
    size = path.stat().st_size
    digests = _digests(path, size)
    problems = [] if original.size in (None, size) else [f"{size:,} bytes (published: {original.size:,})"]
    for algorithm, expected in original.checksums().items():
        if digests[algorithm] != expected:
            problems.append(f"{algorithm} {digests[algorithm]} (published: {expected})")
    if problems and not any_checksum:
        raise PreparationError(
            f"{path} is not the published {original.file}: got {', '.join(problems)}; download it again, or pass "
            "--any-checksum to accept a different archive"
        )
    known = {"kind": "archive", "file": path.name, "bytes": size, **digests}
    return {**known, "checksum": "overridden by --any-checksum" if problems else "as published"}


def bare_file(path: Path) -> dict:
    """Describe a file of the original that was unpacked by the user.

    Args:
        path: The file.

    Returns:
        What the card states about the source: kind, file name, bytes, md5, sha256, and that no checksum is published.
    """
    size = path.stat().st_size
    known = {"kind": "file of the archive", "file": path.name, "bytes": size, **_digests(path, size)}
    return {**known, "checksum": "none is published for this file; its counts were checked"}


def _digests(path: Path, size: int) -> dict[str, str]:
    digests = {name: hashlib.new(name) for name in ("md5", "sha256")}
    bar = tqdm(total=size, desc="checksum", unit="B", unit_scale=True, mininterval=1)
    with open(path, "rb") as file, bar:
        while chunk := file.read(CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    return {name: digest.hexdigest() for name, digest in digests.items()}


@contextmanager
def reported_damage(path: Path) -> Iterator[None]:
    """Turn the errors of archive readers about damage into a PreparationError that names the archive.

    Args:
        path: The archive that the block reads.

    Raises:
        PreparationError: the archive is truncated or damaged.
    """
    try:
        yield
    except DAMAGED as error:
        raise PreparationError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error


def ignored_part(name: str) -> str | None:
    """Return the hidden or system part of a path, for which its file is ignored.

    Args:
        name: A path relative to the source.

    Returns:
        The outermost hidden or system folder with a final slash, the hidden or system file name, or None.
    """
    parts = PurePosixPath(name).parts
    for i, part in enumerate(parts, start=1):
        if part.startswith(".") or part in SYSTEM_FOLDERS or part.lower() in SYSTEM_FILES:
            return part if i == len(parts) else f"{part}/"
    return None


def _is_file_below(link: Path, root: Path) -> bool:
    return link.is_file() and link.resolve().is_relative_to(root)


def _open_folder(path: Path, texts: Collection[str], wanted: Collection[str] | None) -> Source:
    root = path.resolve()
    sizes = {}

    def is_used(name: str) -> bool:
        if wanted is None:
            return ignored_part(name) is None
        return name in wanted or any(file.startswith(f"{name}/") for file in wanted)

    def refuse(error: OSError) -> None:
        if is_used(Path(error.filename).relative_to(root).as_posix()):
            raise PreparationError(
                f"{error.filename} cannot be read ({error.strerror}); change its permissions or remove it"
            )

    for folder, folders, files in os.walk(root, onerror=refuse):
        for entry in [*folders, *files]:
            place = Path(folder) / entry
            name = place.relative_to(root).as_posix()
            if not place.is_symlink() or _is_file_below(place, root):
                if not place.is_dir():
                    sizes[name] = place.stat().st_size
            elif is_used(name):
                raise PreparationError(
                    f"{place} is {_link_kind(place, path)}; replace the link with a copy of its target"
                )
    source = _source(root, "folder", dict(sorted(sizes.items())), wanted)
    return replace(source, texts=dict(read_files(source, _with_name(source.files, texts))))


def _link_kind(link: Path, path: Path) -> str:
    if not link.exists():
        return "a broken link"
    return "a link to a folder" if link.is_dir() else f"a link to a file outside of {path}"


def _open_zip(path: Path, texts: Collection[str]) -> Source:
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _checked_name(path, member.filename)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise PreparationError(f"{path}: member {name} is a link or a device; {UNSAFE}")
            if member.flag_bits & 1:
                raise PreparationError(
                    f"{path}: member {name} is encrypted; unpack the archive and pass its folder as --source"
                )
            if not member.is_dir():
                _add(path, sizes, name, member.file_size)
    _check_ratio(path, sum(sizes.values()))
    source = _source(path, "zip", sizes)
    return replace(source, texts=dict(read_files(source, _with_name(source.files, texts))))


def _open_tgz(path: Path, texts: Collection[str]) -> Source:
    sizes: dict[str, int] = {}
    found = {}
    for member, file in tqdm(_tgz_members(path), desc="listing the archive", unit="files", mininterval=1):
        if file:
            _add(path, sizes, member.name, member.size)
            if PurePosixPath(member.name).name in texts:
                found[member.name] = file.read()
    return replace(_source(path, "tgz", sizes), texts=found)


def _tgz_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield each member with its checked name and its open file (None for folders), in one pass over the archive."""
    with gzip.GzipFile(path) as unpacked:
        stream: Any = _LimitedReader(path, unpacked)
        archive = tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK)  # noqa: SIM115, closing it would close nothing
        for member in archive:
            member.name = _checked_name(path, member.name)
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise PreparationError(f"{path}: member {member.name} is a link, a device or a sparse file; {UNSAFE}")
            _check_size(path, member.name, member.size)
            yield member, archive.extractfile(member)
        while stream.read(CHUNK):  # gzip checks its checksum at the end of the file
            pass


class _LimitedReader:
    """Reader of a gzip file that refuses to unpack more than the limit."""

    def __init__(self, path: Path, file: gzip.GzipFile) -> None:
        self.path, self.file, self.bytes = path, file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.bytes += len(data)
        _check_ratio(self.path, self.bytes)
        return data


def _checked_name(path: Path, name: str) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in "".join(parts[:1]):
        raise PreparationError(f"{path}: member {name!r} has a path outside of the archive; {UNSAFE}")
    return PurePosixPath(name).as_posix()


def _add(path: Path, sizes: dict[str, int], name: str, size: int) -> None:
    if name in sizes:
        raise PreparationError(f"{path}: member {name} occurs twice; {UNSAFE}")
    sizes[name] = size


def _check_ratio(path: Path, unpacked: int) -> None:
    packed = path.stat().st_size
    if unpacked > max(FREE_BYTES, MAX_RATIO * packed):
        raise PreparationError(
            f"{path} is a decompression bomb: its {packed:,} bytes unpack to {unpacked:,} or more; do not use it"
        )


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise PreparationError(
            f"{path}: {name} is too large: got {size:,} bytes; files of at most {MAX_FILE_BYTES:,} bytes are read"
        )


def _with_name(files: Iterable[str], names: Collection[str]) -> list[str]:
    return [file for file in files if PurePosixPath(file).name in names]


def _source(path: Path, kind: str, sizes: dict[str, int], wanted: Collection[str] | None = None) -> Source:
    ignored = {name: part for name in sizes.keys() - set(wanted or ()) if (part := ignored_part(name))}
    files = {name: size for name, size in sizes.items() if name not in ignored}
    return Source(path, kind, files, {}, dict(sorted(Counter(ignored.values()).items())))
