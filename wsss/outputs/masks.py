"""A folder of masks, overlays and maps, shared by all commands that make masks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from wsss import InputError
from wsss.report.pictures import overlay
from wsss.writing import write_mask, write_whole


class MaskFolder:
    """`masks/<name>.png` and, on request, `overlays/<name>.jpg` and `cams/<name>.npz`, each whole or absent.

    Names are relative paths without suffix. Several processes may write to one folder, and a file that is there is
    written again.

    Args:
        out: the folder; made where it is missing.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.masks, self.overlays, self.cams = (out / kind for kind in ("masks", "overlays", "cams"))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out={out} cannot be made a folder ({error.strerror}): give another one") from error

    def write(
        self,
        name: str,
        mask: np.ndarray,
        image: np.ndarray | None = None,
        cams: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            name: of the image.
            mask: ids, uint8 (H, W).
            image: uint8 (H, W, 3), where an overlay is wanted.
            cams: where they are wanted, maps (H, W) in [0, 1] by id; in the file `cam` (n, H, W) float16, `ids` (n,).
        """
        write_mask(self.masks / f"{name}.png", mask)
        if image is not None:
            with write_whole(self.overlays / f"{name}.jpg") as file:
                Image.fromarray(overlay(image, mask)).save(file, format="JPEG", quality=90)
        if cams is not None:
            maps = np.array(list(cams.values()), np.float16).reshape(-1, *mask.shape)
            with write_whole(self.cams / f"{name}.npz") as file:
                np.savez_compressed(file, cam=maps, ids=np.array(list(cams), np.int64))


def output_names(paths: Iterable[Path]) -> list[str]:
    """Relative paths without suffix; files that differ in their suffix alone keep it."""
    paths = list(paths)
    stems = Counter(path.with_suffix("") for path in paths)
    return [str(path if stems[path.with_suffix("")] > 1 else path.with_suffix("")) for path in paths]
