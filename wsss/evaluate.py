"""`wsss-eval`: measure a checkpoint on a data set."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from wsss import InputError
from wsss.config import build, call, check_arguments, plain, quote, run_command, values_of

if TYPE_CHECKING:
    from wsss.data.datamodule import DataModule
    from wsss.methods.base import WSSSModule
    from wsss.metrics import Protocol


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate, print a table, write metrics.json and pictures; returns the figures."""
    from wsss.data.datamodule import DataModule
    from wsss.report import print_figures, write_json
    from wsss.train import build_trainer, open_set, provenance, quieten, write_skipped

    quieten()
    run = HydraConfig.get()
    out = Path(run.runtime.output_dir)
    val, skipped = open_set(cfg, "val")
    if val is None:
        raise InputError("the data set names no images to evaluate on: add dataset.val=all, a list or a fraction")
    if skipped:
        write_skipped(out, skipped)
    data = call(DataModule, plain(cfg.data, "data"), "data", train=None, val=val)
    method = load_method(cfg, data.classes)
    trainer = build_trainer(plain(cfg.trainer, "trainer"), logger=False)
    trainer.validate(method, data, verbose=False)
    figures = {key: value.item() for key, value in trainer.callback_metrics.items()}
    notes = method.describe(data.val_name)
    write_json(out / "run.json", provenance(cfg, list(run.overrides.task)))
    write_json(
        out / "metrics.json",
        {"checkpoint": cfg.checkpoint} | figures | {f"protocol/{k}": v for k, v in notes.items()},
    )
    save_examples(out / "examples.png", method, data)
    print_figures(figures, notes, f"{cfg.checkpoint} -> {out}")
    return figures


def save_examples(path: Path, method: "WSSSModule", data: "DataModule", count: int = 8) -> None:
    """A grid of the first evaluation images, else training images: input, CAM, pseudo label, prediction and truth.

    CAM and pseudo label are those of the image's true labels, as in training; white is undecided. A method with
    class attention also leaves `attention.png`, the attention of the true classes' tokens in five of the images.
    """
    import numpy as np
    import torch

    from wsss.refine.cam import min_max, resize
    from wsss.report import heat, paint, save_grid

    rows: list[list[Any]] = []
    attentions: list[dict[str, Any]] = []
    method.eval()
    for batch in data.example_dataloader():
        for index in range(min(len(batch["image"]), count - len(rows))):
            image, label = (batch[key][index : index + 1].to(method.device) for key in ("image", "label"))
            size = image.shape[-2:]
            output = method.infer(image)
            cam = resize(output["cam"], size) * label[:, :, None, None]
            with torch.no_grad():
                pseudo = method.pseudo_label(image, cam, label)[0].cpu().numpy()
            colours = method.colours(image)[0].round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            row = [colours, heat(colours, cam[0].amax(0).cpu().numpy()), paint(pseudo)]
            if output["seg"] is not None:
                row.append(paint(resize(output["seg"], size).argmax(1)[0].cpu().numpy()))
            if "mask" in batch:
                row.append(paint(batch["mask"][index].numpy()))
            rows.append(row)
            if "attention" in output:
                maps = min_max(resize(output["attention"], size))[0].cpu().numpy()
                present = label[0].nonzero()[:, 0].tolist()
                attentions.append({"image": colours} | {method.classes[c]: heat(colours, maps[c]) for c in present})
        if len(rows) >= count:
            break
    titles = ["image", "CAM", "pseudo label"]
    titles += [
        title for title, there in (("prediction", output["seg"] is not None), ("truth", "mask" in batch)) if there
    ]
    save_grid(path, rows, titles)
    if attentions:
        shown = attentions[:5]
        names = ["image", *(name for name in method.classes if any(name in row for row in shown))]
        blank = np.full((1, 1, 3), 255, np.uint8)
        save_grid(path.with_name("attention.png"), [[row.get(n, blank) for n in names] for row in shown], names)


def load_method(cfg: DictConfig, classes: tuple[str, ...] | None = None) -> "WSSSModule":
    """The method of `cfg.checkpoint`: its class from conf/, its values and weights from the file.

    `classes`, where given, are those of a data set that the checkpoint has to agree with.
    """
    from wsss.checkpoints import load_weights, read_checkpoint

    checkpoint = read_checkpoint(cfg.checkpoint)
    origin = checkpoint["wsss"]
    count = checkpoint["hyper_parameters"]["num_classes"]
    # a checkpoint of an original repository does not name its classes
    known = tuple(origin.get("classes") or (classes if classes and len(classes) == count else map(str, range(count))))
    if classes is not None and classes != known:
        raise InputError(
            f"checkpoint {cfg.checkpoint} knows {len(known)} classes ({', '.join(known[:3])}, ...), the data set has "
            f"{len(classes)} ({', '.join(classes[:3])}, ...): evaluate it on a data set with the same classes"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*starts from random weights")  # the checkpoint's come next
        method = build(cfg.method, "method", num_classes=len(known), classes=known)
    load_weights(method, checkpoint, cfg.checkpoint)
    method.mean, method.std = (tuple(origin.get(key, getattr(method, key))) for key in ("mean", "std"))
    method.protocol = build_protocol(cfg)
    if not origin.get("has_background", True):
        method.without_background()
    return method


def build_protocol(cfg: DictConfig) -> "Protocol":
    """The protocol of a composed configuration, the arguments of its CRF included."""
    from wsss.metrics import Protocol
    from wsss.refine.crf import dense_crf

    protocol: Protocol = call(Protocol, plain(cfg.protocol, "protocol"), "protocol")
    if protocol.crf is not None:
        check_arguments(dense_crf, protocol.crf, "protocol.crf", given=("image", "probability"))
    return protocol


def from_checkpoint(overrides: list[str], dataset: bool = True) -> list[str]:
    """The command line with what the checkpoint says in front: names of method and data set and their values.

    What the user gives comes later and wins.

    Raises:
        InputError: no checkpoint is given, it cannot be read, or another method was asked for.
    """
    from wsss.checkpoints import read_checkpoint

    given = values_of(overrides, "checkpoint")
    if not given or given[0] in ("", "None"):
        raise InputError("checkpoint is not set: add checkpoint=FILE, e.g. outputs/.../checkpoints/last.ckpt")
    # the checkpoints of a sweep share their method and data set, those of the first
    checkpoint = read_checkpoint(given[0])
    origin = checkpoint["wsss"]
    asked = values_of(overrides, "method")
    if asked not in ([], [origin["method"]]):
        raise InputError(
            f"method={','.join(asked)} was asked for, but checkpoint {given[0]} is of method={origin['method']}: "
            "leave it out"
        )
    stored = [f"method={origin['method']}"]
    # the weights come from this file, not from where training started
    built = {k: v for k, v in checkpoint["hyper_parameters"].items() if k not in ("num_classes", "classes")}
    built |= {"weights": None} | ({"init_checkpoint": None} if "init_checkpoint" in built else {})
    values = {"method": built, "protocol": origin.get("protocol", {})}
    if dataset and "dataset" not in origin:
        if not values_of(overrides, "dataset"):
            raise InputError(
                f"checkpoint {given[0]} does not say which data set it belongs to: add dataset=voc dataset.root=DIR"
            )
    elif dataset:
        same = values_of(overrides, "dataset") in ([], [origin["dataset"]])
        stored += [f"dataset={origin['dataset']}"] if same else []
        values |= {"dataset": origin["dataset_values"]} if same else {}
    stored += [f"++{group}.{key}={quote(value)}" for group, node in values.items() for key, value in node.items()]
    names = {o.partition("=")[0] for o in overrides}
    stored = [o for o in stored if o.partition("=")[0].lstrip("+") not in names]
    first = next((i for i, o in enumerate(overrides) if not o.startswith("-") and "=" in o), len(overrides))
    return [*overrides[:first], *stored, *overrides[first:]]


def main() -> None:
    run_command("eval", evaluate, from_checkpoint)
