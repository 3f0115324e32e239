"""Files that are whole or not there: atomic writes, downloads checked by their sha256."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FetchError(RuntimeError):
    """A download failed for good; the message says why and what to try. Nothing half-written is left."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends well, it becomes `path` in one step.

    An exception or a kill inside the block leaves the old file as it was. Missing parent folders are made.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_write(folder / "note.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "note.txt").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Without fsync a power cut after the rename can leave an empty file under the good name.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a shared course folder needs the usual mode.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def shipped(name: str) -> Path:
    """The folder of data/ called `name`: beside the package in a checkout, inside it once installed."""
    inside = Path(__file__).parent / "shipped" / name
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "data" / name


def cache_folder() -> Path:
    """Where downloads are kept: LORA_LAB_CACHE, else the system's cache folder."""
    if os.environ.get("LORA_LAB_CACHE"):
        return Path(os.environ["LORA_LAB_CACHE"])
    import pooch

    return Path(pooch.os_cache("lora-lab"))


def fetch(url: str, sha256: str, folder: str | os.PathLike | None = None, retries: int = 3) -> Path:
    """Download `url` once, check its sha256, and return the path of the local copy.

    A copy in `folder` (by default `cache_folder()`) that has the right checksum is used without asking the network; one that has not is
    fetched again. `retries` further attempts, with a growing pause, cover dropped connections, HTTP 429 and 5xx. Raises FetchError.
    """
    import pooch
    import requests

    folder = Path(folder) if folder is not None else cache_folder()
    name = url.partition("?")[0].rpartition("/")[2] or "download"
    http = pooch.HTTPDownloader(timeout=30)

    def download(url, output, stock):
        try:
            http(url, output, stock)
        except requests.HTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):  # pooch would ask again; "not found" stays not found
                raise FetchError(f"{url} answered {status}. A copy placed at {target} is used without the network") from error
            raise

    known = f"sha256:{sha256}"
    target = folder / name
    if target.exists() and pooch.file_hash(str(target)) == sha256.lower():
        return target
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # its notes on retries read like failures in a notebook
    try:
        stock = pooch.create(
            path=folder, base_url="", registry={name: known}, urls={name: url}, retry_if_failed=retries
        )
        return Path(stock.fetch(name, downloader=download))
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        advice = (
            "The server limits requests per address, and a class shares one: wait a few minutes, or copy the file from a neighbour"
            if status == 429
            else "Try again later"
        )
        raise FetchError(f"{url} answered {status}. {advice}; a copy placed at {target} is used without the network") from error
    except requests.RequestException as error:
        raise FetchError(
            f"could not reach {url} ({type(error).__name__}). Without a network, copy the file by hand to {target}"
        ) from error
    except ValueError as error:
        raise FetchError(
            f"what {url} sent does not have the expected sha256 {sha256[:12]}…, so it was thrown away: "
            "a proxy's login page, a broken download, or a file that changed at its source"
        ) from error
    except OSError as error:
        raise FetchError(f"could not write {target}: {error.strerror or error}. Free some space or set LORA_LAB_CACHE") from error
    finally:
        logger.setLevel(level)
