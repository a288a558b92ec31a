"""PNGs of ids: a folder that says its classes, and the archive that VOC's server takes."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from wsss.outputs.masks import MaskFolder
from wsss.outputs.regions import Labelled
from wsss.writing import palette, write_lines, write_mask, write_whole

RESULTS = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where VOC's server looks for the masks of who has trained with data of his own, or with other labels than VOC's."""


def write_png(out: Path, items: Iterable[Labelled], classes: Sequence[str]) -> None:
    """`masks/<name>.png` in VOC's palette, masks/class_names.txt, and labelmap.txt with the colours of the classes."""
    folder = MaskFolder(out)
    for item in items:
        write_mask(folder.masks / f"{item.name}.png", item.mask)
    folder.write_classes(classes)
    colours = [",".join(map(str, colour)) for colour in palette()[[*range(len(classes) + 1), 255]].tolist()]
    names = ["background", *classes, "ignore"]
    rows = [f"{name}:{colour}::" for name, colour in zip(names, colours, strict=True)]
    write_lines(out / "labelmap.txt", ["# label:color_rgb:parts:actions", *rows])


def write_voc_test(out: Path, items: Iterable[Labelled], classes: Sequence[str]) -> None:
    """A tar of results/VOC2012/Segmentation/comp6_test_cls/<name>.png, byte-equal for equal masks."""
    with write_whole(out) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for item in items:
            picture, content = Image.fromarray(item.mask), io.BytesIO()
            picture.putpalette(palette().astype(np.uint8).tobytes())
            picture.save(content, "png")
            member = tarfile.TarInfo(f"{RESULTS}/{item.name}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
