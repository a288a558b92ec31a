"""PASCAL VOC 2012 as weakly supervised segmentation trains on it: VOC and the masks of SBD, put together."""

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from wsss import InputError
from wsss.data.files import (
    IMAGE_SUFFIXES,
    PathLike,
    annotation_labels,
    files_by_stem,
    first_names,
    load_label_dict,
    read_list,
    read_mask,
)
from wsss.data.voc import LAYOUT, VOC_CLASSES
from wsss.prepare.download import Progress, fetch, unpack
from wsss.prepare.matlab import read_segmentation
from wsss.writing import explain_refusal, write_mask, write_whole

VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD_URL = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"
DEVKIT, SBD_HOMES = "VOCdevkit/VOC2012", ("benchmark_RELEASE/dataset", "dataset")
GENUINE = (1464, 1449)  # images in VOC's train and val
FIELD = (10_582, "d1326bd53264")  # images in the field's train_aug, and how the hash of its list starts

Steps = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done and, where known, the total: bytes, or files."""


@dataclass(frozen=True)
class TrainAug:
    """What `derive_train_aug` made.

    Attributes:
        ids: images in train_aug.txt.
        sha256: of the list, sorted, one id a line (`sort train_aug.txt | sha256sum`).
        voc_masks, sbd_masks: masks in SegmentationClassAug that come from VOC and from SBD, those of val included.
        written: masks that were not there yet, or not the same.
        missing_images: listed images that JPEGImages lacks.
        notes: sentences about what is not as expected.
    """

    ids: int
    sha256: str
    voc_masks: int
    sbd_masks: int
    written: int
    missing_images: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What `prepare_voc` leaves: the report on train_aug, the file of image-level labels, its number of images."""

    train_aug: TrainAug
    labels: Path
    labelled: int


def _write_mask_if_changed(path: Path, mask: np.ndarray) -> bool:
    """Writes ids (H, W) as a PNG with VOC's palette, unless the file holds them already; tells whether it wrote."""
    if path.exists():
        try:
            if np.array_equal(read_mask(path), mask):
                return False
        except InputError:
            pass  # it is no mask and makes way for one
    with explain_refusal(path):
        write_mask(path, mask)
    return True


def derive_train_aug(voc_root: PathLike, sbd_root: PathLike, progress: Progress | None = None) -> TrainAug:
    """Writes train_aug.txt and SegmentationClassAug of a VOC 2012 tree; what is there and equal stays.

    train_aug is VOC's train, SBD's train and SBD's val without VOC's val. Every image of it and of val gets
    a mask: VOC's own, else SBD's. The list comes last, so that where it is the masks are. Interrupted, it can be
    run again.

    Args:
        voc_root: with ImageSets/Segmentation/{train,val}.txt, SegmentationClass and JPEGImages.
        sbd_root: with cls/<id>.mat, train.txt and val.txt; its photographs are VOC's own and not used.
        progress: gets the masks that are done and all masks.

    Raises:
        InputError: a list, a mask or a folder is missing, cannot be read or cannot be written.
    """
    voc, sbd = Path(voc_root), Path(sbd_root)
    lists, folder = voc / "ImageSets/Segmentation", voc / "SegmentationClassAug"
    train, val = (read_list(lists / f"{name}.txt") for name in ("train", "val"))
    extra = [*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt")]
    ids = sorted({*train, *extra} - set(val))
    wanted = sorted({*ids, *val})
    own = files_by_stem(voc / "SegmentationClass", (".png",), LAYOUT)
    theirs = files_by_stem(sbd / "cls", (".mat",), "cls, train.txt and val.txt of SBD")
    if missing := [name for name in wanted if name not in own and name not in theirs]:
        found = f"{len(missing)} of {len(wanted)} images ({first_names(missing)})"
        raise InputError(
            f"{found} have a mask neither in {voc / 'SegmentationClass'} nor in {sbd / 'cls'}: unpack both again."
        )
    written = 0
    for done, name in enumerate(wanted, start=1):
        mask = read_mask(own[name]) if name in own else read_segmentation(theirs[name])
        written += _write_mask_if_changed(folder / f"{name}.png", mask)
        if progress:
            progress(done, len(wanted))
    _write_if_changed(lists / "train_aug.txt", _as_text(ids))
    return _report(voc, written)


def _as_text(ids: list[str]) -> bytes:
    """A list file: sorted, one id a line."""
    return "".join(f"{name}\n" for name in sorted(ids)).encode()


def _write_if_changed(path: Path, content: bytes) -> None:
    """Writes a file whole, unless it holds the content already."""
    if path.exists() and path.read_bytes() == content:
        return
    with explain_refusal(path), write_whole(path) as file:
        file.write(content)


def _report(voc: Path, written: int) -> TrainAug:
    lists = {path.stem: read_list(path) for path in _lists(voc) if path.stem in ("train", "train_aug", "val")}
    ids, genuine = lists["train_aug"], tuple(len(lists.get(name, ())) for name in ("train", "val")) == GENUINE
    sha256 = hashlib.sha256(_as_text(ids)).hexdigest()
    own = voc / "SegmentationClass"
    voc_masks = len({*ids, *lists["val"]} & (files_by_stem(own, (".png",), LAYOUT) if own.is_dir() else {}).keys())
    missing = len(set(ids) - files_by_stem(voc / "JPEGImages", IMAGE_SUFFIXES, LAYOUT).keys())
    notes = []
    if genuine and (len(ids), sha256[:12]) != FIELD:
        known = f"the field's has {FIELD[0]} with {FIELD[1]}"
        notes.append(
            f"train_aug.txt has {len(ids)} images with the hash {sha256[:12]}, {known}: SBD is not as released."
        )
    if missing:
        notes.append(f"{missing} images of train_aug.txt are not in {voc / 'JPEGImages'}: training on it is refused.")
    masks = len({*ids, *lists["val"]})
    return TrainAug(len(ids), sha256, voc_masks, masks - voc_masks, written, missing, tuple(notes))


def _lists(voc: Path) -> list[Path]:
    return sorted((voc / "ImageSets/Segmentation").glob("*.txt"))


def prepare_voc(
    root: PathLike,
    voc_url: str = VOC_URL,
    sbd_url: str = SBD_URL,
    voc_md5: str | None = VOC_MD5,
    sbd_md5: str | None = SBD_MD5,
    progress: Steps | None = None,
) -> Prepared:
    """Makes of a folder what `wsss.data.voc.VOC` reads; does only what is missing and can be interrupted at will.

    VOC 2012 is root itself, or root/VOCdevkit/VOC2012, whose folders root then links to; SBD is
    root/benchmark_RELEASE/dataset or root/dataset. What is not there is downloaded to root/downloads, or taken
    from there, and unpacked. Image-level labels go to cls_labels.npy where root has no cls_labels*.npy.

    Args:
        root: the folder; made where it is missing.
        voc_url, sbd_url: where the archives are.
        voc_md5, sbd_md5: their checksums; None checks nothing.
        progress: gets what is being done, how much of it is done and the total.

    Raises:
        InputError: see `fetch`, `unpack`, `derive_train_aug` and `wsss.data.files.annotation_labels`.
    """
    root = Path(root).expanduser()
    devkit = root / DEVKIT
    if not devkit.is_dir() and not (root / "JPEGImages").is_dir():
        _obtain(voc_url, voc_md5, root, DEVKIT, progress)
    if devkit.is_dir():
        _adopt(root)
    if _is_finished(root):
        train_aug = _report(root, 0)
    else:
        home = next((home for home in SBD_HOMES if (root / home / "cls").is_dir()), None)
        if home is None:
            home = SBD_HOMES[0]
            _obtain(sbd_url, sbd_md5, root, home, progress)
        train_aug = derive_train_aug(root, root / home, _step(progress, "SegmentationClassAug"))
    labels = next(iter(sorted(root.glob("cls_labels*.npy"))), None) or _write_labels(root, progress)
    return Prepared(train_aug, labels, len(load_label_dict(labels)))


def _step(progress: Steps | None, what: str) -> Progress | None:
    return partial(progress, what) if progress else None


def _obtain(url: str, md5: str | None, root: Path, home: str, progress: Steps | None) -> None:
    """Makes root/home, the one folder of an archive that is needed."""
    archive = root / "downloads" / (Path(unquote(urlsplit(url).path)).name or "archive")
    whole = archive.with_name(f"{archive.name}.unpacked")
    if not whole.is_dir():
        fetch(url, archive, md5=md5, progress=_step(progress, f"downloading {archive.name}"))
        unpack(archive, whole, _step(progress, f"unpacking {archive.name}"))
    try:
        if not (whole / home).is_dir():
            raise InputError(f"{archive} holds no folder {home}: remove it and give the URL of another archive.")
        with explain_refusal(root / home):
            (root / home).parent.mkdir(parents=True, exist_ok=True)
            os.replace(whole / home, root / home)
    finally:
        shutil.rmtree(whole)


def _adopt(root: Path) -> None:
    """Links root to the folders of its devkit and copies the lists, so that nothing is written into the devkit."""
    names = ["JPEGImages", "Annotations", "SegmentationClass"]
    if _is_finished(root / DEVKIT):
        names.append("SegmentationClassAug")
    for name in names:
        if (root / DEVKIT / name).is_dir() and not (root / name).exists():
            try:
                (root / name).symlink_to(Path(DEVKIT, name), target_is_directory=True)
            except OSError as error:
                found = error.strerror or error
                raise InputError(f"{root / name} cannot be made a link ({found}): give {root / DEVKIT}.") from error
    lists = root / "ImageSets/Segmentation"
    for path in _lists(root / DEVKIT):
        if not (lists / path.name).exists():
            _write_if_changed(lists / path.name, path.read_bytes())


def _is_finished(root: Path) -> bool:
    """Whether there is a train_aug with all its masks, ours or another's."""
    path, folder = root / "ImageSets/Segmentation/train_aug.txt", root / "SegmentationClassAug"
    if not (path.is_file() and folder.is_dir()):
        return False
    return {*read_list(path), *read_list(path.with_name("val.txt"))} <= files_by_stem(folder, (".png",), LAYOUT).keys()


def _write_labels(root: Path, progress: Steps | None) -> Path:
    """Writes cls_labels.npy, the field's pickled dict in an object array, from the XML files."""
    ids = sorted(
        {name for stem in ("train_aug", "val") for name in read_list(root / f"ImageSets/Segmentation/{stem}.txt")}
    )
    labels = annotation_labels(root / "Annotations", ids, VOC_CLASSES, _step(progress, "image-level labels"))
    if missing := sorted(set(ids) - labels.keys()):
        found = f"{len(missing)} of {len(ids)} images ({first_names(missing)})"
        raise InputError(f"{found} have no file in {root / 'Annotations'}: unpack VOC 2012 again.")
    path = root / "cls_labels.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.array(labels, object), allow_pickle=True)
    _write_if_changed(path, buffer.getvalue())
    return path
