"""The packages that the sample is made from: exact versions with the checksums that their registries state.

Each is downloaded once into a folder and verified whenever it is opened. The npm registry is the configured one
(npm_config_registry, as npm sets it), the Debian mirror is DEBIAN_MIRROR; both have public defaults.
"""

import base64
import contextlib
import csv
import gzip
import hashlib
import http.client
import io
import lzma
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.atomic import new_file
from data_pipelines.errors import UserError

_NPM = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")
_DEBIAN = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian").rstrip("/")
_LIST = Path(__file__).with_name("packages.tsv")
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """One archive. licence: an SPDX identifier; sha512: base64, as npm writes it."""

    name: str
    version: str
    licence: str
    sha512: str

    @property
    def url(self) -> str:
        if self.name == "openclipart-svg":
            return f"{_DEBIAN}/pool/main/o/openclipart/{self.name}_{self.version}_all.deb"
        return f"{_NPM}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def file_name(self) -> str:
        return f"{self.name.replace('/', '+')}-{self.version}{self.url[-4:]}"


def _read_list() -> dict[str, Package]:
    with _LIST.open(encoding="utf-8") as file:
        return {row["name"]: Package(**row) for row in csv.DictReader(file, delimiter="\t")}


PACKAGES = _read_list()


@contextlib.contextmanager
def opened(name: str, folder: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package, which is downloaded to `folder` if it is not there.

    Raises:
      UserError: the registry does not have it, or what lies in the folder is another file.
    """
    package = PACKAGES[name]
    path = folder / package.file_name
    if not path.exists():
        _download(package, path)
    data = path.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        raise UserError(f"{path} is not {name} {package.version} (another sha512); delete it and run this again")
    # Decompressed at once: files are read in another order than theirs.
    data = lzma.decompress(_data_of_deb(data)) if path.suffix == ".deb" else gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        yield files


def _download(package: Package, path: Path) -> None:
    try:
        with urllib.request.urlopen(package.url, timeout=120) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{package.name} {package.version} cannot be fetched from {package.url} ({error}); try again, put the file "
            f"into {path} from another mirror, or pin another version in {_LIST} and remake every file of the sample"
        ) from error
    with new_file(path) as partial:
        partial.write_bytes(data)


def _data_of_deb(archive: bytes) -> bytes:
    """The member data.tar.xz of a Debian package, an `ar` archive."""
    at = len(_AR_MAGIC)
    while at < len(archive):
        header = archive[at : at + _AR_HEADER]
        size, at = int(header[48:58]), at + _AR_HEADER
        if header.startswith(b"data.tar"):
            return archive[at : at + size]
        at += size + size % 2
    raise UserError("a Debian package without data.tar; delete it and run this again")
