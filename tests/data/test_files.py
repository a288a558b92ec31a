import collections
import contextlib
import io
import os
import pickle
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss import InputError
from wsss.data.files import image_size, load_label_dict, read_image, read_list, read_mask

DATA = os.environ.get("WSSS_TEST_DATA")
LABELS = {
    "2007_000032": np.array([1, 0, 1], np.float32),
    "2007_000039": np.array([0, 1, 0], np.float32),
}


def refused(reader: Any, path: Path, *words: str) -> None:
    """Asserts that `reader` gives one sentence that names the file and holds `words`."""
    with pytest.raises(InputError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def npy(path: Path, pickled: bytes) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(buffer.getvalue() + pickled)
    return path


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    return npy(path, pickle.dumps(np.array(content, dtype=object), protocol=protocol))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == np.float32 for k in a)


# Images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.new(mode, (5, 4)).save(path)
    image = read_image(path)
    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable


def test_16_bit_grey_keeps_the_high_byte(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    for name, array in {"a.png": values, "a.tif": values.astype(np.int32)}.items():
        Image.fromarray(array).save(tmp_path / name)
        assert (read_image(tmp_path / name) == (values >> 8)[..., None]).all()


def test_floats_are_unit_or_byte_range(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 1, 0.5]], np.float32)).save(path)
    assert read_image(path)[0, :, 0].tolist() == [0, 255, 128]
    Image.fromarray(np.array([[0, 2, 255]], np.float32)).save(path)
    assert read_image(path)[0, :, 0].tolist() == [0, 2, 255]
    for bad in (-1, 256, np.nan):
        Image.fromarray(np.array([[0, bad]], np.float32)).save(path)
        refused(read_image, path, "0..255")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    rgba.save(path)
    assert read_image(path).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(path, transparency=1)
    assert read_image(path).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(stored).save(path, exif=exif)
    upright = [
        *(stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1]),
        *(stored.T, np.rot90(stored, -1), stored[::-1, ::-1].T, np.rot90(stored)),
    ][orientation - 1]
    assert np.array_equal(read_image(path)[..., 0], upright)


def test_broken_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    refused(read_image, path, "No such file")
    refused(read_image, tmp_path)
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    for content in (b"", b"no image", buffer.getvalue()[:20], buffer.getvalue()[:-500]):
        path.write_bytes(content)
        refused(read_image, path, "image")
        refused(read_mask, path)
    Image.fromarray(noise[..., 0]).save(buffer := io.BytesIO(), "PNG")
    path.write_bytes(buffer.getvalue()[:-500])
    refused(read_mask, path, "mask", "truncated")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_tiffs_that_lie_on_their_side(tmp_path: Path, mode: str) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    picture = (
        Image.fromarray(ids[..., 0].astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(ids).convert(mode)
    )
    lying = Image.Exif()
    lying[0x0112] = 6
    for compression in ("raw", "tiff_deflate"):
        picture.save(tmp_path / f"{compression}.tiff", exif=lying, compression=compression)
    upright = read_image(tmp_path / "raw.tiff")
    assert upright.shape == (9, 5, 3)
    assert np.array_equal(upright, read_image(tmp_path / "tiff_deflate.tiff"))


@pytest.mark.parametrize("side", [14_000, 40_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    """Above some 180 million pixels, twice what Pillow warns of."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)))
    refused(read_image, path, "pixels")


def test_mutated_images_raise_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF"):
        buffer = io.BytesIO()
        noise.save(buffer, kind, exif=exif)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(4):
                content[rng.randrange(min(len(content), 400))] = rng.randrange(256)
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(InputError):
                    assert read_image(path).dtype == np.uint8


# Masks


def test_masks_keep_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    ids = np.array([[0, 1, 20], [21, 254, 255]], np.uint8)
    palette = Image.fromarray(ids).convert("L")
    palette.putpalette(list(range(256)) * 3)
    for image in (Image.fromarray(ids), Image.fromarray(ids.astype(np.uint16)), palette):
        image.save(path)
        mask = read_mask(path)
        assert np.array_equal(mask, ids)
        assert mask.dtype == np.uint8
    palette.save(path, transparency=0)
    assert np.array_equal(read_mask(path), ids)
    Image.fromarray(ids > 1).save(path)
    assert np.array_equal(read_mask(path), ids > 1)


def test_masks_of_colours_or_large_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (3, 2)).save(path)
        refused(read_mask, path, f"mode {mode}", "palette or grey PNG")
    Image.fromarray(np.array([[0, 256]], np.uint16)).save(path)
    refused(read_mask, path, "256")
    Image.new("L", (3, 2)).save(path, "JPEG")
    refused(read_mask, path, "JPEG")


# Lists


@pytest.mark.parametrize(
    "content",
    [
        b"2007_000032\n2007_000039\n",
        b"\xef\xbb\xbf2007_000032\r\n\r\n  2007_000039  ",
        b"2007_000032 3 14\n2007_000039 7\n",
        b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n/JPEGImages/2007_000039.JPG\n",
        b"JPEGImages\\2007_000032.png\n2007_000039.jpeg",
    ],
)
def test_styles_of_lists(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    assert read_list(path) == ["2007_000032", "2007_000039"]


def test_an_id_keeps_its_dots(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("a.v2\n/JPEGImages/b.v2.jpg\n")
    assert read_list(path) == ["a.v2", "b.v2"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"\r\n \n", "empty"),
        (b"a\nb\nc\nb\n", "b 2 times"),
        (b"\xff\xfea\0\n\0", "UTF-8"),
        (b"a\n/\n", "folder"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    refused(read_list, path, word)


def test_missing_list_is_refused(tmp_path: Path) -> None:
    refused(read_list, tmp_path / "none.txt", "No such file")


# Labels


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "keys",
    [
        str,
        str.encode,
        np.str_,
        lambda key: int(key.replace("_", "")),
        lambda key: np.int32(key.replace("_", "")),
    ],
)
def test_every_kind_of_key(tmp_path: Path, protocol: int, keys: Any) -> None:
    path = dump(tmp_path / "a.npy", {keys(k): v for k, v in LABELS.items()}, protocol)
    assert same(load_label_dict(path), LABELS)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i8", "u1", "bool", "object"])
def test_every_type_of_vector(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, {k: v.astype(dtype) for k, v in LABELS.items()})
    labels = load_label_dict(path)
    assert same(labels, LABELS)
    assert labels["2007_000032"].flags.writeable


def test_lists_and_ordered_dicts_are_read(tmp_path: Path) -> None:
    for content in (collections.OrderedDict(LABELS), {k: v.tolist() for k, v in LABELS.items()}):
        assert same(load_label_dict(dump(tmp_path / "a.npy", content, 2)), LABELS)


def test_python_2_pickle_is_read(tmp_path: Path) -> None:
    """Python 2 writes bytes and str alike as SHORT_BINSTRING, opcode U."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def array(dtype: bytes, order: bytes, flags: bytes, shape: bytes, raw: bytes) -> bytes:
        new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
        kind = (
            b"cnumpy\ndtype\n"
            + text(dtype)
            + b"K\0K\x01\x87R(K\x03"
            + text(order)
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        )
        return new + b"(K\x01" + shape + kind + b"K" + flags + b"tb\x89" + raw + b"tb"

    vector = array(b"f4", b"<", b"\0", b"K\x03\x85", text(np.array([1, 0, 1], "<f4").tobytes()))
    entries = b"](}" + text(b"2007_000032") + vector + b"se"
    path = npy(tmp_path / "a.npy", b"\x80\x02" + array(b"O8", b"|", b"?", b")", entries) + b".")
    assert same(load_label_dict(path), {"2007_000032": LABELS["2007_000032"]})
    assert same(np.load(path, allow_pickle=True, encoding="latin1").item(), load_label_dict(path))


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (os.system, "touch {}"),
        (eval, "open({!r}, 'w')"),
        (exec, "open({!r}, 'w')"),
        (np.load, "{}"),
        (np.memmap, "{}"),
    ],
)
def test_pickled_calls_are_refused_and_not_made(tmp_path: Path, function: Any, argument: str, protocol: int) -> None:
    touched = tmp_path / "touched"
    calls = Calls(function, argument.format(str(touched)))
    for content in (calls, {"2007_000032": calls}):
        refused(load_label_dict, dump(tmp_path / "a.npy", content, protocol), function.__name__, "only arrays")
    assert not touched.exists()


def test_forged_dtype_does_not_turn_bytes_into_pointers(tmp_path: Path) -> None:
    """numpy itself reads this one as object pointers and crashes: dtype O8 with its pickle flags cleared."""
    state = b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R" + state + b"b"
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
    path = npy(tmp_path / "a.npy", b"\x80\x03" + new + b"(K\x01)" + dtype + b"\x89C\x08AAAAAAAAtb.")
    refused(load_label_dict, path, "O8")


def test_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    refused(load_label_dict, dump(tmp_path / "a.npy", {"2007_000032": endless}), "2007_000032")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02}.",
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo index for which pickle would allocate 64 GB
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\0\0.",  # a bytearray of 2 ** 48
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b"cnumpy\nndarray\n}b.",
        b"\x80\x02" + b"cnumpy\ndtype\nK\x01\x85R.",
        b"\x80\x02" + b"cnumpy\ndtype\n)\x81.",
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, pickled: bytes) -> None:
    refused(load_label_dict, npy(tmp_path / "a.npy", pickled))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 0], ("cls.npy",)),
        ({}, ("filled dict",)),
        ({**LABELS, "bad": np.zeros((1, 3), np.float32)}, ("'bad'", "3 zeros and ones")),
        ({**LABELS, "bad": np.zeros(4, np.float32)}, ("'bad'", "3 zeros and ones")),
        ({**LABELS, "bad": np.array([0, 2, 0], np.float32)}, ("'bad'", "2.0")),
        ({**LABELS, "bad": np.array([0, np.nan, 0], np.float32)}, ("'bad'", "nan")),
        ({**LABELS, "bad": np.array([0, 1e300, 0])}, ("'bad'", "1e+300")),
        ({**LABELS, "bad": np.array(["0", "1", "0"])}, ("'bad'",)),
        ({**LABELS, "bad": None}, ("'bad'", "None")),
        ({**LABELS, "bad": np.array([0, 1, 0], np.complex64)}, ("c8",)),
        ({"bad": []}, ("'bad'",)),
        ({"bad": [[0], [0, 1]]}, ("zeros and ones",)),
        ({139: LABELS["2007_000032"]}, ("139",)),
        ({None: LABELS["2007_000032"]}, ("None",)),
        ({(1, 2): LABELS["2007_000032"]}, ("(1, 2)",)),
        ({**LABELS, 2007000032: LABELS["2007_000032"]}, ("2007_000032", "once")),
    ],
)
def test_malformed_labels_are_refused(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    box = np.empty((), object)
    box[()] = content
    np.save(tmp_path / "cls.npy", box)
    refused(load_label_dict, tmp_path / "cls.npy", *words)


def test_other_files_are_refused_as_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    refused(load_label_dict, path, "No such file")
    refused(load_label_dict, tmp_path)
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00", b"name,cat\n", pickle.dumps(LABELS)):
        path.write_bytes(content)
        refused(load_label_dict, path, "image-level labels")
    np.save(path, np.zeros((2, 3)))
    refused(load_label_dict, path, "float64", "pickled dict")
    np.save(path, np.array([LABELS, LABELS]))
    refused(load_label_dict, path, "(2,)")


@pytest.mark.parametrize("protocol", [2, 4])
def test_mutated_labels_raise_nothing_else(tmp_path: Path, protocol: int) -> None:
    rng = random.Random(protocol)
    content = dump(tmp_path / "a.npy", LABELS, protocol).read_bytes()
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        (tmp_path / "a.npy").write_bytes(mutated)
        try:
            labels = load_label_dict(tmp_path / "a.npy")
        except InputError:
            continue
        assert labels
        assert all(isinstance(key, str) and np.isin(vector, (0, 1)).all() for key, vector in labels.items())


@pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
def test_the_fields_own_file_reads_as_numpy_does() -> None:
    path = Path(str(DATA), "lists/voc12/cls_labels.npy")
    labels = load_label_dict(path)
    assert len(labels) == 12_031
    assert same(labels, np.load(path, allow_pickle=True).item())
    counts = {"train": 1464, "train_aug": 10_582, "val": 1449, "test": 1456}
    assert {name: len(read_list(path.parent / f"{name}.txt")) for name in counts} == counts


@pytest.mark.parametrize("kind", ["EPS", "PCX", "PPM"])
def test_other_kinds_behind_a_known_suffix_are_not_opened(tmp_path: Path, kind: str) -> None:
    """For some of them Pillow starts a program."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (5, 4)).save(path, kind)
    assert image_size(path) is None
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(path)
