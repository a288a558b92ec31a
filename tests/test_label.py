"""wsss-label: what it leaves, that it goes on, and that the number of processes does not show."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IRN_OVERRIDES, RESNET38_OVERRIDES, VOC_OVERRIDES, Ended, call, make_voc, save_labels

import wsss
from wsss.cam import resize
from wsss.checkpoints import load_stage
from wsss.data.datamodule import DataModule
from wsss.data.pixels import Normalise
from wsss.data.pseudo import PseudoMasks
from wsss.data.shapes import Shapes
from wsss.evaluation.metrics import CamIoU, SegmentationIoU
from wsss.outputs.masks import MaskFolder
from wsss.refine.pseudo import crf

Command = Callable[..., Ended]
SHAPES: dict[str, Any] = {"size": 32, "train_size": 6, "val_size": 4, "num_classes": 4}
SCORES = ["refine=crf", "refine.alpha=[4,32]", "scores=true", "cams=true", "overlay=true"]


@pytest.fixture
def given(trained: Path) -> list[str]:
    return [f"checkpoint={trained / 'checkpoints/last.ckpt'}", "num_workers=0"]


@pytest.fixture(scope="module")
def on_voc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree of VOC, and the checkpoint of a method trained on it."""
    folder = tmp_path_factory.mktemp("voc")
    root = make_voc(folder / "voc")
    given = [f"dataset.root={root}", "data.eval_batch_size=1", f"hydra.run.dir={folder / 'run'}"]
    assert call("train", *VOC_OVERRIDES, *given) == 0
    return root, folder / "run/checkpoints/last.ckpt"


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def mask(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert all(word in lines[0] for word in words), lines[0]


def test_masks_are_those_of_the_method(command: Command, given: list[str], trained: Path, tmp_path: Path) -> None:
    ended = command("label", *given, "split=val", f"out={tmp_path / 'a'}", "method.background_threshold=0.3")
    assert ended.code == 0, ended.err
    assert "% undecided" in ended.out
    assert command("label", *given, "split=val", f"out={tmp_path / 'b'}", *SCORES).code == 0
    method = wsss.load(trained / "checkpoints/last.ckpt").method
    images = Shapes("val", **SHAPES)
    for index, name in enumerate(images.ids):
        item = images[index]
        shown = np.flatnonzero(item["label"])
        photo = torch.from_numpy(item["image"]).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (method.mean, method.std))
        cam = resize(method.infer(((photo - mean) / std)[None])["cam"], (32, 32))[0, shown].numpy()
        ids = np.where(cam.max(0) > 0.3, shown[cam.argmax(0)] + 1, 0)
        assert (mask(tmp_path / "a/masks" / f"{name}.png") == ids).mean() > 0.999  # normalised in another order
        arrays = np.load(tmp_path / "b/cams" / f"{name}.npz", allow_pickle=False)
        assert (arrays["cam"].dtype, arrays["ids"].tolist()) == (np.float16, (shown + 1).tolist())
        np.testing.assert_allclose(arrays["cam"], cam, atol=2e-3)
        refined = crf(255 * photo, torch.from_numpy(cam), [4, 32])
        found = np.load(tmp_path / "b/scores" / f"{name}.npz", allow_pickle=False)
        assert found["ids"].tolist() == (shown + 1).tolist()
        for key, scores in zip(("low", "high"), refined.scores, strict=True):
            assert (found[key].dtype, found[key].shape) == (np.float16, (1 + len(shown), 32, 32))
            np.testing.assert_allclose(found[key], scores, atol=5e-3)
        expected = np.array([0, *(shown + 1), *range(len(shown) + 1, 256)])[refined.mask]
        assert (mask(tmp_path / "b/masks" / f"{name}.png") == expected).mean() > 0.99
        assert (tmp_path / "b/overlays" / f"{name}.jpg").is_file()
    left = ["counts", "manifest.json", "masks", "metrics.json", "settings.json", "tags.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == left


@pytest.mark.parametrize("name", ["label", "predict"])
def test_half_precision(command: Command, given: list[str], tmp_path: Path, name: str) -> None:
    """The networks' passes alone: masks move at few pixels, and what cannot be computed here is refused."""
    what = [name, *given, f"images={tmp_path / 'photos'}", "overlay=false"] if name == "predict" else [name, *given]
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(Shapes("train", **SHAPES)[number]["image"]).save(tmp_path / f"photos/{number}.png")
    for precision in ("32-true", "bf16-mixed"):
        assert command(*what, f"out={tmp_path / precision}", f"precision={precision}").code == 0
    masks = [sorted((tmp_path / precision / "masks").glob("*.png")) for precision in ("32-true", "bf16-mixed")]
    assert len(masks[0]) == len(masks[1]) >= 3
    moved = np.mean([np.mean(mask(one) != mask(other)) for one, other in zip(*masks, strict=True)])
    assert moved < 0.05
    refused(command(*what, f"out={tmp_path / 'no'}", "precision=16-mixed"), "precision is '16-mixed'", "bf16-mixed")
    assert not (tmp_path / "no").exists()


def test_a_stage_trains_on_the_masks(command: Command, given: list[str], tmp_path: Path) -> None:
    assert command("label", *given, f"out={tmp_path / 'out'}", "refine=par").code == 0
    source = Shapes("train", **SHAPES)
    data = DataModule(PseudoMasks(source, str(tmp_path / "out/masks")), batch_size=2, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch["pseudo_mask"].shape == batch["image"].shape[:1] + batch["image"].shape[2:]
    assert "mask" not in batch
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(manifest["masks"]) == source.ids
    assert manifest["masks"]["train-000000"]["size"] == [32, 32]
    assert manifest["settings"]["refine.background.value"] == manifest["settings"]["method.background_threshold"]
    assert manifest["classes"] == list(source.classes)


def test_the_number_of_processes_does_not_show(command: Command, given: list[str], tmp_path: Path) -> None:
    """One alone, and two of which one is interrupted, then three."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert command("label", *given, *SCORES, f"out={alone}").code == 0
    ended = command("label", *given, *SCORES, f"out={shared}", "shards=2", "shard=1")
    assert (ended.code, "3 masks made, share 1 of 2" in ended.out) == (0, True)
    assert "3 of 6 masks are not there yet" in ended.out
    (shared / "masks/train-000003.png").unlink()  # as if it had been killed
    (shared / "masks/.0123-4567.tmp").write_bytes(b"half")
    for shard, made in ((2, 1), (0, 2), (1, 1)):
        assert not (shared / "manifest.json").exists()
        ended = command("label", *given, *SCORES, f"out={shared}", "shards=3", f"shard={shard}")
        assert (ended.code, f"{made} masks made" in ended.out) == (0, True), ended.out
    assert content(shared) == content(alone)
    ended = command("label", *given, *SCORES, f"out={shared}")
    assert (ended.code, "0 masks made" in ended.out) == (0, True)
    assert content(shared) == content(alone)


@pytest.mark.slow
def test_two_at_once_as_torchrun_starts_them(command: Command, given: list[str], tmp_path: Path) -> None:
    assert command("label", *given, *SCORES, f"out={tmp_path / 'alone'}").code == 0
    code = "from wsss.commands.label import main; main()"
    environment = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parent.parent)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given, *SCORES, f"out={tmp_path / 'out'}"], env=environment | {"RANK": rank}
        )
        for rank in "01"
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_an_interrupted_one_goes_on(
    command: Command, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MaskFolder.encode

    def fail(folder: MaskFolder, name: str, *arguments: Any) -> dict[str, bytes]:
        if name == "train-000004":
            raise OSError(28, "No space left on device", str(folder.masks))
        return original(folder, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MaskFolder, "encode", fail)
        ended = command("label", *given, f"out={tmp_path / 'out'}")
    assert (ended.code, "make room, then run again" in ended.err) == (1, True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(before) == 4
    ended = command("label", *given, f"out={tmp_path / 'out'}")
    assert (ended.code, "2 masks made" in ended.out) == (0, True)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert command("label", *given, f"out={tmp_path / 'whole'}").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_do_not_mix(command: Command, given: list[str], tmp_path: Path, trained: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    assert command("label", *given, out).code == 0
    before = content(tmp_path / "out")
    for change, said in (
        (["refine=par"], "refine.dilations"),
        (["method.background_threshold=0.7"], "method.background_threshold"),
        (["cams=true"], "cams"),
        (["split=val"], "fingerprint"),
        (["dataset.seed=1"], "dataset.seed"),
        (["protocol.size=32"], "protocol.size"),
    ):
        refused(command("label", *given, out, *change), said, "give another out")
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    torch.save(checkpoint | {"epoch": 7}, tmp_path / "other.ckpt")
    refused(command("label", f"checkpoint={tmp_path / 'other.ckpt'}", out), "checkpoint_sha256")
    (tmp_path / "moved.ckpt").write_bytes((trained / "checkpoints/last.ckpt").read_bytes())
    assert command("label", f"checkpoint={tmp_path / 'moved.ckpt'}", out, "num_workers=1").code == 0
    assert content(tmp_path / "out") == before
    edited = tmp_path / "out/masks/train-000002.png"
    Image.new("P", (32, 32)).save(edited)
    refused(command("label", *given, out), "train-000002.png", "manifest.json", "remove both")
    edited.write_bytes(b"PNG")
    refused(command("label", *given, out), "train-000002.png is damaged")
    edited.unlink()
    assert command("label", *given, out).code == 0
    assert content(tmp_path / "out") == before
    (tmp_path / "out/settings.json").write_text("[")
    refused(command("label", *given, out), "settings.json is damaged")
    (tmp_path / "out/settings.json").unlink()
    refused(command("label", *given, out), "masks that wsss-label has not made")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dataset.num_classes=3"], ["4 classes", "3"]),
        (["split=test"], ["split", "train or val"]),
        (["scores=true"], ["refine=crf refine.alpha=[4,32]"]),
        (["scores=true", "refine=crf"], ["refine.alpha=[4,32]"]),
        (["instances=true"], ["refine=irn_walk refine.affinity=FILE"]),
        (["instances=true", "refine=walk", "refine.affinity=x"], ["displacements of method=irn"]),
        (["instances=3"], ["instances", "true or false"]),
        (["refine=irn_walk"], ["refine.affinity is not set"]),
        (["refine=label_crf", "refine.background=[0.3]"], ["two scores"]),
        (["shards=2"], ["shard"]),
        (["shards=2", "shard=2"], ["shard is 2"]),
        (["cams=3"], ["cams", "true or false"]),
        (["num_workers=-1"], ["num_workers"]),
        (["refine=crawl"], ["refine=crawl", "crf, crf_quick, irn_walk, label_crf, none, par"]),
        (["refine=crf", "refine.alpha=[4,2]"], ["refine.alpha"]),
        (["refine=crf", "refine.gaussian=[1.0]"], ["refine=crf"]),
        (["refine=par", "refine.dilations=[]"], ["refine=par"]),
        (["refine.background.value=low"], ["refine.background.value", "low"]),
        (["refine.background.rule=pair"], ["background.low"]),
        (["refine.background=3"], ["refine.background"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values(command: Command, given: list[str], tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(command("label", *given, f"out={tmp_path / 'out'}", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_images_of_many_sizes_and_one_without_labels(
    command: Command, on_voc: tuple[Path, Path], tmp_path: Path
) -> None:
    """Damaged masks of the data set, which are opened only to measure, keep none from being made."""
    root, checkpoint = on_voc
    ids = (root / "ImageSets/Segmentation/val.txt").read_text().split()
    changed = make_voc(tmp_path / "voc")
    for path in (changed / "SegmentationClassAug").iterdir():
        path.write_bytes(b"no mask")
    save_labels(
        changed, {name: np.array([name == ids[1]] * 2, np.float32) for name in (*ids, "2007_000032", "2007_000039")}
    )
    arguments = [f"checkpoint={checkpoint}", "num_workers=0", f"dataset.root={changed}", "split=val"]
    for out, more in (("plain", []), ("crf", SCORES)):
        ended = command("label", *arguments, f"out={tmp_path / out}", *more)
        assert ended.code == 0, ended.err
        assert "1 images without a class" in ended.out
        assert "the masks are not measured" in ended.out
        assert json.loads((tmp_path / out / "metrics.json").read_text()) == {"masks": 2}
        masks = {name: mask(tmp_path / out / "masks" / f"{name}.png") for name in ids}
        for name in ids:
            assert masks[name].shape[::-1] == Image.open(changed / "JPEGImages" / f"{name}.jpg").size
        assert not masks[ids[0]].any()
    cams, scores = (np.load(tmp_path / "crf" / kind / f"{ids[0]}.npz") for kind in ("cams", "scores"))
    assert cams["cam"].shape == (0, *masks[ids[0]].shape)
    assert scores["ids"].shape == (0,)
    assert (scores["low"] == 1).all()
    assert scores["high"].shape == (1, *masks[ids[0]].shape)


@pytest.mark.parametrize("split", ["train", "val"])
def test_figures_of_cams_and_masks(command: Command, given: list[str], tmp_path: Path, split: str) -> None:
    """Those of the metrics that evaluations use, of training images too; interrupted or not."""
    out = tmp_path / "out"
    arguments = [*given, f"split={split}", f"out={out}", "cams=true", "method.background_threshold=0.3"]
    assert command("label", *arguments).code == 0
    figures = json.loads((out / "metrics.json").read_text())
    images = Shapes(split, **SHAPES)
    cams, masks = CamIoU(4, 0.3), SegmentationIoU(5)
    for index, name in enumerate(images.ids):
        arrays, truth = np.load(out / "cams" / f"{name}.npz"), torch.from_numpy(images.mask(index)).long()
        cam = torch.zeros(1, 4, 32, 32)
        cam[0, arrays["ids"] - 1] = torch.from_numpy(arrays["cam"].astype(np.float32))
        cams.update(cam, torch.from_numpy(images[index]["label"])[None], truth[None])
        masks.update(torch.from_numpy(mask(out / "masks" / f"{name}.png")), truth)
    best, threshold = cams.best()
    assert figures[f"{split}/mask_miou"] == pytest.approx(masks.compute().item())
    assert figures[f"{split}/cam_miou"] == pytest.approx(cams.compute().item(), abs=1e-3)  # the file is of 16 bits
    assert figures[f"{split}/cam_best_miou"] == pytest.approx(best.item(), abs=1e-3)
    assert figures[f"{split}/cam_best_threshold"] == pytest.approx(threshold.item(), abs=0.011)
    assert figures[f"{split}/iou/background"] == pytest.approx(masks.iou()[0].item())
    assert "true image labels, no CRF, threshold 0.3" in figures[f"protocol/{split}/cam_miou"]
    assert "chosen with these masks" in figures[f"protocol/{split}/cam_best_miou"]
    assert "refine=none (background.rule constant" in figures[f"protocol/{split}/mask_miou"]
    before = content(out)
    for path in ("metrics.json", f"masks/{images.ids[1]}.png"):
        (out / path).unlink()
    assert command("label", *arguments).code == 0
    assert content(out) == before
    (out / "counts" / f"{images.ids[2]}.npz").write_bytes(b"PK")
    refused(command("label", *arguments), f"{images.ids[2]}.npz is damaged", "the mask of this name")


def test_true_masks_change_no_mask(command: Command, on_voc: tuple[Path, Path], tmp_path: Path) -> None:
    """With all, with some, and with none of them."""
    _, checkpoint = on_voc
    left: list[dict[str, bytes]] = []
    for number, count in enumerate((2, 1, 0)):
        root = make_voc(tmp_path / "voc")
        names = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
        for name in names[count:]:
            (root / "SegmentationClassAug" / f"{name}.png").unlink()
        out = tmp_path / str(number)
        ended = command("label", f"checkpoint={checkpoint}", "num_workers=0", f"dataset.root={root}", f"out={out}")
        assert ended.code == 0, ended.err
        figures = json.loads((out / "metrics.json").read_text())
        if count:
            assert f"train, {count} images" in figures["protocol/train/cam_miou"]
            assert f"train, {count} images" in figures["protocol/train/mask_miou"]
        else:
            assert figures == {"masks": 2}
            assert "nothing is measured" in ended.out
        left.append(
            {k: v for k, v in content(out).items() if not k.startswith(("counts/", "metrics.json", "tags.json"))}
        )
        (tmp_path / "voc").rename(tmp_path / f"voc{number}")
    assert left[0] == left[1] == left[2]


def test_an_image_that_cannot_be_used(
    command: Command, on_voc: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = on_voc
    root = make_voc(tmp_path / "voc")
    names = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    (root / "JPEGImages" / f"{names[0]}.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = [f"checkpoint={checkpoint}", "num_workers=0", f"dataset.root={root}"]
    ended = command("label", *arguments, f"out={tmp_path / 'out'}")
    refused(ended, f"{names[0]}.jpg", "1 images", "no manifest")
    left = [f"counts/{names[1]}.npz", f"masks/{names[1]}.png", "settings.json"]
    assert sorted(content(tmp_path / "out")) == left
    assert command("label", *arguments, f"out={tmp_path / 'skip'}", "on_bad_image=skip").code == 0
    assert list(json.loads((tmp_path / "skip/manifest.json").read_text())["masks"]) == [names[1]]
    assert names[0] in (tmp_path / "skip/skipped.txt").read_text()

    def full(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    (root / "JPEGImages" / f"{names[0]}.jpg").write_bytes((root / "JPEGImages" / f"{names[1]}.jpg").read_bytes())
    monkeypatch.setattr("wsss.commands.label.make_one", full)
    ended = command("label", *arguments, f"out={tmp_path / 'out'}")
    refused(ended, f"{names[0]}: there is not enough memory for its 40x40 pixels")
    monkeypatch.undo()


def test_what_makes_no_maps(
    command: Command, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss.methods.base.WSSSModule", int)
    refused(command("label", *given, f"out={tmp_path / 'out'}"), "method=toco makes no class activation maps")


def test_the_chain_of_psa(command: Command, given: list[str], trained: Path, tmp_path: Path) -> None:
    """CAMs make scores, scores an affinity network, its walk the masks."""
    assert command("label", *given, *SCORES, f"out={tmp_path / 'first'}").code == 0
    small = [o for o in RESNET38_OVERRIDES if not o.startswith("method.cam_scales")] + [
        "method.losses.affinity.radius=2"
    ]
    scores = f"pseudo_scores={tmp_path / 'first/scores'}"
    ended = command("train", "method=affinity", *small, scores, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    network = tmp_path / "run/checkpoints/last.ckpt"
    walk = ["refine=walk", f"refine.affinity={network}", "refine.logt=3", "refine.background=0.3"]
    ended = command("label", *given, *walk, f"out={tmp_path / 'second'}")
    assert ended.code == 0, ended.err

    shapes, method = Shapes("train", **SHAPES), load_stage(str(trained / "checkpoints/last.ckpt"))
    affinity, normalise = load_stage(str(network)), Normalise(method.mean, method.std)
    for index, image_id in enumerate(shapes.ids):
        item = shapes[index]
        photo, label = normalise(item["image"])[None], torch.tensor(item["label"])[None]
        walked = affinity.refine(photo, method.infer(photo)["cam"], label, background=0.3, logt=3)
        absent = torch.cat([torch.ones(1, 1), label], dim=1)[:, :, None, None] == 0
        expected = walked.masked_fill(absent, -1).argmax(1)[0]
        assert (mask(tmp_path / "second/masks" / f"{image_id}.png") == expected.numpy()).mean() > 0.999

    other = command("label", *given, *walk[:1], f"refine.affinity={trained / 'checkpoints/last.ckpt'}", "out=x")
    refused(other, "is of ToCo", "method=affinity")
    refused(command("label", *given, "refine=walk", "out=x"), "refine.affinity is not set")
    refused(command("label", *given, *walk[:2], "refine.logt=99", "out=x"), "logt")


def test_the_chain_of_irn(command: Command, given: list[str], trained: Path, tmp_path: Path) -> None:
    """CAMs make labels, labels boundaries and displacements, their walk masks and instances."""
    labels = ["refine=label_crf", "refine.background=[0.3,0.6]", "refine.iterations=2"]
    assert command("label", *given, *labels, f"out={tmp_path / 'first'}").code == 0
    masks = f"pseudo_masks={tmp_path / 'first/masks'}"
    ended = command("train", "method=irn", *IRN_OVERRIDES, masks, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    network, out = tmp_path / "run/checkpoints/last.ckpt", tmp_path / "second"
    walk = ["refine=irn_walk", f"refine.affinity={network}", "refine.logt=3"]
    ended = command("label", *given, *walk, f"out={out}", "instances=true")
    assert ended.code == 0, ended.err
    whole = content(out)
    assert len(whole) == 6 * 4 + 4  # mask, instances in two files and counts of each, and what tells of all

    shapes, method, irn = (
        Shapes("train", **SHAPES),
        load_stage(str(trained / "checkpoints/last.ckpt")),
        load_stage(str(network)).eval(),
    )
    normalise, listed = Normalise(method.mean, method.std), json.loads(whole["manifest.json"])["masks"]
    for index, image_id in enumerate(shapes.ids):
        item = shapes[index]
        shown = np.flatnonzero(item["label"])
        cam = method.infer(normalise(item["image"])[None])["cam"][0, shown]
        colours = torch.from_numpy(item["image"]).permute(2, 0, 1).float()
        refined = irn.walk(colours, resize(cam[None], (32, 32))[0], logt=3, instances=True)
        ids = np.array([0, *(shown + 1)])
        assert (mask(out / "masks" / f"{image_id}.png") == ids[refined.mask]).mean() > 0.999
        files = [out / "instances" / f"{image_id}{suffix}" for suffix in (".png", ".json")]
        with Image.open(files[0]) as picture:
            numbers = np.array(picture)
        assert files[0].read_bytes()[24] == 16  # bits of a pixel, which older Pillow reads into 32
        assert (numbers == refined.instances.numbers.numpy()).mean() > 0.999
        rows = json.loads(files[1].read_text())["instances"]
        assert [row["number"] for row in rows] == list(range(1, 1 + numbers.max()))
        assert [row["id"] for row in rows] == [int(ids[k + 1]) for k in refined.instances.classes]
        assert [row["class"] for row in rows] == [shapes.classes[row["id"] - 1] for row in rows]
        assert [row["score"] for row in rows] == pytest.approx(refined.instances.scores, abs=1e-4)
        assert listed[image_id]["instances_sha256"] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    (out / "manifest.json").unlink()
    (out / "instances/train-000001.json").unlink()  # as if it had been killed
    ended = command("label", *given, *walk, f"out={out}", "instances=true")
    assert (ended.code, "1 masks made" in ended.out) == (0, True)
    assert content(out) == whole
    (out / "instances/train-000001.json").write_text("{}")
    refused(command("label", *given, *walk, f"out={out}", "instances=true"), "train-000001.json", "manifest.json")
    refused(command("label", *given, *walk, f"out={out}"), "different are instances")
    assert command("label", *given, *walk, f"out={tmp_path / 'plain'}").code == 0
    assert {k: v for k, v in content(tmp_path / "plain").items() if k.endswith(".png")} == {
        k: v for k, v in whole.items() if k.startswith("masks")
    }

    other = command("label", *given, *walk[:1], f"refine.affinity={trained / 'checkpoints/last.ckpt'}", "out=x")
    refused(other, "is of ToCo", "method=irn")
    refused(
        command("label", *given, "refine=walk", f"refine.affinity={network}", "out=x"), "is of IRN", "method=affinity"
    )
    refused(command("label", *given, *walk[:2], "refine.logt=99", "out=x"), "logt")


def test_large_images_are_refined_at_the_size_of_the_protocol(
    command: Command, given: list[str], tmp_path: Path
) -> None:
    from wsss.refine import pseudo

    sizes, original, large = [], pseudo.crf, ["dataset.size=64", "protocol.max_side=32"]
    with pytest.MonkeyPatch.context() as patch:

        def seen(image: torch.Tensor, cam: torch.Tensor, alpha: Any = 4.0, **settings: Any) -> pseudo.Refined:
            sizes.append((image.shape[-2:], cam.shape[-2:]))
            return original(image, cam, alpha, **settings)

        seen.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        patch.setattr(pseudo, "crf", seen)
        assert command("label", *given, *SCORES, f"out={tmp_path / 'out'}", *large).code == 0
    assert set(sizes[1:]) == {((32, 32), (32, 32))}  # after the trial of the command
    for image_id in Shapes("train", **SHAPES).ids:
        found = mask(tmp_path / "out/masks" / f"{image_id}.png")
        assert found.shape == (64, 64)
        assert (found == found[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)).all()
        arrays = np.load(tmp_path / "out/scores" / f"{image_id}.npz")
        assert arrays["low"].shape == (1 + len(arrays["ids"]), 64, 64)
