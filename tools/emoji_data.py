"""The pictures and captions that the small checkpoints learn from: three public emoji sets, read from npm packages."""

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

PICTURE_SIZE = 64

GOOGLE = "emoji-datasource-google@16.0.0"
TWITTER = "emoji-datasource-twitter@16.0.0"
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"


class DataError(Exception):
    """The packages are missing, cannot be fetched, or do not hold what is expected of them."""


@dataclass(frozen=True)
class EmojiData:
    """Pictures as bytes, [count, 3, size, size], and the caption of each."""

    pictures: torch.Tensor
    captions: list[str]


def archive_name(package: str) -> str:
    """The file that `npm pack` writes: a scope's name is joined to the package's with a dash."""
    name, version = package.rsplit("@", 1)
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch_packages(folder: Path) -> None:
    """Download the packages that `folder` does not hold yet, with the machine's own npm client."""
    missing = [package for package in (GOOGLE, TWITTER, FLUENT) if not (folder / archive_name(package)).is_file()]
    if not missing:
        return
    client = shutil.which("npm")
    if client is None:
        raise DataError(f"{folder} lacks {archive_name(missing[0])}, and there is no npm here to fetch it with")
    folder.mkdir(parents=True, exist_ok=True)
    for package in missing:
        command = [client, "pack", "--silent", package]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (folder / archive_name(package)).is_file():
            reason = (done.stderr.strip() or "no archive was written").splitlines()[0]
            raise DataError(f"npm pack {package} failed: {reason}")


def load_emoji(folder: Path, size: int = PICTURE_SIZE) -> EmojiData:
    """Read every base emoji of the three sets, `size` pixels wide and high.

    Skin tones are left out, for they repeat one picture five times. Noto and Twemoji come in 64 pixels and are enlarged
    where more are asked for; Fluent comes in 256.
    """
    pictures: list[np.ndarray] = []
    captions: list[str] = []

    def add(picture: IO[bytes], name: str, style: str) -> None:
        pictures.append(compose_on_white(picture, size))
        captions.append(f"{name.lower()}, {style}")

    records: list[dict[str, str]] = []
    for package, key, style in ((GOOGLE, "google", "noto"), (TWITTER, "twitter", "twemoji")):
        files = read_archive(folder / archive_name(package), ("package/emoji.json", f"package/img/{key}/64/"))
        records = json.load(io.BytesIO(files["package/emoji.json"]))
        for record in records:
            content = files.get(f"package/img/{key}/64/{record['image']}")
            if content is not None:
                add(io.BytesIO(content), record["name"], style)

    # The Fluent set has no names of its own: its files are named by code points, which the records above give.
    names = {plain_code(record["unified"]): record["name"] for record in records}
    for path, content in sorted(read_archive(folder / archive_name(FLUENT), ("package/assets/",)).items()):
        name = names.pop(plain_code(Path(path).stem), None)
        if name is not None:
            add(io.BytesIO(content), name, "fluent 3d")

    if not pictures:
        raise DataError(f"{folder} holds no emoji pictures")
    return EmojiData(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), captions)


def plain_code(code: str) -> str:
    """Code points in lower case, without variation selectors or leading zeros: sets differ in how they write them."""
    points = (point.lstrip("0") for point in code.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def read_archive(path: Path, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files of a package. They are read in memory, so nothing in an archive can be written anywhere."""
    try:
        with tarfile.open(path) as archive:
            found: dict[str, bytes] = {}
            for member in archive:
                content = archive.extractfile(member) if member.name.startswith(prefixes) else None
                if content is not None:
                    found[member.name] = content.read()
            return found
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def compose_on_white(picture: IO[bytes], size: int = PICTURE_SIZE) -> np.ndarray:
    """One picture as [size, size, 3] bytes, its transparent parts white."""
    image = Image.open(picture).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
