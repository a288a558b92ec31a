"""`wsss-report`: one file to look at and to hand on, of runs, a pipeline or a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

from wsss import InputError
from wsss.commandline import VALUE_OPTIONS, message_of, run_command
from wsss.config import composing, extra_directories, group_options, quote
from wsss.report.afterwards import INSTALL, PACKAGES

if TYPE_CHECKING:
    import numpy as np

    from wsss.data.base import Images
    from wsss.report.page import Difference, Example
    from wsss.report.reading import Run

MOST_PICTURES = 120
"""Thumbnails in a file, of some 10 KB each."""

MOST_COMPARED = 500
"""Pseudo masks that are compared with true ones in the search for the worst and the best."""


def report(cfg: DictConfig) -> Path:
    """Write the report of the runs, and say how large it is; returns its path."""
    from wsss.report.sweep import RECORD, read_sweep, show_sweep

    if not isinstance(cfg.examples, int) or isinstance(cfg.examples, bool) or cfg.examples < 0:
        raise InputError(f"examples is {cfg.examples!r}: expected a whole number of at least 0")
    paths = [Path(path).expanduser() for path in cfg.runs]
    if not paths:
        raise InputError("no run is given: wsss-report RUN..., the directories of runs, a pipeline or a sweep")
    sweep = read_sweep(paths[0]) if len(paths) == 1 and (paths[0] / RECORD).is_file() else None
    if sweep is not None:
        show_sweep(sweep)  # also where no job has begun, or what a report needs is not installed
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise InputError(f"a report needs {' and '.join(missing)}: {INSTALL}")
    from wsss.evaluation.comparison import over_seeds
    from wsss.report.baseline import how_to_add
    from wsss.report.page import page, picture_of, seeds_of
    from wsss.report.reading import read_all
    from wsss.writing import write_whole

    runs = read_all(paths)
    out = Path(cfg.out).expanduser() if cfg.out else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    gallery = Gallery(runs, extra_directories())
    examples = gallery.examples(cfg.examples) if cfg.examples else []
    differences, notes = compare(runs)
    notes += filter(None, [how_to_add(runs)])
    names = ", ".join(path.resolve().name for path in paths)
    title = f"Report of {names}" if len(names) < 100 else f"Report of {len(paths)} runs"
    notes = [*gallery.notes, *notes]
    if sweep is not None:
        notes += [f"Missing is {sentence}" for sentence in sweep.missing]
    text = page(title, runs, examples, gallery.about, seeds_of(runs, over_seeds), differences, notes, sweep)
    content = text.encode("utf-8", errors="replace")  # names of files may hold bytes that are no text
    with write_whole(out) as file:
        file.write(content)
    if sweep is not None and sweep.is_summary:
        with write_whole(paths[0] / "summary.png") as file:
            file.write(picture_of(sweep))
    pictures = sum(len(example.pictures) for example in examples)
    print(
        f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {pictures} pictures, {len(content) / 1e6:.1f} MB in one file"
    )
    return out


def compare(runs: Sequence["Run"]) -> tuple[list["Difference"], list[str]]:
    """Differences of later runs from the first one with counts of each image, and why there is none."""
    from wsss.evaluation.comparison import NoCountsError, paired_bootstrap, read_counts
    from wsss.report.page import Difference

    differences, notes = [], []
    for figure in ("miou", "multiscale_miou", "crf_miou", "cam_miou"):
        counted = []
        for run in runs:
            with suppress(NoCountsError):
                counted += [(run.name, read_counts(run.per_image, figure))] if run.per_image else []
        for name, counts in counted[1:]:
            try:
                found = paired_bootstrap(counted[0][1], counts)
            except InputError as error:
                notes.append(f"{name} is not compared with {counted[0][0]} in {figure}: {error}")
            else:
                differences.append(Difference(counted[0][0], name, figure, *found))
    return differences, notes


@dataclass
class Gallery:
    """Images of a data set, and what the networks of runs make of them.

    Attributes:
        runs: in the order in which they add their pictures.
        directories: of configuration beside ours.
        about: what the images are, once they are chosen.
        notes: sentences about what could not be shown.
    """

    runs: Sequence["Run"]
    directories: Sequence[str]
    about: str = ""
    notes: list[str] = field(default_factory=list)

    def examples(self, count: int) -> list["Example"]:
        """At most so many: the worst and the best where something tells, else the first ones."""
        labelled = next((run for run in reversed(self.runs) if run.command == "label" and run.finished), None)
        measured = next((run for run in self.runs if run.per_image), None)
        main = measured or labelled or next((run for run in self.runs if _has_checkpoint(run)), None)
        if main is None or not _has_checkpoint(main):
            self.notes.append("There are no pictures: the checkpoints are not there any more.")
            return []
        try:
            images, split = self.open(main)
            scores = self.scores(main, images)
            sources = self.sources()
            count = max(1, min(count, MOST_PICTURES // (2 + 2 * len(sources))))
            chosen, self.about = _choose(scores, list(images.ids), count, split, main)
            return self.draw(images, chosen, scores, sources, labelled)
        except (InputError, RuntimeError, MemoryError, OSError) as error:
            self.notes.append(f"There are no pictures: {' '.join(message_of(error).split())[:300]}")
            return []

    def open(self, run: "Run") -> tuple["Images", str]:
        """The images that a run was evaluated on, or made masks of, and their split.

        Raises:
            InputError: they are not there any more, or the checkpoint does not tell of them.
        """
        from wsss.assemble import open_images, with_classes
        from wsss.checkpoints import read_checkpoint
        from wsss.stored import check_values

        origin = read_checkpoint(str(run.checkpoint), self.directories)["wsss"]
        name = run.overrides.get("dataset") or run.settings.get("dataset") or origin.get("dataset")
        if name not in (known := group_options("dataset", self.directories)):
            raise InputError(f"{run.checkpoint} is of dataset={name}: known are {', '.join(known)}")
        with composing(self.directories) as search_path:
            composed: Any = OmegaConf.to_container(hydra.compose(overrides=[f"+dataset={name}", *search_path]).dataset)
        target = composed.pop("_target_")
        stored = origin.get("dataset_values", {}) if origin.get("dataset") == name else {}
        own: dict[str, Any] = {}
        if run.command == "label":
            own = {_inner(key): value for key, value in run.settings.items() if key.startswith("dataset.")}
        elif run.command == "eval":  # as YAML reads it: what a file holds is neither composed nor looked up
            own = {_inner(key): _plain(v) for key, v in run.overrides.items() if key.startswith("dataset.")}
        own = {key: value for key, value in own.items() if key in composed}
        for values in filter(None, (stored, own)):
            check_values("dataset", values, composed, str(run.checkpoint))
        values = {**composed, **stored, **own}
        values = with_classes(target, values, origin.get("classes", ()))
        splits = [str(run.settings.get("split", "train"))] if run.command == "label" else ["val", "train"]
        for split in splits:
            images, _ = open_images(target, values, split, "error", 0, masks=split == "val")
            if images is not None:
                return images, split
        raise InputError(f"the data set of {run.name} has no images")

    def scores(self, run: "Run", images: "Images") -> dict[str, float]:
        """Mean IoU of each image over the ids that it or its mask shows, as far as there are truths."""
        import numpy as np
        import torch

        from wsss.evaluation.comparison import read_counts
        from wsss.evaluation.details import image_counts

        if run.per_image:
            try:
                counts = read_counts(run.per_image, "miou")
            except InputError:
                counts = read_counts(run.per_image, "cam_miou")
            hits, predicted, true = counts.counts.T
            ratios, places = hits / (predicted + true - hits), counts.rows[:, 0]
            means = np.bincount(places, ratios) / np.bincount(places)
            return dict(zip(counts.images, means.tolist(), strict=True))
        scores = {}
        for index, name in enumerate(images.ids[:MOST_COMPARED]) if run.command == "label" else []:
            mask = read_mask(run, name)
            if (truth := images.truth(index, mask)) is None:
                return {}
            shown, (hits, predicted, true) = image_counts(
                torch.from_numpy(mask), torch.from_numpy(truth), 1 + len(images.classes)
            )
            if len(shown):
                scores[name] = float((hits / (predicted + true - hits)).mean())
        return scores

    def sources(self) -> list["Run"]:
        """Runs whose networks make pictures, each network once, unless their checkpoints are gone."""
        found: dict[Path, Run] = {}
        for run in self.runs:
            if run.command == "label" and len(self.runs) > 1:
                continue  # its network is that of another stage
            if run.checkpoint is not None and run.checkpoint.is_file():
                found.setdefault(run.checkpoint.resolve(), run)
        return list(found.values())

    def draw(
        self,
        images: "Images",
        chosen: Sequence[str],
        scores: Mapping[str, float],
        sources: Sequence["Run"],
        labelled: "Run | None",
    ) -> list["Example"]:
        """The pictures of the chosen images."""
        from wsss.data.base import ImageSubset
        from wsss.report.page import Example

        places = {name: index for index, name in enumerate(images.ids)}
        chosen = [name for name in chosen if name in places]
        subset = ImageSubset(images, [places[name] for name in chosen])
        shown: dict[str, dict[str, np.ndarray]] = {name: {} for name in chosen}
        for source in sources:
            try:
                for name, pictures in self.illustrate(source, subset, images.classes):
                    for title, value in pictures.items():
                        if title == "pseudo label" and labelled is not None:
                            continue  # there is the mask itself
                        ours = title if title in ("image", "truth") or len(sources) == 1 else f"{source.name}: {title}"
                        shown[name].setdefault(ours, value)
            except (InputError, RuntimeError, MemoryError, OSError) as error:
                said = " ".join(message_of(error).split())[:300]
                self.notes.append(f"There are no pictures of {source.name}: {said}")
        examples = []
        for index, name in enumerate(chosen):
            arrays, image = shown[name], subset[index]["image"]
            if labelled is not None and mask_path(labelled, name).is_file():
                arrays["pseudo mask"] = read_mask(labelled, name)
            truth = images.truth(places[name], image)
            if truth is not None:
                arrays["truth"] = truth
            order = ["image", *(t for t in arrays if t not in ("image", "pseudo mask", "truth"))]
            if "pseudo mask" in arrays:  # behind the maps that it was made of
                after = [place for place, title in enumerate(order, 1) if title.endswith("CAM")]
                order.insert(after[-1] if after else 1, "pseudo mask")
            order += ["truth"] if "truth" in arrays else []
            arrays.setdefault("image", image)
            labels = [c for c, value in zip(images.classes, images.label(places[name]), strict=True) if value]
            note = f"mean IoU {scores[name]:.4f}" if name in scores else ""
            drawn = [_picture(title, arrays[title], arrays["image"], name, images.classes, labels) for title in order]
            ids = sorted({int(c) for a in arrays.values() if a.ndim == 2 and a.dtype.kind != "f" for c in set(a.flat)})
            classes = [(c, _class_name(c, images.classes)) for c in ids if c]
            examples.append(Example(name, note, drawn, classes))
        return examples

    def illustrate(
        self, run: "Run", images: "Images", classes: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, "np.ndarray"]]]:
        """By image what a run's network makes of it, by title.

        Raises:
            InputError: the checkpoint cannot be used, or is of other classes.
        """
        from wsss.checkpoints import load_stage
        from wsss.data.datamodule import DataModule

        method = load_stage(str(run.checkpoint), directories=self.directories)
        if method.classes != tuple(classes):
            raise InputError("its classes are not those of these images")
        data = DataModule(None, images, num_workers=0)
        data.mean, data.std = method.mean, method.std
        for batch in data.examples(len(images), method.smallest_side):
            for pictures in method.illustrate(batch).values():
                yield batch["id"][0], {title: value.cpu().numpy() for title, value in pictures.items()}
                break  # the first file: the others show attention


def _has_checkpoint(run: "Run") -> bool:
    return run.checkpoint is not None and run.checkpoint.is_file()


def _plain(value: Any) -> Any:
    """A value of a command line as YAML reads it, which executes nothing; text where it reads none."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _inner(override: str) -> str:
    return override.partition("=")[0].removeprefix("dataset.")


def mask_path(run: "Run", name: str) -> Path:
    return run.folder / "masks" / f"{name}.png"


def read_mask(run: "Run", name: str) -> "np.ndarray":
    """A pseudo mask of a run of wsss-label, uint8 (H, W)."""
    import numpy as np
    from PIL import Image

    with Image.open(mask_path(run, name), formats=["PNG"]) as picture:
        return np.array(picture)


def _choose(
    scores: Mapping[str, float], ids: Sequence[str], count: int, split: str, run: "Run"
) -> tuple[list[str], str]:
    """Images to show, and what they are."""
    known = [name for name in ids if name in scores]
    if not known:
        return list(ids[:count]), f"The first {min(count, len(ids))} images of {split}."
    ranked = sorted(known, key=lambda name: scores[name])
    if len(ranked) <= count:
        return ranked, f"The {len(ranked)} images of {split}, the worst first, by the mean IoU of {run.name}."
    worst = count // 2
    of = f"{len(ranked)} images of {split}" if len(ranked) == len(ids) else f"the first {len(ranked)} images of {split}"
    chosen = [*ranked[:worst], *ranked[len(ranked) - (count - worst) :]]
    return chosen, f"The {worst} worst and then the {count - worst} best of {of}, by the mean IoU of {run.name}."


def _picture(
    title: str, value: "np.ndarray", image: "np.ndarray", name: str, classes: Sequence[str], labels: Sequence[str]
) -> Any:
    """A thumbnail and its description in words."""
    import numpy as np

    from wsss.report.page import Picture
    from wsss.report.pictures import thumbnail

    said = ", ".join(labels) or "no class"
    if value.ndim == 3:
        alt = f"{name}, which shows {said}"
    elif value.dtype.kind == "f":
        alt = f"{title} of {name}: heat map for {said}, mean {value.mean():.2f}, brightest {_place(value)}"
    else:
        ids, counts = np.unique(value, return_counts=True)
        parts = [
            f"{_class_name(int(c), classes)} {100 * n / value.size:.0f} %"
            for c, n in zip(ids, counts, strict=True)
            if c
        ]
        alt = f"{title} of {name}: {', '.join(parts) or 'background alone'}"
    content, size = thumbnail(value, image)
    return Picture(title, content, size, alt)


def _place(values: "np.ndarray") -> str:
    """In words where the largest value is."""
    row, column = divmod(int(values.argmax()), values.shape[1])
    vertical = ("at the top", "in the middle", "at the bottom")[3 * row // values.shape[0]]
    return f"{vertical} {('left', 'centre', 'right')[3 * column // values.shape[1]]}"


def _class_name(number: int, classes: Sequence[str]) -> str:
    return "background" if number == 0 else "undecided" if number == 255 else classes[number - 1]


def prepare(arguments: list[str]) -> list[str]:
    """What is no setting is a run."""
    options, runs, settings = [], [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in VALUE_OPTIONS:
            options += [argument, next(rest, "")]
        elif argument.startswith("-"):
            options.append(argument)
        elif "=" in argument and not Path(argument).exists():
            settings.append(argument)
        else:
            runs.append(argument)
    return [*options, *settings, *([f"runs={quote(runs)}"] if runs else [])]


def main() -> None:
    run_command("report", report, prepare)
