"""A file is data: nothing that a checkpoint or a label file says is run, fetched, opened, or taken on trust."""

import argparse
import io
import os
import pickle
import socket
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Ended

import wsss
from wsss import InputError
from wsss.data.files import load_label_dict
from wsss.stored import BACKBONE_ARGS

NAN = float("nan")
TOWER: Any = ()  # of tuples that each hold another twice: 2 ** 40 steps to hash
for _ in range(40):
    TOWER = (TOWER, TOWER)


@pytest.fixture(scope="module")
def good(trained: Path) -> dict[str, Any]:
    return torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)


def changed(good: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The checkpoint with another value at a path such as wsss/protocol/size."""
    content = {key: deepcopy(good[key]) for key in ("state_dict", "hyper_parameters", "wsss")}
    node: Any = content
    *above, last = place.split("/")
    for part in above:
        node = node.setdefault(part, {}) if node.get(part) is not None else node.__setitem__(part, {}) or node[part]
    node[last] = value
    return content


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "x.ckpt")
    return folder / "x.ckpt"


def refused(path: Path, *words: str) -> str:
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        wsss.load(path)
    sentence = str(caught.value)
    assert time.process_time() - started < 10
    for word in (str(path), *words):
        assert word in sentence
    assert "\n" not in sentence
    assert len(sentence) < 2000
    return sentence


class Trap:
    """Runs when it is unpickled: makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def called(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return False
    return True


HOSTILE = ["pretrained", "cfg", "overlay", "checkpoint_path", "cache_dir", "nested", "hub name", "weights"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_fetched_opened_or_run(
    command: Callable[..., Ended],
    good: dict[str, Any],
    listener: socket.socket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Three canaries: a folder that would be made, a socket that would be called, a secret of the environment."""
    folder, canary = tmp_path / "cache", tmp_path / "canary"
    monkeypatch.setenv("SECRET", "a canary sings")
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/${{oc.env:SECRET}}/x.pth"
    torch.save({"head.weight": torch.zeros(1), "trap": Trap(canary)}, tmp_path / "trap.pth")
    overlay = {"url": address, "file": str(tmp_path / "trap.pth"), "hf_hub_id": "canary/x", "custom_load": False}
    fetching = {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": str(folder)}
    args = "hyper_parameters/backbone_args"
    place, value, said = {
        "pretrained": (f"{args}/pretrained", True, "backbone_args.pretrained"),
        "cfg": (
            f"{args}/pretrained_cfg",
            overlay | {"architecture": "vit_tiny_patch16_224"},
            "backbone_args.pretrained",
        ),
        "overlay": (args, good["hyper_parameters"]["backbone_args"] | fetching, "backbone_args."),
        "checkpoint_path": (f"{args}/checkpoint_path", str(tmp_path / "trap.pth"), "backbone_args.checkpoint_path"),
        "cache_dir": (f"{args}/cache_dir", str(folder), "backbone_args.cache_dir"),
        "nested": ("hyper_parameters/losses/cls/cache_dir", str(folder), "losses.cls.cache_dir"),
        "hub name": ("hyper_parameters/backbone", f"hf-hub:{address}", "backbone"),
        "weights": (
            "hyper_parameters/weights",
            str(tmp_path / "trap.pth"),
            "",
        ),  # where training began is of no interest
    }[kind]
    path = saved(changed(good, place, value), tmp_path)
    settings = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    ended = command("eval", f"checkpoint={path}", f"hydra.run.dir={tmp_path / 'out'}", *settings)
    if kind == "weights":
        assert ended.code == 0
        wsss.load(path)
    else:
        assert ended.code == 2
        assert said in ended.err
        assert len(ended.err.splitlines()) == 1
        assert said in refused(path)
    assert not folder.exists()
    assert not canary.exists()
    assert not called(listener)
    assert "sings" not in ended.out + ended.err


def test_the_user_may_set_what_a_file_may_not(
    command: Callable[..., Ended], good: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(changed(good, "hyper_parameters/backbone_args/dynamic_img_size", False), tmp_path)
    settings = [f"checkpoint={path}", "data.num_workers=0", "trainer.enable_progress_bar=false"]
    ended = command("eval", *settings, "trainer.accelerator=cpu")
    assert ended.code == 2
    assert "+method.backbone_args.dynamic_img_size=VALUE" in ended.err
    given = "+method.backbone_args.dynamic_img_size=false"
    assert command("eval", *settings, "trainer.accelerator=cpu", given).code == 0
    refused(path, "dynamic_img_size")
    wsss.load(path, backbone_args={"dynamic_img_size": False})


def test_no_backbone_argument_names_a_file() -> None:
    words = {word for name in BACKBONE_ARGS.split() for word in name.split("_")}
    assert not words & {"url", "file", "dir", "cache", "pretrained", "cfg", "checkpoint", "hub"}


HYPER, WSSS, STATE = "hyper_parameters", "wsss", "state_dict"
WEIGHT = f"{STATE}/classifier.weight"
deep: Any = 1
for _ in range(300):
    deep = {"a": deep}
ring: list[Any] = []
ring.append(ring)
BAD: list[tuple[str, Any, str]] = [
    *((key, value, key) for key in (HYPER, WSSS, STATE) for value in (None, [1], 3, "x")),
    (STATE, {}, "tensors by name"),
    (WEIGHT, None, "classifier.weight"),
    (WEIGHT, [1.0], "classifier.weight"),
    (WEIGHT, torch.full((4, 32, 1, 1), NAN), "NaN"),
    (WEIGHT, torch.full((4, 32, 1, 1), float("inf")), "infinite"),
    (WEIGHT, torch.full((4, 32, 1, 1), 1e300, dtype=torch.float64), "infinite"),
    (WEIGHT, torch.ones(4, 32).to_sparse(), "dense"),
    (WEIGHT, torch.ones(4, 32, 1, 1, device="meta"), "dense"),
    (WEIGHT, torch.quantize_per_tensor(torch.ones(4, 32, 1, 1), 0.1, 0, torch.quint8), ""),
    (WEIGHT, torch.ones(4, 32, 1, 1, dtype=torch.complex64), "complex64"),
    (WEIGHT, torch.ones(4, 32, 1, 1, dtype=torch.int64), "another kind of numbers"),
    (WEIGHT, torch.ones(1).expand(10**12), "classifier.weight"),
    (WEIGHT, torch.ones(4, 32, 1), "other shapes for classifier.weight"),
    (f"{STATE}/extra", torch.ones(3), "unknown extra"),
    (f"{HYPER}/num_classes", None, "num_classes"),
    (f"{HYPER}/num_classes", 0, "num_classes"),
    (f"{HYPER}/num_classes", 10**9, "num_classes"),
    (f"{HYPER}/num_classes", True, "num_classes"),
    (f"{HYPER}/num_classes", 3, "classes"),
    (f"{WSSS}/classes", "abcd", "wsss.classes"),
    (f"{WSSS}/classes", ["a", "a", "b", "c"], "wsss.classes"),
    (f"{WSSS}/classes", ["a", "", "b", "c"], "wsss.classes"),
    (f"{WSSS}/classes", ["a" * 3_000_000, "b", "c", "d"], "wsss.classes"),
    (f"{WSSS}/classes", [1, 2, 3, 4], "wsss.classes"),
    (f"{WSSS}/method", None, "wsss.method"),
    (f"{WSSS}/method", "../../evil", "evil"),
    (f"{WSSS}/method", ["toco"], "wsss.method"),
    (f"{WSSS}/dataset", 3, "wsss.dataset"),
    (f"{WSSS}/dataset_values", [1], "wsss.dataset_values"),
    (f"{WSSS}/has_background", "no", "wsss.has_background"),
    *((f"{WSSS}/mean", value, "wsss.mean") for value in (None, 1, [1, 2], [0.5, 0.5, NAN], [0.5, 0.5, "x"], [9, 9, 9])),
    *((f"{WSSS}/std", value, "wsss.std") for value in (None, 0, [0.2, 0.2, 0], [0.5, 0.5, NAN], [-1, 1, 1])),
    *((f"{WSSS}/checkpoint_rule", value, "wsss.checkpoint_rule") for value in (3, "", "\x1b[31m", "a" * 101)),
    (f"{WSSS}/protocol", None, "wsss.protocol"),
    (f"{WSSS}/protocol/unheard", 1, "unheard"),
    (f"{WSSS}/protocol/size", 10**9, "protocol.size"),
    (f"{WSSS}/protocol/size", "x", "protocol.size"),
    (f"{WSSS}/protocol/window", 10**9, "protocol.window"),
    (f"{WSSS}/protocol/stride", 1, "protocol.stride"),
    *(
        (f"{WSSS}/protocol/scales", value, "scales")
        for value in ([], [0], [-1.0], [1e9], [NAN], None, 1, ["a"], [1.0] * 33)
    ),
    (f"{WSSS}/protocol/crf", {"iterations": 10**9}, "iterations"),
    (f"{WSSS}/protocol/crf", {"bilateral": [1.0]}, "bilateral"),
    (f"{WSSS}/protocol/crf", {"gaussian": [0.0, 1.0]}, "gaussian"),
    *((f"{HYPER}/cam_scales", value, "cam_scales") for value in ([], [0], [-1.0], [1e9], [NAN], None, "x", [[1.0]])),
    (f"{HYPER}/deep", deep, "at most 8"),
    (f"{HYPER}/ring", ring, "at most 8"),
    (f"{HYPER}/wide", {str(n): list(range(1000)) for n in range(100)}, "fewer"),
    (f"{HYPER}/backbone", "a" * 3_000_000, "backbone"),
    (f"{HYPER}/{'a' * 3_000_000}", 1, "a name"),
    (f"{HYPER}/backbone", "${oc.env:SECRET}", "${oc.env:SECRET}"),
    (f"{HYPER}/backbone", "resnet50", "resnet50"),
    (f"{HYPER}/backbone", 3, "backbone"),
    (f"{HYPER}/unheard", 3, "unheard"),
    (f"{HYPER}/_target_", "os.getcwd", "_target_"),
    (f"{HYPER}/par/_target_", "os.getcwd", "_target_"),
    (f"{HYPER}/backbone_args", [1], "backbone_args"),
    (f"{HYPER}/backbone_args/depth", 10**5, "depth"),
    (f"{HYPER}/backbone_args/depth", 200, "far larger network"),
    (f"{HYPER}/backbone_args/embed_dim", 16384, "far larger network"),
    (f"{HYPER}/backbone_args/embed_dim", -3, "x.ckpt"),
    (f"{HYPER}/backbone_args/num_heads", 0, "x.ckpt"),
    (f"{HYPER}/backbone_args/patch_size", 0, "x.ckpt"),
    (f"{HYPER}/backbone_args/drop_rate", float("inf"), "drop_rate"),
    (f"{HYPER}/backbone_args/drop_path_rate", 7.0, "drop_path_rate"),
    (f"{HYPER}/backbone_args/norm_layer", "os.system", "norm_layer"),
    (f"{HYPER}/backbone_args/in_chans", 4, "in_chans"),
    (f"{HYPER}/backbone_args/mlp_ratio", {"a": 1}, "mlp_ratio"),
    (f"{HYPER}/aux_layer", 99, "aux_layer"),
    (f"{HYPER}/projector", {"hidden": 10**9}, "x.ckpt"),
    (f"{HYPER}/projector", {"unheard": 1}, "unheard"),
    (f"{HYPER}/par/iterations", 10**9, "iterations"),
    (f"{HYPER}/par/dilations", [-1], "dilations"),
    (f"{HYPER}/par/dilations", [], "x.ckpt"),
    (f"{HYPER}/decoder_dilation", 10**6, "decoder_dilation"),
    (f"{HYPER}/background_threshold", 7, "background_threshold"),
    (f"{HYPER}/losses", {"cls": 3}, "losses"),
    (f"{HYPER}/losses", {"unheard": {}}, "unheard"),
    (f"{HYPER}/phases", [{"until": 3, "weights": None}], "x.ckpt"),
    (f"{HYPER}/lr", torch.ones(1), "lr"),
    (f"{HYPER}/lr", 10**5000, "x.ckpt"),
    (f"{HYPER}/lr", [torch.ones(3, 3)], "lr"),
    (f"{HYPER}/5", 3, "5"),
    (f"{HYPER}/a\nb", 3, "a line of text"),
    (f"{HYPER}/backbone", "x\x1b[31m\n", "plain words"),
    (f"{STATE}/a\nb", torch.ones(1), "a line of text"),
]


@pytest.mark.parametrize(("place", "value", "said"), BAD, ids=[f"{n}-{b[0][:60]}" for n, b in enumerate(BAD)])
def test_what_cannot_be_is_refused(good: dict[str, Any], tmp_path: Path, place: str, value: Any, said: str) -> None:
    refused(saved(changed(good, place, value), tmp_path), said)


@pytest.mark.parametrize(
    "content", [None, [], 3, "x", {}, {"model": 3}, {1: torch.ones(1)}, {"a": torch.tensor([NAN])}]
)
def test_other_content(tmp_path: Path, content: Any) -> None:
    refused(saved(content, tmp_path))


def test_what_is_pickled_beside_the_weights_is_named(tmp_path: Path) -> None:
    content = {"model": {"head.weight": torch.ones(3)}, "args": argparse.Namespace(lr=1)}
    refused(saved(content, tmp_path), "a Python object, argparse.Namespace", "torch.save(")


def test_zeros_are_no_weights(good: dict[str, Any], tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in good["state_dict"].items()}
    refused(saved(good | {"state_dict": zeros}, tmp_path), "zeros")


def test_a_network_larger_than_its_weights(good: dict[str, Any], tmp_path: Path) -> None:
    values = good["hyper_parameters"] | {"backbone": "vit_giant_patch14_224", "backbone_args": {}}
    refused(saved(good | {"hyper_parameters": values}, tmp_path), "far larger network")
    origin = good["wsss"] | {"method": "cam"}
    slow = {"num_classes": 4, "backbone": "resnet26", "backbone_args": {"layers": [10**5] * 4}}
    refused(saved(good | {"hyper_parameters": slow, "wsss": origin}, tmp_path), "layers")
    slow["backbone_args"] = {"layers": [200] * 4}
    refused(saved(good | {"hyper_parameters": slow, "wsss": origin}, tmp_path), "far larger network")


def test_values_of_a_data_set(command: Callable[..., Ended], good: dict[str, Any], tmp_path: Path) -> None:
    for place, value, said in (
        ("unheard", 1, "unheard"),
        ("_target_", "os.getcwd", "_target_"),
        ("val_size", 10**9, "val_size"),
        ("val_size", {"a": 1}, "val_size"),
        ("objects", [1, 10**9], "objects"),
        ("size", "${oc.env:HOME}", "${oc.env:HOME}"),
    ):
        path = saved(changed(good, f"wsss/dataset_values/{place}", value), tmp_path)
        ended = command("eval", f"checkpoint={path}", "data.num_workers=0")
        assert ended.code == 2, place
        assert said in ended.err
        assert len(ended.err.splitlines()) == 1


def test_names_are_options(command: Callable[..., Ended], good: dict[str, Any], tmp_path: Path) -> None:
    for group in ("method", "dataset"):
        for name in ("../../evil", "toco,cam", "null", "", "true", "unheard", "toco}", "[toco]", "${oc.env:HOME}"):
            path = saved(changed(good, f"wsss/{group}", name), tmp_path)
            ended = command("eval", f"checkpoint={path}", "data.num_workers=0")
            assert ended.code == 2
            assert f"names the {group} {name!r}" in ended.err
            assert len(ended.err.splitlines()) == 1


def test_the_folder_of_images_is_said_where_it_comes_from_the_file(
    command: Callable[..., Ended], good: dict[str, Any], voc_root: Path, tmp_path: Path
) -> None:
    content = changed(good, "wsss/dataset_values", {"root": str(voc_root)})
    content["wsss"]["dataset"] = "voc"
    path = saved(content, tmp_path)
    said = f"dataset.root={voc_root}, as the checkpoint says"
    for given, expected in (([], True), ([f"dataset.root={voc_root}"], False)):
        ended = command("eval", f"checkpoint={path}", *given, "data.num_workers=0")
        assert ended.code == 2  # other classes
        assert (said in ended.out) is expected


def test_scales_of_the_command_line(command: Callable[..., Ended], trained: Path) -> None:
    given = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", "data.num_workers=0"]
    for scales in ("[0]", "[-1]", "[1e9]", "[]"):
        for key in ("protocol.scales", "method.cam_scales"):
            ended = command("eval", *given, f"{key}={scales}")
            assert ended.code == 2
            assert "scales is [" in ended.err


def test_damaged_weights(good: dict[str, Any], tmp_path: Path) -> None:
    path = saved(good, tmp_path)
    content = path.read_bytes()
    weights = good["state_dict"]["classifier.weight"].numpy().tobytes()
    place = content.index(weights)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    refused(path, "damaged")


def test_zip_bombs(good: dict[str, Any], tmp_path: Path) -> None:
    path = saved(good, tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    largest = max(entries, key=lambda name: len(entries[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content if name != largest else bytes(50_000_000))
    assert path.stat().st_size < 2_000_000
    refused(path, "unpacks to")


def test_storages_that_are_not_there(tmp_path: Path) -> None:
    """A storage of more elements than its record has would be read from beyond it."""
    path = saved({"a": torch.arange(4.0)}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    four, many = b"cpuq\x06K\x04tq\x07", b"cpuq\x06J\0\0\0\x10tq\x07"
    assert four in entries[pickled]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(four, many))
    refused(path, "lacks")
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    assert four.replace(b"t", b"Nt") in old
    path.write_bytes(old.replace(four.replace(b"t", b"Nt"), many.replace(b"t", b"Nt")))
    refused(path, "lacks")


@pytest.mark.parametrize("modern", [True, False])
def test_keys_that_take_forever_to_hash(tmp_path: Path, modern: bool) -> None:
    class Slow(dict[Any, Any]):
        """A key that only the pickle sees."""

        def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
            self.call = make, arguments

        def __reduce__(self) -> Any:
            return self.call if self.call[0] is not dict else (OrderedDict, (), None, None, iter([(TOWER, 1)]))

    for slow in (Slow(dict), Slow(set, [TOWER]), Slow(OrderedDict, [(TOWER, 1)]), Slow(set, [(1, TOWER)])):
        torch.save({"state_dict": slow}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=modern)
        refused(tmp_path / "x.ckpt", "key")


def test_old_files_of_torch_are_read(good: dict[str, Any], tmp_path: Path) -> None:
    torch.save(good, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert wsss.load(tmp_path / "x.ckpt").classes == tuple(good["wsss"]["classes"])


@pytest.mark.slow
def test_a_short_fuzz(trained: Path, tmp_path: Path) -> None:
    from fuzz import BAD, fuzz, import_all

    import_all()
    counts = {"checkpoints": 30, "labels": 100, "images": 30}
    table = fuzz(counts, 1, trained / "checkpoints" / "last.ckpt", tmp_path)
    assert {kind: sum(outcomes.values()) for kind, outcomes in table.items()} == counts
    assert not {kind: outcomes for kind, outcomes in table.items() if outcomes.keys() & set(BAD)}


def npy(path: Path, content: bytes) -> Path:
    """An object array whose one element is what `content` puts on pickle's stack."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"
    path.write_bytes(header.getvalue() + b"\x80\x03" + new + b"(K\x01)" + dtype + b"\x89]" + content + b"atb.")
    return path


TOWERS = {
    "copied": b")" + b"2\x86" * 40,
    "remembered": b")q\x01" + b"".join(b"0h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 41)),
}
HASHING = {
    "setitem": b"}%sK\x01s",
    "setitems": b"}(%sK\x01u",
    "dict": b"(%sK\x01d",
    "ordered": b"ccollections\nOrderedDict\n](](%sK\x01ee\x85R",
    "ordered tuples": b"ccollections\nOrderedDict\n](%sK\x01\x86e\x85R",
    "frozenset": b"(%s\x91",
    "set": b"\x8f(%s\x90",
    "state": b"cnumpy\nndarray\n)R}%sK\x01sb",
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("hashing", HASHING)
def test_keys_of_labels_are_refused_before_they_are_hashed(tmp_path: Path, hashing: str, tower: str) -> None:
    path = npy(tmp_path / "a.npy", HASHING[hashing] % TOWERS[tower])
    assert path.stat().st_size < 700
    started = time.process_time()
    with pytest.raises(InputError, match=r"a\.npy"):
        load_label_dict(path)
    assert time.process_time() - started < 1


def test_labels_call_no_slow_codec(tmp_path: Path) -> None:
    text = "é".encode() * 100_000
    for codec in (b"punycode", b"idna", b"zip"):
        call = b"c_codecs\nencode\nX%sX%s\x86R" % (
            len(text).to_bytes(4, "little") + text,
            bytes([len(codec), 0, 0, 0]) + codec,
        )
        started = time.process_time()
        with pytest.raises(InputError, match="to be written as"):
            load_label_dict(npy(tmp_path / "a.npy", call))
        assert time.process_time() - started < 1


def test_ten_thousand_labels_take_less_than_a_second(tmp_path: Path) -> None:
    labels: Any = {f"2007_{n:06d}": np.eye(20, dtype=np.float32)[n % 20] for n in range(10_582)}
    np.save(tmp_path / "a.npy", labels)
    started = time.process_time()
    read = load_label_dict(tmp_path / "a.npy")
    assert time.process_time() - started < 1
    assert all(np.array_equal(read[name], vector) for name, vector in labels.items())


@pytest.mark.parametrize("protocol", range(5))
def test_every_protocol_of_labels_is_read(tmp_path: Path, protocol: int) -> None:
    labels: Any = OrderedDict({"a": np.ones(2), np.str_("b"): np.zeros(2), b"c": [0, 1]})
    np.save(tmp_path / "a.npy", labels)
    content = (tmp_path / "a.npy").read_bytes()
    start = content.index(b"\n") + 1
    box = np.empty((), object)
    box[()] = labels
    (tmp_path / "a.npy").write_bytes(content[:start] + pickle.dumps(box, protocol))
    assert list(load_label_dict(tmp_path / "a.npy")) == ["a", "b", "c"]
