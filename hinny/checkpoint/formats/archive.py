"""The zip archive that a file of torch.save is, looked at before anything reads it.

torch.save writes plain members, none compressed, one behind the other, under one root. An archive that is anything else
was damaged or made to harm, and is refused: a few bytes that unpack to gigabytes, names that lead out of the archive,
members that share their bytes.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

from hinny.checkpoint.formats.files import listed
from hinny.errors import CheckpointError

LARGEST_PICKLE = 64 * 2**20
"""Bytes of data.pkl. That of an 8B model has a tenth of one MiB; reading takes many times its size of memory."""

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch.save before 1.6 begins: a pickled number."""


def read_pickle(file: Path, content: io.BytesIO | None = None) -> bytes:
    """data.pkl of `file`, whose directory is found to describe plain, whole, separate members.

    content: the archive, where it is a piece of `file`. Raises CheckpointError for anything else.
    """
    try:
        with zipfile.ZipFile(content or file) as archive:
            members = archive.infolist()
            _check_members(file, members, archive.start_dir)
            root = members[0].filename.split("/")[0]
            names = {member.filename for member in members}
            if f"{root}/constants.pkl" in names:
                raise CheckpointError(f"{file} is a TorchScript archive: it holds a program. Save the weights alone, "
                                      "with torch.save(model.state_dict(), …).")
            if f"{root}/data.pkl" not in names:
                raise CheckpointError(f"{file} is a zip archive, but not one of torch.save: it has no data.pkl. "
                                      f"It holds {listed(sorted(names))}.")
            if (size := archive.getinfo(f"{root}/data.pkl").file_size) > LARGEST_PICKLE:
                raise CheckpointError(f"{file}: its data.pkl has {size:,} bytes; at most {LARGEST_PICKLE:,} are read. "
                                      "Save the weights in a file of their own.")
            return archive.read(f"{root}/data.pkl")
    except OSError as fault:
        raise CheckpointError(f"{file} cannot be read: {fault.strerror or fault}.") from None
    # what a wrong directory makes the library do: seek before the start or behind the end, ask for a password
    except (zipfile.BadZipFile, ValueError, RuntimeError, IndexError, EOFError) as fault:
        raise CheckpointError(f"{file} {_no_archive(file, fault)}") from None


def _check_members(file: Path, members: list[zipfile.ZipInfo], directory: int) -> None:
    end, seen = 0, set()
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename
        path = PurePosixPath(name)
        # torch reads records by name and never unpacks them; a name like this shows that the file means harm
        if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(member.orig_filename):
            raise CheckpointError(f"{file}: the archive's member {name!r} leads out of it. Do not use this file: "
                                  "torch.save writes no such names.")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(f"{file}: the archive's member {name!r} is compressed, {member.compress_size:,} "
                                  f"bytes that claim to be {member.file_size:,}. torch.save compresses nothing, "
                                  "and what unpacks to any size is not read. Do not use this file.")
        if name in seen or member.header_offset < end:
            how = "is there twice" if name in seen else "overlaps the one before it"
            raise CheckpointError(f"{file}: the archive's member {name!r} {how}. Do not use this file: torch.save "
                                  "writes no such archives.")
        seen.add(name)
        # 30 bytes of header, the name, and at least no more fields
        end = member.header_offset + 30 + len(member.orig_filename.encode()) + member.file_size
    if end > directory:
        raise CheckpointError(f"{file}: the archive's last member is longer than the archive; the file is damaged. "
                              "Copy it again.")


def _no_archive(file: Path, fault: Exception) -> str:
    with open(file, "rb") as handle:
        start = handle.read(len(LEGACY))
    if start == LEGACY:
        return ("is in the format that torch.save had before PyTorch 1.6, which is not read. Where you trust it, open "
                "it with torch.load(…, weights_only=True) and save it again with torch.save.")
    if start.startswith(b"PK\3\4"):
        return f"is cut short or damaged: {first_line(fault)}. Copy it again."
    return "is not a file of torch.save: it is no zip archive."


def first_line(fault: BaseException) -> str:
    """What `fault` says, short enough for an error."""
    return str(fault).strip().split("\n")[0].rstrip(".")[:300] or type(fault).__name__
