"""Photographs, labels and lists at a URL, and masks in tar files: the same as from and in a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from served import FolderServer
from tiny import Ended, content, refused

from wsss import InputError
from wsss.data.folder import Folder
from wsss.data.photographs import find_photographs
from wsss.places import Url, place_of, relative

Command = Callable[..., Ended]


@pytest.fixture
def served(photographs: Path) -> Iterator[FolderServer]:
    server = FolderServer(photographs)
    yield server
    server.close()


@pytest.fixture
def in_memory(photographs: Path) -> Iterator[str]:
    """The folder at a protocol that lists."""
    system = fsspec.filesystem("memory")
    system.put(str(photographs), "/photos", recursive=True)
    system.pipe_file("/photos/.hidden/a.jpg", b"")
    yield "memory://photos"
    system.rm("/photos", recursive=True)


@pytest.fixture
def given(trained: Path) -> list[str]:
    return [f"checkpoint={trained / 'checkpoints/last.ckpt'}", "num_workers=0"]


def unpack(out: Path) -> dict[str, bytes]:
    """Content of a folder whose tar files are unpacked and gone, and its settings without their output."""
    for path in sorted((out / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.extractall(out, filter="data")
    shutil.rmtree(out / "tars")
    return without_output(content(out))


def without_output(files: dict[str, bytes]) -> dict[str, bytes]:
    for name in ("settings.json", "manifest.json"):
        if name in files:
            said = json.loads(files[name])
            said["settings"].pop("output", None)
            files[name] = json.dumps(said).encode()
    return files


def same(ours: Folder, theirs: Folder) -> None:
    assert (ours.ids, ours.classes) == (theirs.ids, theirs.classes)
    assert np.array_equal(ours.labels, theirs.labels)
    for index in range(len(theirs)):
        assert all(np.array_equal(ours[index][key], value) for key, value in theirs[index].items())


def test_a_folder_over_http(served: FolderServer, photographs: Path) -> None:
    """Names with spaces, brackets and umlauts; labels.csv says which there are."""
    (photographs / "list.txt").write_text("Bild 3 (groß)\nBild 4 (groß).JPG", encoding="utf-8")
    local = {"masks": "masks"}
    same(Folder(served.url, val=0.5), Folder(str(photographs), val=0.5, **local))
    same(Folder(f"{served.url}/", train="list.txt"), Folder(str(photographs), train="list.txt", **local))
    elsewhere = str(photographs / "labels.csv")
    same(Folder(served.url, labels=elsewhere), Folder(str(photographs), **local))
    same(Folder(str(photographs), labels=f"{served.url}/labels.csv", **local), Folder(str(photographs), **local))
    ours = Folder(served.url, "val", val=0.5, masks=str(photographs / "masks"))
    same(ours, Folder(str(photographs), "val", val=0.5, **local))
    (photographs / "class_names.txt").write_text("dog\ncat")
    assert Folder(served.url).classes == ("dog", "cat")


def test_a_folder_that_is_listed(in_memory: str, photographs: Path) -> None:
    for split in ("train", "val"):
        same(Folder(in_memory, split, val=0.5, masks="masks"), Folder(str(photographs), split, val=0.5, masks="masks"))
    system = fsspec.filesystem("memory")
    for kind, number in (("cat", 1), ("dog", 2)):
        picture = next((photographs / "im Urlaub").glob(f"Bild {number}*")).read_bytes()
        system.pipe_file(f"/classes/{kind}/{number}.jpg", picture)
    assert Folder("memory://classes").labels.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda url, root: Folder(f"{url}/nowhere"), ["nowhere/labels.csv does not exist"]),
        (lambda url, root: Folder(url, masks=f"{url}/masks", val="all", split="val"), ["masks cannot be listed"]),
        (lambda url, root: (root / "labels.csv").write_text("file,labels\na,cat") and Folder(url), ["whole names"]),
        (lambda url, root: Folder("s3://bucket/photos"), ["s3://bucket/photos", "needs a package", "s3fs"]),
        (lambda url, root: Folder("nothing://photos"), ["nothing://photos", "Protocol not known"]),
        (lambda url, root: Folder("http://127.0.0.1:9/photos"), ["127.0.0.1:9", "cannot be read", "network"]),
        (lambda url, root: place_of(f"{url}/im Urlaub").files(), ["cannot be listed"]),
        (
            lambda url, root: (root / "labels.csv").write_text("file,labels\n../../a.jpg,cat") and Folder(url),
            ["../../a"],
        ),
        (lambda url, root: Folder("http://[photos"), ["http://[photos is no place", "IPv6"]),
        (lambda url, root: Folder("https://me:word@127.0.0.1:9/p?sig=abc&v=1"), ["https://***@", "sig=***&v=1"]),
    ],
    ids=range(10),
)
def test_addresses_that_do_not_do(
    served: FolderServer, photographs: Path, make: Callable[[str, Path], Any], words: list[str]
) -> None:
    if words[-1] == "s3fs" and find_module("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(InputError) as caught:
        make(served.url, photographs)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "word@" not in str(caught.value)


def find_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_photographs_that_cannot_be_had(served: FolderServer, photographs: Path, command: Command) -> None:
    """One is gone, one is refused, one is no image: each is named, and left out on request."""
    (photographs / "im Urlaub/Bild 0 (groß).JPG").unlink()
    (photographs / "im Urlaub/Bild 1 (groß).JPG").write_bytes(b"<html>")
    served.broken = ("im Urlaub/Bild 2 (groß).JPG",)
    images = Folder(served.url)
    for index, words in ((0, "does not exist"), (1, "cannot be read as an image"), (2, r"cannot be read \(500")):
        with pytest.raises(InputError, match=rf"Bild%20{index}%20.*{words}"):
            images[index]
    ended = command("data", "check", "dataset=folder", f"dataset.root={served.url}", "num_workers=1")
    assert (ended.code, "3 problems" in ended.err) == (2, True)
    arguments = [f"dataset.root={served.url}", "num_workers=0", "images_per_shard=9", "out=shards"]
    assert command("data", "shards", *arguments, "on_bad_image=skip").code == 0
    assert len(Path("shards/skipped.txt").read_text().splitlines()) == 3


def test_names_of_addresses() -> None:
    assert place_of("file:///a/b c.jpg") == Path("/a/b c.jpg")
    assert isinstance(place_of("/a/b.jpg"), Path)
    url = Url("https://host/a/b%20c.JPG?key=1%2F2.png")
    assert (url.name, url.suffix) == ("b c.JPG", ".JPG")
    below = Url("https://host/x?sas=1/2") / "a b.jpg"
    assert below == Url("https://host/x/a%20b.jpg?sas=1/2")
    assert (below.parent, relative(below, below.parent)) == (Url("https://host/x?sas=1/2"), PurePosixPath("a b.jpg"))
    assert str(Url("https://host/x/") / "b c#1.jpg") == "https://host/x/b%20c%231.jpg"
    assert str(Url("s3://bucket/x") / "b c#1.jpg") == "s3://bucket/x/b c#1.jpg"


@pytest.fixture
def predicted(command: Command, given: list[str], photographs: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a prediction of the folder leaves, by the name of the image alone."""
    out = tmp_path / "local"
    assert command("predict", *given, f"images={photographs / 'im Urlaub'}", f"out={out}").code == 0
    return masks(out)


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for kind in ("masks", "overlays") for path in (out / kind).rglob("*.*g")}


def test_predictions_of_addresses(
    command: Command, given: list[str], photographs: Path, served: FolderServer, in_memory: str, tmp_path: Path,
    predicted: dict[str, bytes],
) -> None:  # fmt: skip
    names = [path.name for path in sorted((photographs / "im Urlaub").iterdir())]
    (photographs / "some.txt").write_text("\n".join([f"im Urlaub/{name}" for name in names[:2]]), encoding="utf-8")
    urls = [str(Url(served.url) / f"im Urlaub/{name}") for name in names]
    (tmp_path / "urls.csv").write_text("number,file\n" + "\n".join(f"{n},{url}" for n, url in enumerate(urls)))
    for given_images, count in (
        (f"{in_memory}/im Urlaub", 8), (f"{served.url}/some.txt", 2), (photographs / "some.txt", 2),
        (tmp_path / "urls.csv", 8), (urls[0], 1), (photographs / f"im Urlaub/{names[0]}", 1),
    ):  # fmt: skip
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        ended = command("predict", *given, f"images={given_images}", f"out={out}")
        assert ended.code == 0, ended.err
        found = masks(out)
        assert len(found) == 2 * count
        assert found.items() <= predicted.items()
    (photographs / "some.txt").write_text("im Urlaub/none.jpg\nim Urlaub/" + names[0], encoding="utf-8")
    secret = served.url.replace("://", "://me:word@")
    ended = command("predict", *given, f"images={secret}/some.txt", f"out={tmp_path / 'bad'}")
    refused(ended, "1 of 2 images", "none.jpg does not exist")
    assert "word" not in ended.err + ended.out + (tmp_path / "bad/settings.json").read_text()
    assert len(masks(tmp_path / "bad")) == 2


def test_predictions_of_shards(
    command: Command, given: list[str], photographs: Path, tmp_path: Path, predicted: dict[str, bytes]
) -> None:
    shards = tmp_path / "shards"
    arguments = [f"dataset.root={photographs}", "dataset.masks=masks", "dataset.val=all", "images_per_shard=3"]
    (photographs / "every.txt").write_text("\n".join(f"Bild {n} (groß)" for n in range(8)), encoding="utf-8")
    arguments.append("dataset.train=every.txt")  # all of them in both splits, each predicted once
    assert command("data", "shards", f"out={shards}", *arguments, "num_workers=0").code == 0
    server = FolderServer(shards)
    try:
        for root, out in ((shards, tmp_path / "a"), (server.url, tmp_path / "b")):
            ended = command("predict", *given, f"images={root}/index.json", f"out={out}", "num_workers=1")
            assert ended.code == 0, ended.err
            assert masks(out) == predicted
    finally:
        server.close()


def test_a_prediction_is_shared_and_goes_on(
    command: Command, given: list[str], photographs: Path, tmp_path: Path
) -> None:
    """By three, of which two come, then by one; in files and in tar files that are not full."""
    whole = [*given, f"images={photographs / 'im Urlaub'}", "cam=true"]
    assert command("predict", *whole, f"out={tmp_path / 'alone'}").code == 0
    expected = without_output(content(tmp_path / "alone"))
    for output in ("files", "tar"):
        out = tmp_path / output
        arguments = [*whole, f"out={out}", f"output={output}", "images_per_tar=2"]
        for shard, made in ((0, 3), (2, 2)):
            ended = command("predict", *arguments, "shards=3", f"shard={shard}")
            assert (ended.code, f"{made} masks, share {shard} of 3" in ended.out) == (0, True), ended.out
        ended = command("predict", *arguments)
        assert (ended.code, "3 masks, 5 were there" in ended.out) == (0, True), ended.out
        ended = command("predict", *arguments)
        assert (ended.code, "0 masks, 8 were there" in ended.out) == (0, True), ended.out
        refused(command("predict", *arguments, "class_threshold=0.1"), "class_threshold", "another out")
        refused(command("predict", *arguments, f"images={photographs}"), "images", "another out")
        other = "tar" if output == "files" else "files"
        refused(command("predict", *arguments, f"output={other}"), "output", "another out")
        if output == "tar":
            assert len(list((out / "tars").glob("*.tar"))) == 5  # of 3, 2 and 3 images
        assert (unpack(out) if output == "tar" else without_output(content(out))) == expected
    refused(command("predict", *whole, "out=x", "output=zip"), "output is 'zip'", "files or tar")
    refused(command("predict", *whole, "out=x", "output=tar", "images_per_tar=0"), "images_per_tar is 0")
    assert not Path("x").exists()


LABEL = ["refine=crf", "refine.alpha=[4,32]", "scores=true", "cams=true", "overlay=true", "dataset.train_size=40"]


def start(arguments: list[str], rank: int) -> subprocess.Popen[bytes]:
    code = "from wsss.commands.label import main; main()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "WORLD_SIZE": "2", "RANK": str(rank)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["files", "tar"])
def test_labels_by_two_are_killed_and_one_goes_on(
    command: Command, given: list[str], tmp_path: Path, output: str
) -> None:
    assert command("label", *given, *LABEL, f"out={tmp_path / 'alone'}").code == 0
    out = tmp_path / "out"
    arguments = [*given, *LABEL, f"out={out}", f"output={output}", "images_per_tar=3"]
    running = [start(arguments, rank) for rank in (0, 1)]
    pattern, enough = ("masks/*.png", 12) if output == "files" else ("tars/*.json", 3)
    while len(list(out.glob(pattern))) < enough and any(process.poll() is None for process in running):
        time.sleep(0.001)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
    assert enough <= len(before) < 40 // (1 if output == "files" else 3)
    assert not (out / "manifest.json").exists()
    ended = command("label", *arguments)
    assert ended.code == 0, ended.err
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert (unpack(out) if output == "tar" else without_output(content(out))) == without_output(
        content(tmp_path / "alone")
    )


def test_labels_in_tar_files(command: Command, given: list[str], tmp_path: Path, photographs: Path) -> None:
    """By two, then by three; what is damaged is said, and made again."""
    short = [*given, *LABEL[:-1]]
    assert command("label", *short, f"out={tmp_path / 'alone'}").code == 0
    out = tmp_path / "out"
    arguments = [*short, f"out={out}", "output=tar", "images_per_tar=2"]
    assert command("label", *arguments, "shards=2", "shard=1").code == 0
    for shard in (1, 0, 2):
        assert not (out / "manifest.json").exists()
        assert command("label", *arguments, "shards=3", f"shard={shard}").code == 0
    assert (out / "metrics.json").read_bytes() == (tmp_path / "alone/metrics.json").read_bytes()
    refused(command("label", *short, f"out={out}"), "output", "another out")
    tar = min((out / "tars").glob("*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    refused(command("label", *arguments), tar.name, f"remove its index {tar.stem}.json")
    tar.write_bytes(whole.replace(b"IDAT", b"IDOT", 1))
    refused(command("label", *arguments), tar.name, "its index lists")
    tar.with_suffix(".json").write_text("[]")
    refused(command("label", *arguments), tar.stem, "version")
    tar.with_suffix(".json").unlink()
    assert command("label", *arguments).code == 0
    assert unpack(out) == without_output(content(tmp_path / "alone"))


def test_a_full_disk_keeps_complete_tar_files(
    command: Command, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsss.shards import Tar

    original, added = Tar.add, []

    def full(tar: Tar, name: str, data: bytes) -> Any:
        added.append(name)
        if len(added) == 8:
            raise OSError(28, "No space left on device", str(tar.path))
        return original(tar, name, data)

    arguments = [*given, f"out={tmp_path / 'out'}", "output=tar", "images_per_tar=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Tar, "add", full)
        ended = command("label", *arguments)
    assert (ended.code, "make room, then run again" in ended.err) == (1, True), ended.err
    assert {path.suffix for path in (tmp_path / "out/tars").iterdir()} == {".tar", ".json"}
    ended = command("label", *arguments)
    assert (ended.code, "4 masks made" in ended.out) == (0, True), ended.out


def test_labels_of_addresses(command: Command, photographs: Path, served: FolderServer, tmp_path: Path) -> None:
    """Pseudo masks of photographs at a URL, and of shards at one, are those of the files."""
    trained = tmp_path / "trained"
    small = [
        "dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "method=frozen_cam",
        "method.backbone=resnet10t", "method.weights=null", "method.size=64", "trainer.max_steps=1",
        "data.num_workers=0",
        "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", f"features.folder={tmp_path / 'features'}",
    ]  # fmt: skip
    ended = command("train", *small, f"hydra.run.dir={trained}")
    assert ended.code == 0, ended.err
    given = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", "num_workers=0", small[-1]]
    assert command("data", "shards", "out=shards", *small[1:3], "num_workers=0").code == 0
    shards = FolderServer(Path("shards").resolve())
    try:
        for out, arguments in (
            ("files", small[1:3]), ("web", [f"dataset.root={served.url}", "dataset.masks=null"]),
            ("shards", ["dataset=shards", "dataset.root=shards"]),
            ("away", ["dataset=shards", f"dataset.root={shards.url}"]),
        ):  # fmt: skip
            ended = command("label", *given, *arguments, f"out={out}")
            assert ended.code == 0, ended.err
            found = {path.name: path.read_bytes() for path in Path(out, "masks").rglob("*.png")}
            assert len(found) == 8
            assert found == {path.name: path.read_bytes() for path in Path("files/masks").rglob("*.png")}
        figures = [json.loads(Path(out, "metrics.json").read_text()) for out in ("files", "shards", "away")]
        assert figures[0]["train/mask_miou"] == figures[1]["train/mask_miou"] == figures[2]["train/mask_miou"]
    finally:
        shards.close()


def test_lists_of_photographs(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(
        f"file,labels\na.png,x\n{tmp_path / 'a.png'},y\nhttps://u:p@host:80/b/c.jpg?id=1,\nhttps://h/b.jpg,\n"
    )
    found = find_photographs(str(tmp_path / "list.csv"), tmp_path / "out")
    absolute = tmp_path.relative_to("/") / "a.png"
    assert [str(name) for name in found.names[:2]] == ["a.png", str(absolute)]
    assert str(found.names[2]).startswith("host_80/b/c-")
    assert str(found.names[3]) == "h/b.jpg"
    for text, words in (
        ("https://h/a.jpg\nhttp://h/a.jpg\n", "two images .* called h/a.jpg"),
        ("", "lists no image"),
        ("id,file\n1\n", "without the column file"),
        ("\xff", "in UTF-8"),
    ):
        (tmp_path / "bad.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=words):
            find_photographs(str(tmp_path / "bad.csv"), tmp_path / "out")


def test_nothing_of_a_shard_is_executed(tmp_path: Path, trained: Path) -> None:
    """A checkpoint in the place of an index is read as JSON and refused."""
    from wsss.data.shards import Shards

    torch.save({"version": 1}, tmp_path / "index.json")
    with pytest.raises(InputError, match=r"index.json is damaged"):
        Shards(str(tmp_path))
