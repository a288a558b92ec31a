"""How fast one worker makes training items, against a plain PIL and torchvision pipeline of the same steps.

    python -m tests.benchmarks.loader --data DIR [--list NAME] [--recipes toco_voc ...] [--repeats 5] [--images 40]

DIR is a folder in VOC's layout and NAME one of its lists. An item of ours is what the training loader gives: photograph
read, transform of the recipe, normalised tensors. One process and one thread run ours and theirs in turn, a few images
at a time, so that what else the machine does falls on both. The columns are milliseconds of processor time an image,
the median of the rounds, and how many times faster ours is, by processor time and by the clock, with the smallest and
largest ratio of a round. Compare ratios: milliseconds belong to a machine and an hour.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.transforms as T
from hydra import compose, initialize_config_dir
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from wsss.config import build, config_dir
from wsss.data.datamodule import DataModule
from wsss.data.transforms import posterize

RECIPES = ("toco_voc", "mctformer_voc", "mctformer_plus_voc", "cam_voc", "seam_voc", "ppc_voc", "rcm_mam_voc")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
Pipeline = Callable[[Image.Image], Any]


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """A window of a canvas of zeros that holds the image, (H, W, 3) or (3, H, W), at a random place."""
    sides = [slice(None)] * 3
    canvas_sides, placed, cut = list(image.shape), list(sides), list(sides)
    for axis in (0, 1) if image.shape[2] == 3 else (1, 2):
        length = image.shape[axis]
        canvas_sides[axis] = max(size, length)
        start, window = np.random.randint(canvas_sides[axis] - length + 1), random.randint(0, canvas_sides[axis] - size)
        placed[axis], cut[axis] = slice(start, start + length), slice(window, window + size)
    canvas = np.zeros(canvas_sides, np.float32)
    canvas[tuple(placed)] = image
    return canvas[tuple(cut)]


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def toco(settings: Any) -> Pipeline:
    size = settings.crop_size
    colours = [
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
    ]
    blurs = [T.RandomApply([T.Lambda(blurred)], probability) for probability in settings.blur]
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]
    view = T.RandomResizedCrop(size, (0.4, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    solarised = T.RandomApply([T.Lambda(ImageOps.solarize)], 0.2)
    main = T.Compose([*colours, blurs[0], *tensor])
    other = T.Compose([view, *colours, blurs[1], solarised, *tensor])
    local = T.Compose([*colours, blurs[2], *tensor])

    def pipeline(image: Image.Image) -> Any:
        ratio = random.uniform(*settings.scale)
        scaled = np.asarray(image.resize((int(ratio * image.width), int(ratio * image.height)), BILINEAR))
        if random.random() > 0.5:
            scaled = np.fliplr(scaled)
        window = Image.fromarray(crop(scaled, size).astype(np.uint8))
        return main(window), local(window), other(image)

    return pipeline


def long_side(settings: Any) -> Pipeline:
    steps: list[Any] = [
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(*settings.jitter)], settings.jitter_probability),
    ]
    if settings.grey:
        steps.append(T.RandomGrayscale(settings.grey))
    tensor = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])

    def pipeline(image: Image.Image) -> Any:
        factor = random.randint(*settings.long_side) / max(image.size)
        resized = image.resize((round(image.width * factor), round(image.height * factor)), BICUBIC)
        return torch.from_numpy(crop(tensor(resized).numpy(), settings.crop_size))

    return pipeline


def rand_augment(settings: Any) -> Pipeline:
    size = settings.crop_size
    fill = tuple(round(255 * value) for value in MEAN)
    augment = rand_augment_transform(
        settings.auto_augment, {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": BICUBIC}
    )
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    steps = [
        T.RandomResizedCrop(size, tuple(settings.scale), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
        augment,
        T.ToTensor(),
        T.Normalize(MEAN, STD),
        RandomErasing(settings.erasing, mode="pixel", device="cpu"),
    ]
    return T.Compose(steps)


THEIRS = {"ToCoViews": toco, "LongSideCrop": long_side, "RandAugmentCrop": rand_augment}


def pair(recipe: str, root: str, name: str | None) -> tuple[list[Path], Callable[[int], Any], Callable[[Path], Any]]:
    """The photographs, our item by position, and theirs by path."""
    method, dataset = recipe.rsplit("_", 1)
    cfg = compose("train", overrides=[f"method={method}", f"dataset={dataset}"])
    cfg.dataset.root, cfg.dataset.train = root, name
    source = build(cfg.dataset, "dataset", split="train")
    module = DataModule(source, transform=build(cfg.transform, "transform"), num_workers=0)
    items: Any = module.train_dataloader().dataset
    pipeline = THEIRS[cfg.transform._target_.rsplit(".", 1)[1]](cfg.transform)

    def theirs(path: Path) -> Any:
        with Image.open(path) as image:
            return pipeline(image.convert("RGB"))

    return source.images, lambda position: items[position, position % len(source)], theirs


def seconds(make: Callable[[Any], Any], keys: list[Any]) -> np.ndarray:
    """Processor time and clock time an image."""
    start = np.array([time.process_time(), time.perf_counter()])
    for key in keys:
        make(key)
    return (np.array([time.process_time(), time.perf_counter()]) - start) / len(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in VOC's layout")
    parser.add_argument("--list", help="list of ImageSets/Segmentation; train_aug or train unless given")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="images a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        pairs = {recipe: pair(recipe, given.data, given.list) for recipe in given.recipes}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    times: dict[str, list[Any]] = {recipe: [] for recipe in pairs}  # of each round those of ours and theirs
    for start in range(0, (given.repeats + 1) * given.images, given.images):
        for recipe, (paths, ours, theirs) in pairs.items():
            positions = list(range(start, start + given.images))
            took = [seconds(ours, positions), seconds(theirs, [paths[p % len(paths)] for p in positions])]
            if start:  # the first round warms up
                times[recipe].append(took)
    print(f"{'recipe':20}{'ours ms':>9}{'theirs ms':>11}{'ours img/s':>12}   {'ratio':24}{'by the clock':24}")
    for recipe, rounds in times.items():
        median = np.median(rounds, axis=0) * 1000
        ratios = np.array([theirs / ours for ours, theirs in rounds])  # (rounds, 2)
        shown = [f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratios.T]
        row = f"{recipe:20}{median[0, 0]:9.1f}{median[1, 0]:11.1f}{1000 / median[0, 0]:12.1f}"
        print(f"{row}   {shown[0]:24}{shown[1]:24}")


if __name__ == "__main__":
    main()
