"""Shards: the same batches as from files, on a disk and over HTTP, killed and resumed; and what is no shard."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served import FolderServer
from tiny import OVERRIDES, Ended, content, refused

from wsss import InputError
from wsss.data.datamodule import DataModule, EndlessSampler
from wsss.data.features import feature_names
from wsss.data.folder import Folder
from wsss.data.shapes import Shapes
from wsss.data.shards import Shards

Command = Callable[..., Ended]
SHAPES: dict[str, Any] = {"size": 32, "train_size": 6, "val_size": 4, "num_classes": 4}
ON_SHAPES = [f"dataset.{key}={value}" for key, value in SHAPES.items()]
SETTINGS = {"val": 0.4, "masks": "masks"}
GIVEN = ["dataset.val=0.4", "dataset.masks=masks", "images_per_shard=2", "num_workers=0"]


@pytest.fixture
def made(command: Command, photographs: Path, tmp_path: Path) -> Path:
    """Shards of the photographs with odd names, two images each."""
    out = tmp_path / "shards"
    ended = command("data", "shards", f"out={out}", f"dataset.root={photographs}", *GIVEN)
    assert ended.code == 0, ended.err
    return out


@pytest.fixture
def served(made: Path) -> Iterator[FolderServer]:
    server = FolderServer(made)
    yield server
    server.close()


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def batches(train: Any, val: Any, workers: int = 0, count: int = 6) -> list[dict[str, Any]]:
    data = DataModule(train, val, batch_size=2, num_workers=workers, seed=3)
    return [*islice(iter(data.train_dataloader()), count), *data.val_dataloader()]


def compare(root: str, photographs: Path, workers: int = 0) -> None:
    theirs = batches(*(Folder(str(photographs), split, **SETTINGS) for split in ("train", "val")))
    ours = batches(Shards(root, "train"), Shards(root, "val"), workers)
    assert len(ours) == len(theirs) > 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(equal(one[key], other[key]) for key in one)
    assert all("mask" not in batch for batch in ours[:6])
    assert "mask" in ours[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_files(made: Path, photographs: Path, workers: int) -> None:
    compare(str(made), photographs, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http(served: FolderServer, photographs: Path, workers: int) -> None:
    """The head process has asked before its workers are forked."""
    compare(served.url, photographs, workers)
    spans = [span for name, span in served.seen if name.endswith(".tar")]
    assert spans
    assert all(spans)  # each request takes an image, none a whole file


def test_a_shard_is_what_webdataset_reads(made: Path, photographs: Path) -> None:
    """Bytes as they are in the files, names and labels in JSON; also by the library itself, where it is installed."""
    source = Folder(str(photographs), **SETTINGS)
    with tarfile.open(made / "train-000000.tar") as tar:
        names = tar.getnames()
        members = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert names == [f"{n:09d}.{kind}" for n in (0, 1) for kind in ("jpg", "json", "mask.png")]
    for index in (0, 1):
        assert members[f"{index:09d}.jpg"] == source.images[index].read_bytes()  # type: ignore[union-attr]
        said = json.loads(members[f"{index:09d}.json"])
        present = [name for name, one in zip(source.classes, source.label(index), strict=True) if one]
        assert said == {"id": source.ids[index], "labels": present}
        mask = np.asarray(Image.open(io.BytesIO(members[f"{index:09d}.mask.png"])))
        assert np.array_equal(mask, source.truth(index, source[index]["image"]))
    library = pytest.importorskip("webdataset", reason="webdataset is not installed (the extra scale)")
    read = list(library.WebDataset(str(made / "train-000000.tar"), shardshuffle=False))
    assert [sample["jpg"] for sample in read] == [members[name] for name in names if name.endswith("jpg")]


def test_what_labelled_images_have(made: Path, photographs: Path) -> None:
    ours, theirs = Shards(str(made), "val"), Folder(str(photographs), "val", **SETTINGS)
    assert (ours.classes, ours.ids, len(ours)) == (theirs.classes, theirs.ids, len(theirs))
    assert np.array_equal(ours.labels, theirs.labels)
    assert ours.has_masks
    assert not ours.without_masks().has_masks
    assert "mask" not in ours.without_masks()[0]
    assert ours.too_small(45).keys() == theirs.too_small(45).keys() != set()
    train = Shards(str(made))
    assert not train.has_masks
    assert np.array_equal(
        train.truth(0, train[0]["image"]), Folder(str(photographs), **SETTINGS).truth(0, train[0]["image"])
    )
    assert len(set(feature_names(train))) == len(train)
    assert feature_names(train) == feature_names(Shards(str(made)))
    assert train.fingerprint == Shards(str(made)).fingerprint != ours.fingerprint


def test_drawn_images(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ended = command("data", "shards", "dataset=shapes", *ON_SHAPES, f"out={out}", "images_per_shard=4", "num_workers=1")
    assert ended.code == 0, ended.err
    for split in ("train", "val"):
        ours, theirs = Shards(str(out), split), Shapes(split, **SHAPES)
        assert ours.ids == theirs.ids
        for index in range(len(theirs)):
            assert all(np.array_equal(ours[index][key], value) for key, value in theirs[index].items())
            assert np.array_equal(ours.truth(index, ours[index]["image"]), theirs.mask(index))
    checked = command("data", "check", "dataset=shards", f"dataset.root={out}", "num_workers=0")
    assert (checked.code, "no problem found" in checked.out) == (0, True)


def test_resume_misses_nothing(made: Path) -> None:
    """State after some batches, and on: the ids of an unbroken run, every image once a pass."""
    images = Shards(str(made))
    sampler = islice(iter(EndlessSampler(len(images), 3)), 4 * len(images))
    whole = [images.ids[index] for _, index in sampler]
    data = DataModule(images, batch_size=2, num_workers=2, seed=3)
    before = [name for batch in islice(iter(data.train_dataloader()), 3) for name in batch["id"]]
    again = DataModule(Shards(str(made)), batch_size=2, num_workers=1, seed=3)
    source: Any = again.train_dataloader().dataset
    rest = islice(iter(EndlessSampler(len(images), 3, start=len(before))), 4 * len(images) - len(before))
    after = [source[position, index]["id"] for position, index in rest]
    assert before + after == whole
    for start in range(0, len(whole), len(images)):
        assert sorted(whole[start : start + len(images)]) == sorted(images.ids)


@pytest.mark.slow
def test_a_training_killed_and_resumed(command: Command, served: FolderServer, tmp_path: Path) -> None:
    """Weights of a training over HTTP that was cut are those of one from a disk that was not."""
    small = [o for o in OVERRIDES if not o.startswith(("dataset.", "data.eval", "trainer.max", "trainer.val"))]
    small += ["dataset=shards", "data.eval_batch_size=1", "trainer.val_check_interval=2", "monitor=null"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended = command("train", *small, f"dataset.root={served.root}", "trainer.max_steps=4", f"hydra.run.dir={whole}")
    assert ended.code == 0, ended.err
    code = "from wsss.commands.train import main; main()"
    arguments = [*small, f"dataset.root={served.url}", "trainer.max_steps=4", f"hydra.run.dir={cut}", "resume=auto"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)
    while process.poll() is None and not list(cut.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = command("train", *arguments)
    assert ended.code == 0, ended.err
    first, second = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, cut))
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    code = "import sys; sys.argv[0] = 'wsss-data'; from wsss.commands.data import main; main()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


@pytest.mark.slow
def test_writing_is_killed_and_goes_on(command: Command, made: Path, photographs: Path, tmp_path: Path) -> None:
    """Whenever it is killed: what is complete stays as it is, and the end is that of an undisturbed one."""
    out = tmp_path / "killed"
    arguments = ["shards", f"out={out}", f"dataset.root={photographs}", *GIVEN]
    for seen in (0, 2):
        process = start(arguments)
        while process.poll() is None and len(list(out.glob("*.json"))) <= seen:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (out / ".0123-4567.tmp").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.with_suffix(".json").exists()}
    assert before
    ended = command("data", *arguments)
    assert ended.code == 0, ended.err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert content(out) == content(made)


def test_shares_make_the_same(command: Command, made: Path, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    arguments = ["shards", f"out={out}", f"dataset.root={photographs}", *GIVEN]
    for shard in (2, 0, 1):
        assert not (out / "index.json").exists()
        ended = command("data", *arguments, "shards=3", f"shard={shard}")
        assert ended.code == 0, ended.err
    assert content(out) == content(made)
    (made / "train-000001.json").unlink()  # the tar was complete, its index was not written
    (made / "train-000001.tar").write_bytes(b"older")
    ended = command("data", "shards", f"out={made}", *arguments[2:])
    assert (ended.code, "1 of 5 shards written, 2 images" in ended.out) == (0, True), ended.out
    assert content(out) == content(made)
    refused(command("data", *arguments, "images_per_shard=3"), "other images", "another out")
    refused(command("data", *arguments, "images_per_shard=0"), "images_per_shard is 0")


def test_images_that_cannot_be_used(command: Command, photographs: Path, tmp_path: Path) -> None:
    (photographs / "im Urlaub/Bild 3 (groß).JPG").write_bytes(b"no image")
    arguments = ["shards", f"out={tmp_path / 'out'}", f"dataset.root={photographs}", "images_per_shard=3"]
    for workers in ("num_workers=0", "num_workers=1"):
        refused(command("data", *arguments, "dataset.masks=masks", workers), "Bild 3", "cannot be read as an image")
    assert not (tmp_path / "out/index.json").exists()
    ended = command(
        "data", *arguments, "dataset.masks=masks", "on_bad_image=skip", "num_workers=0", f"out={tmp_path / 'skip'}"
    )
    assert ended.code == 0, ended.err
    assert "Bild 3" in (tmp_path / "skip/skipped.txt").read_text()
    assert len(Shards(str(tmp_path / "skip"))) == 7


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def beyond(path: Path) -> None:
    """A member that would take all memory."""
    images = json.loads(path.read_text())["images"]
    change(path, images=images | {"length": [images["length"][0], 2**62]})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda out: (out / "index.json").unlink(), ["index.json does not exist"]),
        (lambda out: (out / "index.json").write_text("{"), ["index.json is damaged"]),
        (lambda out: change(out / "index.json", version=2), ["version 2, expected 1"]),
        (lambda out: change(out / "index.json", classes="cat"), ["no classes"]),
        (lambda out: change(out / "index.json", splits={"train": ["other"]}), ["other.json does not exist"]),
        (lambda out: (out / "train-000001.tar").unlink(), ["train-000001.tar", "no file"]),
        (lambda out: os.truncate(out / "train-000001.tar", 512), ["train-000001.tar", "found 512 bytes"]),
        (lambda out: change(out / "train-000000.json", ids=["a"]), ["different images"]),
        (lambda out: change(out / "train-000000.json", ids=["../a", "b"]), ["'../a'", "no name below a folder"]),
        (lambda out: change(out / "train-000000.json", labels=[[9], [0]]), ["[9]", "from 0 to 1"]),
        (lambda out: change(out / "train-000000.json", images={"offset": ["x"]}), ["cannot be"]),
        (lambda out: beyond(out / "train-000000.json"), ["cannot be"]),
        (lambda out: change(out / "index.json", splits={"train": 7}), ["no names, each once"]),
        (lambda out: change(out / "index.json", splits={"train": ["train-000000"] * 2}), ["no names, each once"]),
        (lambda out: change(out / "index.json", splits={"train": ["../shards/train-000000"]}), ["no names"]),
        (lambda out: [change(out / f"train-00000{n}.json", labels=[[0]] * (1 + 2 * n)) for n in (0, 1)], ["different"]),
        (lambda out: change(out / "train-000000.json", masked=[0, 5]), ["masks of what is no image"]),
        (lambda out: change(out / "train-000000.json", masked=[0, [1]]), ["masks of what is no image"]),
        (lambda out: change(out / "train-000000.json", masked=[0]), ["masks of what is no image"]),
        (lambda out: change(out / "train-000000.json", masked=None), ["masks of what is no image"]),
    ],
    ids=range(20),
)
def test_what_is_no_shard(made: Path, harm: Callable[[Path], Any], words: list[str]) -> None:
    harm(made)
    with pytest.raises(InputError) as caught:
        Shards(str(made))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_changed_byte_is_noticed(made: Path) -> None:
    path = made / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    images = Shards(str(made))
    with pytest.raises(InputError, match="at byte 512 does not hold"):
        images[0]
    images[1]


def test_what_a_server_may_do(served: FolderServer) -> None:
    images = Shards(served.url)
    served.ranges = False
    with pytest.raises(InputError, match="server that answers ranges"):
        images[0]
    served.ranges, served.broken = True, ("train-000000.tar",)
    with pytest.raises(InputError, match=r"train-000000.tar cannot be read \(500"):
        images[0]
    (served.root / "train-000000.tar").unlink()
    served.broken = ()
    with pytest.raises(InputError, match=r"train-000000.tar does not exist"):
        images[0]
    with pytest.raises(InputError, match=r"index.json does not exist"):
        Shards(f"{served.url}/elsewhere")


def test_an_index_of_the_web_names_no_file_of_this_machine(served: FolderServer) -> None:
    change(served.root / "train-000000.json", tar=str(served.root / "train-000000.tar"))
    with pytest.raises(InputError, match=r"names .*train-000000.tar, a file of this machine"):
        Shards(served.url)


def foreign(folder: Path, photographs: Path) -> list[str]:
    """Two tar files as the webdataset library writes them, with the same keys in both."""
    library = pytest.importorskip("webdataset", reason="webdataset is not installed (the extra scale)")
    source = Folder(str(photographs), masks="masks")
    for number in range(2):
        with library.TarWriter(str(folder / f"x-{number}.tar")) as sink:
            for row in range(3):
                index = 3 * number + row
                sample = {"__key__": f"{row:04d}", "jpg": source.images[index].read_bytes()}  # type: ignore[union-attr]
                sample["cls"] = " ".join(map(str, np.flatnonzero(source.label(index)).tolist()))
                sink.write(sample | {"txt.pyd": b"cos\nsystem\n(S'exit'\ntR."})
    return list(source.classes)


def test_shards_of_others(command: Command, photographs: Path, tmp_path: Path) -> None:
    classes = foreign(tmp_path, photographs)
    source, tars = Folder(str(photographs), masks="masks"), f"{tmp_path}/x-{{0..1}}.tar"
    refused(command("data", "index", f"out={tmp_path / 'none'}", f"tars={tars}"), "classes=[NAME,...]")
    ended = command("data", "index", f"out={tmp_path / 'index'}", f"tars={tars}", f"classes=[{','.join(classes)}]")
    assert ended.code == 0, ended.err
    images = Shards(str(tmp_path / "index"))
    assert images.ids == [f"{number:06d}/{row:04d}" for number in range(2) for row in range(3)]
    for index in range(6):
        assert np.array_equal(images[index]["image"], source[index]["image"])
        assert np.array_equal(images.label(index), source.label(index))
    server = FolderServer(tmp_path)
    try:
        tars = f"{server.url}/x-{{0..1}}.tar"
        ended = command("data", "index", f"out={tmp_path / 'web'}", f"tars={tars}", f"classes=[{','.join(classes)}]")
        assert ended.code == 0, ended.err
        away = Shards(str(tmp_path / "web"))
        assert away.ids == images.ids
        assert np.array_equal(away[5]["image"], images[5]["image"])
        refused(command("data", "index", "out=x", f"tars={server.url}/no.tar", "classes=[a]"), "no.tar does not exist")
    finally:
        server.close()
    os.truncate(tmp_path / "x-1.tar", 700)
    refused(command("data", "index", "out=x", f"tars={tmp_path}/x-1.tar", "classes=[a]"), "x-1.tar", "as a tar file")
    with pytest.raises(InputError, match=r"x-1.tar: expected \d+ bytes, found 700 bytes"):
        Shards(str(tmp_path / "index"))


def test_labels_of_others(command: Command, tmp_path: Path, photographs: Path) -> None:
    """Names in JSON and in text, keys without labels; what is a path elsewhere is a name here."""
    pytest.importorskip("webdataset", reason="webdataset is not installed (the extra scale)")
    picture = next((photographs / "im Urlaub").iterdir()).read_bytes()
    members = {
        "a/1.jpg": picture, "a/1.json": b'{"labels": ["dog"]}', "b.jpg": picture, "b.txt": b"cat; dog",
        "c.jpg": picture, "d.json": b"{}",
    }  # fmt: skip
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ended = command("data", "index", f"out={tmp_path / 'index'}", f"tars={tmp_path}/y.tar")
    assert ended.code == 0, ended.err
    images = Shards(str(tmp_path / "index"))
    assert (images.ids, images.classes) == (["a/1", "b", "c"], ("cat", "dog"))
    assert images.labels.tolist() == [[0, 1], [1, 1], [0, 0]]
    refused(command("data", "index", f"out={tmp_path / 'index'}", f"tars={tmp_path}/y.tar"), "has an index already")
    refused(command("data", "index", f"out={tmp_path / 'no'}", f"tars={tmp_path}/y.tar", "split=test"), "'test'")
    more = members | {"a/1.cls": b"1", "b.cls": b"0", "b.json": b'{"width": 3}', "c.json": b'{"width": 3}'}
    with tarfile.open(tmp_path / "y.tar", "w") as tar:  # with what others write beside labels
        for name, data in more.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ended = command("data", "index", f"out={tmp_path / 'more'}", f"tars={tmp_path}/y.tar", "classes=[cat,dog]")
    assert ended.code == 0, ended.err
    assert Shards(str(tmp_path / "more")).labels.tolist() == [[0, 1], [1, 0], [0, 0]]
    for name, data, word in (("../up.jpg", picture, "no name below"), ("e.cls", b"one", "as labels")):
        with tarfile.open(tmp_path / "z.tar", "w") as tar:
            for member, inside in {**members, name: data}.items():
                info = tarfile.TarInfo(member)
                info.size = len(inside)
                tar.addfile(info, io.BytesIO(inside))
        ended = command("data", "index", f"out={tmp_path / word}", f"tars={tmp_path}/z.tar")
        if ended.code == 0:
            with pytest.raises(InputError, match=word):
                Shards(str(tmp_path / word))
        else:
            refused(ended, word)


def test_without_the_library(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    refused(command("data", "index", "out=x", "tars=a.tar"), "webdataset", "pip install 'wsss[scale]'")
