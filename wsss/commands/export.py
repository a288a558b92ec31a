"""`wsss-export`: masks in the formats of other tools, and networks as ONNX."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from wsss import InputError, printable
from wsss.commandline import run_command
from wsss.config import extra_directories

if TYPE_CHECKING:
    from wsss.data.drawn import DrawnMask
    from wsss.outputs.regions import Labelled

SUFFIXES = {
    "png": "",
    "coco": ".json",
    "label_studio": "",
    "cvat": ".xml",
    "yolo": "",
    "voc_test": ".tar",
    "onnx": ".onnx",
}
"""Of what a format is written to; none of a folder."""


def export(cfg: DictConfig) -> int:
    """Returns the number of masks, or of the outputs of a network."""
    if cfg.format not in SUFFIXES:
        raise InputError(f"format is {cfg.format!r}: expected one of {', '.join(SUFFIXES)}")
    out, suffix = Path(cfg.out).expanduser(), SUFFIXES[cfg.format]
    if (suffix and out.suffix != suffix) or (not suffix and out.is_file()):
        raise InputError(f"out is {out}: expected {f'a file that ends in {suffix}' if suffix else 'a folder'}")
    wanted, other = ("checkpoint", "masks") if cfg.format == "onnx" else ("masks", "checkpoint")
    if cfg[wanted] is None or cfg[other] is not None:
        raise InputError(f"format={cfg.format} is made of a {wanted}: give {wanted}=..., and no {other}")
    if cfg.polygons is not False and (cfg.format not in ("coco", "label_studio") or cfg.polygons is not True):
        raise InputError(
            f"polygons is {cfg.polygons!r}: expected true or false, and true of coco and label_studio alone"
        )
    if cfg.format == "onnx":
        return export_network(cfg, out)
    return export_masks(cfg, out)


def export_network(cfg: DictConfig, out: Path) -> int:
    from wsss.assemble import quieten
    from wsss.checkpoints import load_stage, read_checkpoint
    from wsss.outputs.onnx import write_onnx

    quieten()
    directories = extra_directories()
    name = read_checkpoint(cfg.checkpoint, directories)["wsss"].get("method", "")
    outputs = write_onnx(out, load_stage(cfg.checkpoint, cfg.classes, directories), name)
    print(f"method={name} with {', '.join(outputs)} -> {out}")
    return len(outputs)


def export_masks(cfg: DictConfig, out: Path) -> int:
    from wsss.outputs.coco import write_coco
    from wsss.outputs.cvat import write_cvat
    from wsss.outputs.label_studio import write_label_studio
    from wsss.outputs.png import write_png, write_voc_test
    from wsss.outputs.yolo import write_yolo

    writers: dict[str, Callable[..., None]] = {
        "png": write_png,
        "coco": partial(write_coco, as_polygons=cfg.polygons),
        "label_studio": partial(write_label_studio, as_polygons=cfg.polygons),
        "cvat": write_cvat,
        "yolo": write_yolo,
        "voc_test": write_voc_test,
    }
    source = Path(cfg.masks).expanduser()
    images = None if cfg.images is None else Path(cfg.images).expanduser()
    classes = known_classes(source, images, cfg.classes)
    if cfg.format == "voc_test":
        check_voc(classes)
    masks = Masks(source, images, classes)
    writers[cfg.format](out, masks.read(undecided=cfg.format != "voc_test"), classes)
    print(f"{len(masks.found)} masks of {len(classes)} classes -> {out}")
    if masks.undecided and cfg.format != "png":
        print(f"note: {masks.undecided} masks have undecided pixels (255), which {cfg.format} takes for background")
    if masks.with_holes and cfg.format == "yolo":
        print(
            f"note: {masks.with_holes} masks have regions with holes, which YOLO does not know: they are cut into "
            "several polygons that leave the holes free, and count as several objects"
        )
    return len(masks.found)


def known_classes(source: Path, images: Path | None, given: Sequence[str] | None) -> list[str]:
    """The names that the user gives, else those that stand beside the masks, else those beside the photographs.

    Raises:
        InputError: there are none, or some that masks cannot hold.
    """
    from wsss.data.files import reading
    from wsss.data.words import distinct, listed_classes
    from wsss.writing import check_classes

    names = None if given is None else [str(name) for name in given]
    for folder in (source, source.parent, source / "masks") if source.is_dir() else ():
        for path in (folder / "manifest.json", folder / "settings.json"):
            if names is None and path.is_file():
                with reading(path, "the list of a folder of masks", "give classes=[...]"):
                    names = list(json.loads(path.read_bytes())["classes"])
        names = listed_classes(folder) if names is None and folder != source.parent else names
    names = listed_classes(images) if names is None and images is not None else names
    if names is None:
        raise InputError(f"{source} does not name its classes: give classes=[NAME,...] in the order of the ids")
    check_classes(names)
    return distinct(names)


def check_voc(classes: Sequence[str]) -> None:
    from wsss.data.voc import VOC_CLASSES

    if tuple(classes) != VOC_CLASSES:
        raise InputError(
            f"format=voc_test is for masks of VOC's {len(VOC_CLASSES)} classes in their order, and these are "
            f"{', '.join(classes[:3])}, ... ({len(classes)} in all): its server knows no others"
        )


class Masks:
    """Masks of a folder or of an export of Label Studio or CVAT, and how the images are called that they are of.

    Attributes:
        found: name of a mask, a relative path without suffix -> the file, or what is drawn.
        undecided, with_holes: how many of those that were read have undecided pixels, and regions with holes.
    """

    def __init__(self, source: Path, images: Path | None, classes: Sequence[str]) -> None:
        from wsss.data.drawn import is_export, read_drawn
        from wsss.data.files import first_names
        from wsss.data.finding import find_images, match
        from wsss.outputs.masks import output_names

        self.classes, self.images = classes, images
        self.undecided = self.with_holes = 0
        if is_export(source):
            drawn = read_drawn(source, classes)
            self.found: dict[str, Path | DrawnMask] = {**drawn}
            self.files = {name: name for name in drawn}
        else:
            folder = source / "masks" if (source / "masks").is_dir() else source
            paths = {p: path for p, path in find_images(folder, "masks").items() if p.suffix.lower() == ".png"}
            self.found = {p.with_suffix("").as_posix(): path for p, path in paths.items() if isinstance(path, Path)}
            self.files = {name: f"{name}.jpg" for name in self.found}
        if not self.found:
            raise InputError(f"masks={source} holds no mask: give a folder of PNGs, or finished annotations")
        names = dict(zip(self.files, output_names(map(Path, self.files.values())), strict=True))
        if images is not None:
            photographs = list(find_images(images, leave_out=source if source.is_dir() else None))
            of = dict(zip((path.as_posix() for path in photographs), output_names(photographs), strict=True))
            by_name = {name: file for file, name in of.items()}
            exact = {name: by_name[name] for name in self.found if name in by_name}
            rest = [file for file in of if file not in exact.values()]
            self.files = exact | match([name for name in self.found if name not in exact], rest)
            if missing := [name for name in self.found if name not in self.files]:
                raise InputError(
                    f"{len(missing)} of {len(self.found)} masks find no image in {images} ({first_names(missing)}): "
                    "give the folder of the very photographs"
                )
            names = {name: of[file] for name, file in self.files.items()}
        self.names: Mapping[str, str] = names

    def read(self, undecided: bool) -> Iterator["Labelled"]:
        """Each mask, one at a time; `undecided` says whether it may have undecided pixels.

        Raises:
            InputError: one cannot be read, or holds what it may not.
        """
        import numpy as np

        from wsss.data.files import read_mask
        from wsss.outputs.regions import Labelled, has_holes
        from wsss.report.tables import progress

        for name, source in progress(self.found.items(), len(self.found), "exporting"):
            mask = read_mask(source) if isinstance(source, Path) else source.draw(self._size(name, source))
            if unknown := sorted(set(np.unique(mask).tolist()).difference(range(len(self.classes) + 1), [255])):
                raise InputError(
                    f"the mask {printable(name)} holds the ids {unknown}, expected 0 to {len(self.classes)} or 255: "
                    "give all classes, in the order of the ids"
                )
            if 255 in mask and not undecided:
                raise InputError(
                    f"the mask {printable(name)} has undecided pixels (255), which VOC's server counts as wrong: "
                    "export the predictions of a network"
                )
            self.undecided += 255 in mask
            self.with_holes += has_holes(mask)
            yield Labelled(self.names[name], self.files[name], mask)

    def _size(self, name: str, mask: "DrawnMask") -> tuple[int, int]:
        from wsss.data.files import read_image

        if self.images is not None:
            return read_image(self.images / self.files[name]).shape[:2]
        if mask.size is None:
            raise InputError(f"{mask.source} does not tell the size of {printable(name)}: add images=FOLDER")
        return mask.size


def main() -> None:
    run_command("export", export)
