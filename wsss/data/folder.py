"""Folders of photographs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from wsss import InputError
from wsss.data.datamodule import Normalise
from wsss.data.files import read_image


class Photographs(Dataset[tuple[Any, Any]]):
    """Images as read (H, W, 3) and normalised (3, H, W); for one that cannot be read, the reason in their place."""

    def __init__(self, paths: list[Path], mean: Sequence[float], std: Sequence[float]) -> None:
        self.paths, self.normalise = paths, Normalise(mean, std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            image = read_image(self.paths[index])
        except InputError as error:
            return str(error), None
        return image, self.normalise(image)


def find_images(folder: Path) -> dict[Path, Path]:
    """Relative path -> path of every image below a folder, in order."""
    if not folder.is_dir():
        raise InputError(f"images={folder} is not a folder: give the folder of your photographs")
    suffixes = set(Image.registered_extensions())
    found = {
        p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes and p.is_file()
    }
    if not found:
        raise InputError(f"images={folder} holds no image: expected files such as .jpg, .png, .webp or .tif")
    return found
