"""wsss-data at the command, and what training and evaluation make of a folder of photographs."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import instances
import numpy as np
import pytest
import torch
from PIL import Image
from served import Server, make_tar
from tiny import OVERRIDES, Ended
from voc2012 import sbd_files, voc_files

from wsss.prepare import download

Command = Callable[..., Ended]
TINY = [o for o in OVERRIDES if not o.startswith("dataset.")] + ["data.eval_batch_size=1", "method.weights=null"]


def test_check_of_a_sound_folder(command: Command, photographs: Path) -> None:
    ended = command("data", "check", "dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks")
    assert ended.code == 0, ended.err
    assert "8 images, 2 classes" in ended.out
    assert "1 images without any class" in ended.out
    assert "height 40 to 47" in ended.out
    assert "nothing to evaluate on" in ended.out
    assert "no problem found" in ended.out
    assert list(Path.cwd().iterdir()) == []


def test_check_lists_whatever_does_not_fit(command: Command, photographs: Path) -> None:
    labels = photographs / "labels.csv"
    rows = labels.read_text(encoding="utf-8").splitlines()
    (photographs / "im Urlaub/Bild 3 (groß).JPG").write_bytes(b"\xff\xd8nothing")
    labels.write_text("\n".join([*rows[:-1], "gone.jpg,dog"]), encoding="utf-8")
    ended = command("data", "check", "dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks")
    assert ended.code == 2
    assert "Bild 7 (groß) has no entry" in ended.out
    assert "gone.jpg, which is no image" in ended.out
    assert "Bild 3 (groß).JPG cannot be read" in ended.out  # all images are opened nevertheless
    assert "height 40 to 47" in ended.out
    labels.write_text("\n".join(rows), encoding="utf-8")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(photographs / "masks/Bild 5 (groß).png")
    ended = command(
        "data", "check", "dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "dataset.val=0.9"
    )
    assert ended.code == 2
    problems = [line for line in ended.out.splitlines() if line.startswith("- ")]
    assert len(problems) == 2
    assert any("Bild 3" in line and "cannot be read as an image" in line for line in problems)
    assert any("Bild 5" in line and "expected one size" in line for line in problems)
    assert "2 problems" in ended.err


def test_check_sees_ids_in_another_order(command: Command, photographs: Path) -> None:
    arguments = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "dataset.val=0.9"]
    names = [("cat", "dog", "cat")[n % 3] if n else "" for n in range(8)]  # what the masks show
    rows = ["file,labels", *(f"im Urlaub/Bild {n} (groß).JPG,{name}" for n, name in enumerate(names))]
    (photographs / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    assert command("data", "check", *arguments).code == 0
    (photographs / "class_names.txt").write_text("dog\ncat\n")
    ended = command("data", "check", *arguments)
    assert ended.code == 2
    assert "masks show a class that the image's labels do not name" in ended.out
    assert command("data", "check", *arguments, "dataset.classes=[cat,dog]").code == 0
    ended = command("train", *TINY, *arguments, "hydra.run.dir=run")
    assert ended.code == 2
    assert "the order of the classes (1 dog, 2 cat)" in ended.err
    assert not Path("run").exists()  # before anything is trained


def test_training_says_what_check_says(command: Command, photographs: Path) -> None:
    """Pictures that are not read, classes that nothing shows, images on both sides, and names of every kind."""
    (photographs / "labels.csv").unlink()
    shutil.rmtree(photographs / "masks")
    (photographs / "im Urlaub").rename(photographs / "cat")
    copies = photographs / "dog" / os.fsdecode(b"caf\xe9\n\x1b[1m")
    copies.mkdir(parents=True)
    for n in range(3):
        shutil.copy(photographs / f"cat/Bild {n} (groß).JPG", copies / os.fsdecode(b"\xe9%d\n.jpg" % n))
    (copies / "x.heic").touch()
    (photographs / "class_names.txt").write_text("cat\ndog\ncow\n")
    lists = {name: photographs / f"{name}.txt" for name in ("train", "val")}
    lists["train"].write_text("".join(f"cat/Bild {n} (groß)\n" for n in range(8)), encoding="utf-8")
    folder = ["dataset=folder", f"dataset.root={photographs}", "dataset.train=train.txt", "dataset.val=all"]
    ended = command("data", "check", *folder)
    assert ended.code == 0, ended.err
    trained = command("train", *TINY, *folder, "hydra.run.dir=run")
    assert trained.code == 0, trained.err
    predicted = command(
        "predict", "checkpoint=run/checkpoints/last.ckpt", f"images={copies}", "out=out", "overlay=false"
    )
    assert predicted.code == 0, predicted.err
    assert len(list(Path("out/masks").glob("*.png"))) == 3
    assert "1 images of kinds that are not read are left out, 1 .heic" in predicted.out
    for out in (ended.out, trained.out):
        assert "1 images of kinds that are not read are left out, 1 .heic" in out
        assert "no training image shows cow" in out
        assert "11 of 11 images to evaluate on are trained on too" in out
        assert "caf\\udce9\\n\\x1b[1m/x.heic" in out
    (copies / os.fsdecode(b"\xe9\n.jpg")).write_bytes(b"no image")
    for ended in (
        command("data", "check", *folder),
        command("train", *TINY, *folder, "hydra.run.dir=run2"),
        command("train", *TINY, *folder, "on_bad_image=skip", "hydra.run.dir=run3"),
        command("predict", "checkpoint=run/checkpoints/last.ckpt", f"images={copies}", "out=out2"),
    ):
        assert "Traceback" not in ended.err, ended.err
        assert "cannot be read as an image" in ended.err + ended.out
        assert "\x1b[1m" not in ended.err + ended.out


def test_a_test_set_may_show_fewer_classes(command: Command, photographs: Path, tmp_path: Path) -> None:
    train = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "hydra.run.dir=run"]
    assert command("train", *TINY, *train).code == 0
    test = tmp_path / "test"
    (test / "masks").mkdir(parents=True)
    for name in ("Bild 1 (groß)", "Bild 4 (groß)"):
        shutil.copy(photographs / f"im Urlaub/{name}.JPG", test)
        shutil.copy(photographs / f"masks/{name}.png", test / "masks")
    (test / "labels.csv").write_text("file,labels\nBild 1 (groß).JPG,dog\nBild 4 (groß).JPG,dog\n", encoding="utf-8")
    asked = [
        "checkpoint=run/checkpoints/last.ckpt",
        f"dataset.root={test}",
        "dataset.val=all",
        "trainer.accelerator=cpu",
    ]
    ended = command("eval", *asked, "hydra.run.dir=eval")
    assert ended.code == 0, ended.err
    assert "shows 1 of the checkpoint's classes, taken as dataset.classes" in ended.out
    (test / "class_names.txt").write_text("dog\n")  # whoever lists classes knows the order of their masks
    ended = command("eval", *asked, "hydra.run.dir=eval2")
    assert ended.code == 2
    assert "holds the ids [2]" in ended.err or "dataset.classes" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected check, voc, coco, shards, index, weights, found nothing"),
        (["chek"], "found chek"),
        (["check", "dataset=foldr"], "known are coco, folder, shapes, shards, voc"),
        (["check", "dataset=folder"], "dataset.root is not set"),
        (["check", "dataset=folder", "dataset.root=/nowhere"], "/nowhere"),
        (["voc"], "root is not set"),
        (["voc", "rot=x"], "did you mean root"),
        (["coco", "root=/nowhere"], "unpack COCO's annotations"),
        (["coco", "root=/nowhere", "rule=any"], "/nowhere"),
    ],
)
def test_mistakes(command: Command, arguments: list[str], said: str) -> None:
    ended = command("data", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_help(command: Command) -> None:
    assert "wsss-data coco" in command("data", "--help").out


def test_voc(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = Server()
    made = [
        make_tar(tmp_path / "v.tar", {f"VOCdevkit/VOC2012/{k}": v for k, v in voc_files().items()}),
        make_tar(tmp_path / "s.tgz", {f"benchmark_RELEASE/dataset/{k}": v for k, v in sbd_files().items()}, "w:gz"),
    ]
    server.content = made[0].read_bytes()
    server.drop = len(server.content) // 2
    ended = command(
        "data",
        "voc",
        f"root={tmp_path / 'VOC 2012'}",
        f"voc_url={server.url}",
        f"sbd_url={made[1].as_uri()}",
        f"voc_md5={hashlib.md5(made[0].read_bytes()).hexdigest()}",
        "sbd_md5=null",
    )
    server.close()
    assert ended.code == 0, ended.err
    assert len(server.seen) > 1  # the connection was dropped
    assert "train_aug of 4 images" in ended.out
    assert command("data", "check", "dataset=voc", f"dataset.root={tmp_path / 'VOC 2012'}").code == 0


def test_coco(command: Command, tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = tmp_path / "annotations" / f"instances_{split}2014.json"
        path.parent.mkdir(exist_ok=True)
        instances.save(path, instances.small())
    ended = command("data", "coco", f"root={tmp_path}")
    assert ended.code == 0, ended.err
    assert ended.out.count("3 masks by the rule wsss (3 written now)") == 2
    assert len(list((tmp_path / "masks/val2014").glob("*.png"))) == 3
    assert "(0 written now)" in command("data", "coco", f"root={tmp_path}").out


def test_a_folder_from_check_to_masks(command: Command, photographs: Path, tmp_path: Path) -> None:
    """Train without an evaluation set, predict, and evaluate on every image."""
    folder = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks"]
    ended = command("train", *TINY, *folder, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "evaluation is left out" in ended.out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert not [key for key in metrics if key.startswith("val/")]
    assert (tmp_path / "run/examples.png").stat().st_size > 0
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    ended = command("predict", checkpoint, f"images={photographs / 'im Urlaub'}", f"out={tmp_path / 'out'}")
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "out/masks").glob("*.png"))) == 8
    assert "dataset.val=all" in command("eval", checkpoint, "trainer.accelerator=cpu").err
    ended = command(
        "eval", checkpoint, "dataset.val=all", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / 'eval'}"
    )
    assert ended.code == 0, ended.err
    assert "val/miou" in json.loads((tmp_path / "eval/metrics.json").read_text())


def test_bad_images_are_skipped_and_listed(command: Command, photographs: Path, tmp_path: Path) -> None:
    (photographs / "im Urlaub/Bild 3 (groß).JPG").write_bytes(b"")
    folder = [
        "dataset=folder",
        f"dataset.root={photographs}",
        "dataset.masks=masks",
        "dataset.val=0.25",
        "dataset.seed=1",
    ]
    run = tmp_path / "run"
    ended = command("train", *TINY, *folder, "trainer.max_steps=4", f"hydra.run.dir={run}")
    assert ended.code == 2
    assert "Bild 3" in ended.err
    ended = command("train", *TINY, *folder, "on_bad_image=skip", f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    assert "1 images cannot be used" in ended.out
    (line,) = (run / "skipped.txt").read_text().splitlines()
    assert "Bild 3" in line
    assert "on_bad_image is 'drop': expected error or skip" in command("train", *TINY, *folder, "on_bad_image=drop").err
    for path in (photographs / "im Urlaub").iterdir():
        path.write_bytes(b"")
    ended = command("train", *TINY, *folder, "on_bad_image=skip", f"hydra.run.dir={run}2")
    assert ended.code == 2
    assert "none of the" in ended.err


def test_classes_without_background(command: Command, photographs: Path, tmp_path: Path) -> None:
    folder = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "dataset.val=0.5"]
    run = tmp_path / "run"
    ended = command("train", *TINY, *folder, "dataset.has_background=false", f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    assert "no background" in (run / "metrics.json").read_text()
    checkpoint = run / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["wsss"]["has_background"] is False
    ended = command("predict", f"checkpoint={checkpoint}", f"images={photographs / 'im Urlaub'}", f"out={run / 'out'}")
    assert ended.code == 0, ended.err
    for path in (run / "out/masks").glob("*.png"):
        assert np.asarray(Image.open(path)).min() >= 1
