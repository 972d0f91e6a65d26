"""Session zips of NACC: listed where they are, and one series of them unpacked, never outside its folder.

A zip is refused whole if one of its members could land elsewhere (absolute names, `..`, drive letters, links), is
encrypted or is there twice. What is unpacked is written under a temporary name and renamed, so that it is whole or
absent; a second run finds it and leaves it.
"""

import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MAX_SERIES_BYTES = 4 * 2**30


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip whose members all stay below one folder.

    Raises:
        ValueError: it cannot be read or has such a member; the message names zip and member.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile has a dozen types for a damaged file
        raise ValueError(f"{path}: not a whole zip ({type(error).__name__}: {error}); download it again") from error
    names = set()
    for member in archive.infolist():
        fault = _why_unsafe(member)
        if member.filename in names:
            fault = "is there twice"
        names.add(member.filename)
        if fault:
            archive.close()
            raise ValueError(f"{path}: its member {member.filename!r} {fault}; the zip is not opened")
    return archive


def _why_unsafe(member: zipfile.ZipInfo) -> str:
    name = member.filename
    mode = stat.S_IFMT(member.external_attr >> 16)
    if re.match(r"[\\/]|[A-Za-z]:", name):
        return "has an absolute name"
    if ".." in re.split(r"[\\/]", name):
        return "leads out of the folder (..)"
    if "\\" in name or not name.isprintable():
        return "has a name with backslashes or control characters"
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    return ""


def first_bytes(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """The first `size` bytes of a member, or all of a shorter one.

    Raises:
        ValueError: the member is damaged.
    """
    data = b""
    for chunk in _chunks(archive, archive.getinfo(name), size):
        data += chunk
        if len(data) >= size:
            break
    return data[:size]


def _chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int = 2**20) -> Iterator[bytes]:
    # zipfile gives out no more than the size the member is listed with, and checks its CRC at the end.
    try:
        with archive.open(member) as file:
            while chunk := file.read(size):
                yield chunk
    except Exception as error:  # zipfile, zlib, bz2 and lzma have a dozen types for a damaged member
        raise ValueError(
            f"{archive.filename}: {member.filename!r} cannot be unpacked ({type(error).__name__}: {error}); "
            "download the zip again"
        ) from error


def unpack(path: Path, names: tuple[str, ...], target: Path, is_folder: bool) -> None:
    """Writes one member as the file `target`, or several as the folder `target`, unless it is there from this zip.

    Raises:
        ValueError: the zip is broken or unsafe, or the series larger than 4 GiB; nothing is left of it.
    """
    with open_zip(path) as archive:
        members = [archive.getinfo(name) for name in names]
        if _is_there(path, members, target, is_folder):
            return
        size = sum(member.file_size for member in members)
        if size > MAX_SERIES_BYTES:
            raise ValueError(f"{path}: {names[0]!r} and its series are {size / 2**30:.1f} GiB, more than 4: no T1")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            if is_folder:
                temporary.mkdir()
                for member in members:
                    _write(archive, member, temporary / PurePosixPath(member.filename).name)
                shutil.rmtree(target, ignore_errors=True)
            else:
                _write(archive, members[0], temporary)
            temporary.replace(target)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    with open(path, "wb") as file:
        for chunk in _chunks(archive, member):
            file.write(chunk)


def _is_there(path: Path, members: list[zipfile.ZipInfo], target: Path, is_folder: bool) -> bool:
    # Renamed into place, so it is whole; a zip that was downloaded again is younger.
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        return False
    if is_folder:
        return {entry.name for entry in os.scandir(target)} == {PurePosixPath(m.filename).name for m in members}
    return target.stat().st_size == members[0].file_size
