"""Folders and small files that are always either complete or absent."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from calm_jax.errors import CalmError
from calm_jax.text_files import parse_json

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def whole_folder(target: epath.PathLike) -> Iterator[epath.Path]:
    """A new folder at `target` that appears when the block ends without an error.

    The block writes to a temporary folder next to `target`, which is then renamed. A bucket has no
    rename: there the block writes to `target` itself, and its last file must be one without which
    the folder cannot be read.

    Raises:
        CalmError: `target` exists, or cannot be written.
    """
    target = absolute(target)
    with storage("read", target):
        if target.exists():
            raise CalmError(f"{target} exists; give another path or remove it")
    temporary = (
        target if is_bucket(target) else target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    )
    try:
        with storage("write", target):
            temporary.mkdir(parents=True)
            yield temporary
            if temporary != target:
                temporary.rename(target)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            temporary.rmtree()
        raise


def check_writable(folder: epath.PathLike) -> None:
    """Raises `CalmError` unless files can be written in a folder, which need not exist yet.

    Leaves nothing behind. A bucket is not checked: its first write fails.
    """
    folder = absolute(folder)
    if is_bucket(folder):
        return
    with storage("write", folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a temporary file, then renames it: a reader finds either the old or the new file.

    Raises `CalmError` if it cannot be written.
    """
    path = absolute(path)
    # A byte-level model may produce half a character, which is written as an escape sequence.
    data = text.encode("utf-8", errors="backslashreplace")
    with storage("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_bucket(path):  # a bucket's object appears only when it is complete
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: epath.Path, what: str) -> dict[str, Any]:
    """Reads a JSON object. Raises `CalmError` saying that the folder is not `what`."""
    try:
        with storage("read", path, but=(FileNotFoundError, NotADirectoryError)):
            text = path.read_bytes()
    except FileNotFoundError:
        raise CalmError(f"{path.parent} is not {what}: {_why_missing(path)}") from None
    except NotADirectoryError:
        raise CalmError(f"{path.parent} is not {what}: it is a file") from None
    try:
        values = parse_json(text, path)
    except CalmError:
        refuse_lfs_pointer(path)
        raise
    if not isinstance(values, dict):
        raise CalmError(f"{path} is damaged: it is not a JSON object")
    return values


def does_not_exist(path: epath.Path) -> str:
    """A message about a missing path, with the command to get it if it looks like a hub's model."""
    told = "it does not exist"
    if not is_bucket(path) and path.is_relative_to(os.getcwd()):
        name = os.path.relpath(path)
        if name.count("/") == 1 and not path.parent.exists():
            told += (
                f"; if {name} is the name of a model on Hugging Face's hub, download it first: "
                f"hf download {name} --local-dir {path.name}"
            )
    return told


def refuse_lfs_pointer(path: epath.Path) -> None:
    """Raises `CalmError` if `path` holds a Git LFS pointer instead of the file itself."""
    with storage("read", path), path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise CalmError(
            f"{path} is a Git LFS pointer, not the file itself; download that with git lfs pull"
        )


def _why_missing(path: epath.Path) -> str:
    folder = path.parent
    with storage("read", folder):
        if not folder.exists():
            return does_not_exist(folder)
        if (folder / ADAPTER_CONFIG).exists():
            return "it is an adapter; calm convert --source=BASE --adapter=DIR merges it"
    return f"{path.name} is missing"


def read_bytes(path: epath.Path) -> bytes:
    """Reads a file. Raises `CalmError` if it is missing or cannot be read."""
    with storage("read", path):
        return path.read_bytes()


def read_field(values: Mapping[str, Any], key: str, path: epath.Path) -> Any:
    """`values[key]`, or a `CalmError` that names the file and the key."""
    if key not in values:
        raise CalmError(f"{path} is damaged: it has no {key!r}")
    return values[key]


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path. Orbax would reject a relative path late, in an unrelated place.

    Raises `CalmError` if it is neither on a disk nor in a bucket.
    """
    scheme, found, _ = os.fspath(path).partition("://")
    if found and scheme != "gs":
        raise CalmError(f"{os.fspath(path)} is neither on a disk nor in a gs:// bucket")
    path = epath.Path(path).expanduser()
    return path if is_bucket(path) else epath.Path(os.path.abspath(path))


def is_bucket(path: epath.PathLike) -> bool:
    """Whether the path is on an object store, which has no rename."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def storage(
    action: str,
    path: epath.PathLike,
    *,
    but: tuple[type[Exception], ...] = (),
    failure: type[CalmError] = CalmError,
) -> Iterator[None]:
    """Turns the errors of a disk or a bucket in the block, except `but`, into a `failure`."""
    try:
        yield
    except Exception as error:
        # TensorFlow reads buckets and raises its own kinds of errors.
        if isinstance(error, but) or not (
            isinstance(error, OSError) or type(error).__module__.startswith("tensorflow.")
        ):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise failure(f"cannot {action} {path}: {reason}") from error


@contextlib.contextmanager
def explained(
    told: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Turns a library's errors of these kinds in the block into a `CalmError` that starts so."""
    try:
        yield
    except CalmError:
        raise
    except kinds as error:
        raise CalmError(f"{told}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The message of a library's error without the listings that follow it."""
    lines = str(error).partition(" [tensorstore_spec")[0].strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
