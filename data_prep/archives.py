"""Reading an original archive, or its extracted folder, without unpacking it to disk and without trusting it.

Refused, before anything is decoded: a member whose path leaves the folder, links and devices, two members of one name,
encrypted members, an archive that unpacks to more than MAX_RATIO times its size, and one that ends too early.
Hidden files, hidden folders and what operating systems and tools leave behind (`system_part`) are ignored and counted.
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
from data_prep.prepared import PreparationError

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
MAX_RATIO = 100  # unpacked to packed bytes; the originals have about 1
FREE_BYTES = 2**26  # below this, an archive may have any ratio
MAX_FILE_BYTES = 2**27  # of a file that is read into memory
CHUNK = 2**20
DAMAGED = (EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """A folder or an archive: `files` maps names below `prefix` to sizes in bytes; `texts` are the files asked for.

    `ignored` counts the ignored files: by name, or by the hidden or system folder (with a slash) that holds them.
    """

    path: Path
    kind: str  # folder, zip or tgz
    files: dict[str, int]
    texts: dict[str, bytes]
    ignored: dict[str, int]
    prefix: str = ""

    def below(self, anchor: str) -> "Source":
        """The same source seen from the folder that holds `anchor` (a file, or a folder with its slash)."""
        places = [name for name in self.files if name.startswith(anchor) or f"/{anchor}" in name]
        if not places:
            raise PreparationError(
                f"{self.path} holds no {anchor}: it is not the original archive or its extracted folder"
            )
        prefix = min((f"/{name}".partition(f"/{anchor}")[0] for name in places), key=len)[1:]
        prefix += "/" if prefix else ""

        def inside(files: dict) -> dict:
            return {name.removeprefix(prefix): v for name, v in files.items() if name.startswith(prefix)}

        return replace(self, files=inside(self.files), texts=inside(self.texts), prefix=prefix)

    def text(self, name: str) -> str:
        """One of the text files asked for."""
        if name not in self.texts:
            raise PreparationError(f"{self.path} lacks {self.prefix}{name}; get the original again")
        return self.texts[name].decode("utf-8", errors="replace")


def open_source(path: Path, texts: Collection[str] = (), wanted: Collection[str] | None = None) -> Source:
    """List a folder, a zip or a gzipped tar archive, and read its files that have one of the names `texts`.

    `wanted` names the files of a folder that will be read, where that is known: none of them is ignored, and links
    elsewhere do not matter.
    """
    path = Path(path)
    if not path.exists():
        raise PreparationError(f"--source {path} does not exist")
    if path.is_dir():
        return _open_folder(path, texts, wanted)
    with open(path, "rb") as file:
        start = file.read(4)
    with refusing_damage(path):
        if start[:2] == b"PK":
            return _open_zip(path, texts)
        if start[:2] == b"\x1f\x8b":
            return _open_tgz(path, texts)
    raise PreparationError(f"{path} is neither a folder nor a zip or tgz archive")


def read(source: Source, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Each named file with its bytes: in the order of `names`, or for a tgz in the archive's own."""
    with refusing_damage(source.path):
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


def table(source: Source, name: str, columns: int, numbers: Collection[int], header: bool = False) -> list[list[str]]:
    """The lines of one of the text files, split at blanks; PreparationError names a line of another form."""
    lines = [line for line in source.text(name).splitlines() if line.strip()]
    rows = [line.split() for line in lines[int(header) :]]
    for row in rows:
        if len(row) != columns or not all(row[i].isdigit() for i in numbers):
            raise PreparationError(f"{source.path}: {name} has the line {' '.join(row)!r}; get the original again")
    return rows


def extract(source: Source, name: str, folder: Path) -> Path:
    """Where a file of the source can be opened by its path: of an archive, a copy in `folder`."""
    if source.kind == "folder":
        return source.path / source.prefix / name
    target = folder / PurePosixPath(name).name
    with refusing_damage(source.path), zipfile.ZipFile(source.path) as archive:
        size = source.files[name]
        bar = tqdm(total=size, desc=f"unpacking {target.name}", unit="B", unit_scale=True, mininterval=1)
        with archive.open(source.prefix + name) as packed, open(target, "wb") as file, bar:
            while chunk := packed.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return target


def verify(path: Path, original: Original, any_checksum: bool) -> dict:
    """What the card says of the source; PreparationError where an archive is not the published one."""
    path = Path(path)
    if not path.exists():
        raise PreparationError(f"--source {path} does not exist")
    if path.is_dir():
        return {"kind": "extracted folder", "checksum": "an extracted folder has none; its counts were checked"}
    size = path.stat().st_size
    digests = _digests(path, size)
    problems = [] if original.size in (None, size) else [f"{size:,} bytes instead of {original.size:,}"]
    for algorithm, expected in original.checksums().items():
        if digests[algorithm] != expected:
            problems.append(f"{algorithm} {digests[algorithm]} instead of {expected}")
    if problems and not any_checksum:
        raise PreparationError(
            f"{path} is not the published {original.file}: {', '.join(problems)}; download it again, or pass "
            "--any-checksum if you know why it differs"
        )
    known = {"kind": "archive", "file": path.name, "bytes": size, **digests}
    return {**known, "checksum": "overridden by --any-checksum" if problems else "as published"}


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
def refusing_damage(path: Path) -> Iterator[None]:
    """Name the archive where its reader meets damage."""
    try:
        yield
    except DAMAGED as error:
        raise PreparationError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error


def system_part(name: str) -> str | None:
    """The outermost hidden or system folder of a path, with a slash, or its hidden or system file; None without any."""
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
            return system_part(name) is None
        return name in wanted or any(file.startswith(f"{name}/") for file in wanted)

    def refuse(error: OSError) -> None:
        if is_used(Path(error.filename).relative_to(root).as_posix()):
            raise PreparationError(f"{error.filename} cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=refuse):
        for entry in [*folders, *files]:
            place = Path(folder) / entry
            name = place.relative_to(root).as_posix()
            if not place.is_symlink() or _is_file_below(place, root):
                if not place.is_dir():
                    sizes[name] = place.stat().st_size
            elif is_used(name):
                raise PreparationError(
                    f"{place} is a link to a folder, to nothing or out of {path}; put the files themselves there"
                )
    source = _source(root, "folder", dict(sorted(sizes.items())), wanted)
    return replace(source, texts=dict(read(source, _of_name(source.files, texts))))


def _open_zip(path: Path, texts: Collection[str]) -> Source:
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _checked_name(path, member.filename)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise PreparationError(
                    f"{path}: member {name} is a link or a device; no original has any: do not use it"
                )
            if member.flag_bits & 1:
                raise PreparationError(f"{path}: member {name} is encrypted; unpack the archive and give its folder")
            if not member.is_dir():
                _add(path, sizes, name, member.file_size)
    _check_ratio(path, sum(sizes.values()))
    source = _source(path, "zip", sizes)
    return replace(source, texts=dict(read(source, _of_name(source.files, texts))))


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
    """Each member with its checked name and, if it is a file, what reads it; in one pass over the archive."""
    with gzip.GzipFile(path) as unpacked:
        stream: Any = _Measured(path, unpacked)
        archive = tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK)  # noqa: SIM115, it holds nothing to close
        for member in archive:
            member.name = _checked_name(path, member.name)
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise PreparationError(
                    f"{path}: member {member.name} is a link, a device or sparse; no original has any: do not use it"
                )
            _check_size(path, member.name, member.size)
            yield member, archive.extractfile(member)
        while stream.read(CHUNK):  # to the end, where gzip keeps its checksum
            pass


class _Measured:
    """The unpacked bytes of an archive, up to the limit."""

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
        raise PreparationError(f"{path}: member {name!r} leads out of the folder; no original has any: do not use it")
    return PurePosixPath(name).as_posix()


def _add(path: Path, sizes: dict[str, int], name: str, size: int) -> None:
    if name in sizes:
        raise PreparationError(f"{path}: member {name} is there twice; no original has any: do not use it")
    sizes[name] = size


def _check_ratio(path: Path, unpacked: int) -> None:
    packed = path.stat().st_size
    if unpacked > max(FREE_BYTES, MAX_RATIO * packed):
        raise PreparationError(
            f"{path} has {packed:,} bytes and unpacks to {unpacked:,} or more: a decompression bomb; do not use it"
        )


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise PreparationError(
            f"{path}: {name} has {size:,} bytes, a decompression bomb or no image (at most {MAX_FILE_BYTES:,} are read)"
        )


def _of_name(files: Iterable[str], names: Collection[str]) -> list[str]:
    return [file for file in files if PurePosixPath(file).name in names]


def _source(path: Path, kind: str, sizes: dict[str, int], wanted: Collection[str] | None = None) -> Source:
    ignored = {name: part for name in sizes.keys() - set(wanted or ()) if (part := system_part(name))}
    files = {name: size for name, size in sizes.items() if name not in ignored}
    return Source(path, kind, files, {}, dict(sorted(Counter(ignored.values()).items())))
