"""report.html: what it holds, what it leaves out, and that it loads nothing and trusts no name."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import OVERRIDES, Ended, call

from wsss import InputError
from wsss.evaluation.comparison import COLUMNS
from wsss.evaluation.protocol import Measured
from wsss.report.pictures import numbered, thumbnail
from wsss.report.reading import read_all, same_but_seed

Command = Callable[..., Ended]
HOSTILE = '</script><script>alert("x")</script><img src=http://evil onerror=x>'
NOTE = Measured(
    "val, 4 images",
    scales=(1.0, 0.5),
    flip="always",
    labels_at_test="true",
    crf={"gaussian": [3.0, 3.0]},
    threshold_rule="fixed",
    threshold=0.5,
)


@pytest.fixture
def _altair() -> None:
    for package in ("altair", "vl_convert"):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "wsss[report]"')


class Page(HTMLParser):
    """The elements of a page, their texts, and the ids that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def read(path: Path) -> Page:
    """A report, of which what holds for each is checked: nothing is loaded, all that is seen is also said."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/webp;base64,")), attributes
        assert not [key for key in attributes if key.startswith("on")], attributes
        assert not re.search(r"url\(|@import", attributes.get("style") or "")
    assert not page.all("link")
    assert not re.search(r"url\(|@import", "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)))
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")
    assert len(page.all("script")) <= 3  # the bundle, its charts, our own: no name has made another
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"
    ids = [str(attributes["id"]) for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(key) is None or attributes[key] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for spec in specs(text):
        assert "$schema" not in spec
        assert "url" not in json.dumps(spec)
    return page


def specs(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.DOTALL)
    return list(json.loads(found[1])) if found else []


def titles(page: Page) -> list[str]:
    """Of the charts."""
    return [
        text
        for text in page.texts
        if text.startswith(("Mean", "IoU", "Precision", "Classes", "Over-", "Losses", "mAP by"))
    ]


def make_run(folder: Path, seed: int = 0, name: str = "cat", more: Sequence[str] = (), shift: float = 0.0) -> Path:
    """What a training and an evaluation in detail would leave, without a checkpoint."""
    classes = {"background": 0.9, name: 0.4 + shift, "dog": 0.5}
    figures = {"val/map": 0.8, "val/miou": 0.5 + shift, "val/cam_miou": 0.4 + seed / 100, "val/small_miou": 0.2}
    figures |= {f"val/iou/{key}": value for key, value in classes.items()} | {"val/large_miou": 0.6}
    rates = {key: {"iou": value, "precision": value, "recall": None} for key, value in classes.items()}
    tables = {
        "miou": {"classes": rates, "confused": [["dog", name, 17]]},
        "cam_miou": {"thresholds": [0.0, 0.5, 0.99], "curve": [0.1, 0.4, 0.2], "classes": rates},
        "cooccurrence": {"confused": [["dog", name, 0.25]]},
        "over_smoothing": {"blocks": [0.5, 0.6, 0.7]},
    }
    folder.mkdir(parents=True)
    record = {"overrides": ["method=cam", f"seed={seed}", *more], "seed": seed, "wsss": "0.2.0", "torch": "2.9"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(f"seed: {seed}\nmethod: {{background_threshold: 0.5, note: '{len(more)}'}}\n")
    costs = {"seconds": 3700.0, "peak_memory_mb": 812.5, "steps": 20}
    notes = {f"protocol/{key}": str(NOTE) for key in ("val/cam_miou", "val/miou")}
    (folder / "metrics.json").write_text(json.dumps(figures | costs | notes | {"val/f1": None}))
    (folder / "tags.json").write_text(json.dumps({key: asdict(NOTE) for key in ("val/cam_miou", "val/miou")}))
    (folder / "tables.json").write_text(json.dumps(tables))
    (folder / "log").mkdir()
    (folder / "log/metrics.csv").write_text(
        "step,train/loss,train/loss_cls,val/map\n1,2,1,\n2,1.5,,0.7\n4,nan,0.5,0.8\n"
    )
    return folder


def write_counts(path: Path, hits: Sequence[int]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *((f"i{n}", "miou", 1, hit, 10, 10) for n, hit in enumerate(hits))])


@pytest.mark.usefixtures("_altair")
def test_all_that_a_run_has_measured(command: Command, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ended = command("report", str(run))
    assert ended.code == 0, ended.err
    assert re.search(r"1 run, 0 pictures, [01]\.\d MB in one file", ended.out)
    page = read(run / "report.html")
    assert set(titles(page)) >= {
        "Mean IoU of CAMs by background threshold",
        "IoU of segmentation by class",
        "IoU of CAMs at the fixed threshold by class",
        "Mean IoU by the size of objects, the segmentation",
        "Precision and recall of the segmentation",
        "Classes taken for others, the segmentation",
        "Classes taken for others, the segmentation in the same image",
        "Over-smoothing: mean cosine of patch tokens",
        "Losses of the training",
        "mAP by step",
    }
    assert "There are no pictures" in page.text
    for said in (
        "0.8000",
        "⚠ true image labels",
        "scales 1, 0.5 with flip",
        "CRF gaussian [3.0, 3.0]",
        "1 h 1 min",
        "812",
    ):
        assert said in page.text, said
    assert "val/f1" not in page.text  # NaN: nothing was measured
    assert "Over seeds" not in page.text
    assert "Differences" not in page.text
    assert len(page.all("noscript")) == 1


def as_baseline(run: Path, split: str = "val, 4 images", labels: str = "true") -> Path:
    """The run of CLIP-ES that a training is measured by."""
    record = json.loads((run / "run.json").read_text())
    record["overrides"] = [o for o in record["overrides"] if "method=" not in o] + ["method=clip_es"]
    (run / "run.json").write_text(json.dumps(record))
    note = asdict(replace(NOTE, split=split, labels_at_test=labels))
    (run / "tags.json").write_text(json.dumps({"val/cam_miou": note}))
    figures = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({k: v for k, v in figures.items() if k != "val/miou"}))
    return run


@pytest.mark.usefixtures("_altair")
def test_beside_what_needs_no_training(command: Command, tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    for name, worse in (("run", "other"), ("other", "run")):
        assert command("report", str(tmp_path / name), str(tmp_path / worse), f"out={tmp_path / 'a.html'}").code == 0
        text = read(tmp_path / "a.html").text
        assert "Is training worth it?" not in text
        assert text.count("wsss-train method=clip_es dataset=NAME protocol=honest") == 1
    as_baseline(other)
    assert command("report", str(run), str(other), f"out={tmp_path / 'b.html'}").code == 0
    text = read(tmp_path / "b.html").text
    assert "Is training worth it?" in text
    assert re.search(r"clip_es\s+mIoU of CAMs\s+0\.4000\s+no training", text)
    assert re.search(r"cam\s+mIoU of the segmentation\s+0\.5000\s+\+0\.1000", text)
    assert "wsss-train method=clip_es" not in text
    for changed in ({"split": "train, 9 images"}, {"labels": "predicted"}):  # no difference of two kinds of figures
        as_baseline(other, **changed)
        assert command("report", str(run), str(other), f"out={tmp_path / 'c.html'}").code == 0
        assert re.search(r"0\.5000\s+measured in another way", read(tmp_path / "c.html").text)
    assert command("report", str(other), f"out={tmp_path / 'd.html'}").code == 0
    assert "training worth it" not in read(tmp_path / "d.html").text


@pytest.mark.usefixtures("_altair")
def test_only_what_there_is(command: Command, tmp_path: Path) -> None:
    """A run that has not ended, and one from before tables.json."""
    run = make_run(tmp_path / "run")
    for name in ("metrics.json", "tags.json", "tables.json", "log/metrics.csv"):
        (run / name).unlink()
    assert command("report", str(run)).code == 0
    page = read(run / "report.html")
    assert "unfinished" in page.text
    assert not titles(page)
    assert not page.all("noscript")
    assert len(page.all("script")) == 1


@pytest.mark.usefixtures("_altair")
def test_no_name_is_trusted(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "<b>&'quotes'"
    runs = [make_run(folder / str(n), n, HOSTILE, [f"+x={HOSTILE}{n}"]) for n in (1, 2)]
    for run in runs:
        write_counts(run / "per_image.csv", [1, 2])
    assert command("report", str(folder)).code == 0
    page = read(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert '<script>alert("x")' not in text
    assert not page.all("img")
    assert HOSTILE in page.text  # as it is called
    assert HOSTILE in json.dumps(specs(text)).encode().decode("unicode_escape")


@pytest.mark.usefixtures("_altair")
def test_seeds_and_differences(command: Command, tmp_path: Path) -> None:
    """Of a sweep: two settings with two seeds each, all on the same images."""
    for number, (seed, more) in enumerate([(1, []), (2, []), (1, ["method.lr=1"]), (2, ["method.lr=1"])]):
        run = make_run(tmp_path / f"sweep/{number}", seed, more=more, shift=0.1 * bool(more))
        write_counts(run / "per_image.csv", [1, 5, 9] if more else [1, 2, 3])
    groups = same_but_seed(read_all([tmp_path / "sweep"]))
    assert [[run.folder.name for run in group] for group in groups] == [["0", "1"], ["2", "3"]]
    assert command("report", str(tmp_path / "sweep")).code == 0
    page = read(tmp_path / "sweep/report.html")
    assert "0.4150 ± 0.0071" in page.text  # of 0.41 and 0.42
    assert "95 % of resamples" in page.text
    # 15 of 30 hits against 6 of 30: unions 45 and 54
    assert f"{15 / 45 - 6 / 54:+.4f}" in page.text


@pytest.mark.usefixtures("_altair")
def test_side_by_side(command: Command, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, more=[f"method={name}"]) for name in ("seam", "toco")]
    out = tmp_path / "both.html"
    assert command("report", *map(str, runs), f"out={out}").code == 0
    assert "Figures of each run" in read(out).text
    (curve, *_) = specs(out.read_text())
    values = json.dumps(curve)
    assert '"seam"' in values
    assert '"toco"' in values


@pytest.mark.usefixtures("_altair")
def test_two_protocols_of_one_checkpoint(command: Command, tmp_path: Path) -> None:
    """What true labels and the masks' threshold add is said, and which figures had them."""
    for name, more, shift, labels in (("a", [], 0.0, "predicted"), ("b", ["protocol=paper"], 0.125, "true")):
        run = make_run(tmp_path / name, more=more, shift=shift)
        (run / "config.yaml").unlink()  # an evaluation has none
        figures = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(figures | {"checkpoint": "run/checkpoints/last.ckpt"}))
        note = asdict(replace(NOTE, labels_at_test=labels))
        (run / "tags.json").write_text(json.dumps({"val/cam_miou": note, "val/miou": asdict(NOTE)}))
    out = tmp_path / "both.html"
    assert command("report", str(tmp_path / "a"), str(tmp_path / "b"), f"out={out}").code == 0
    page = read(out)
    assert "cam, protocol=paper less cam, the same checkpoint" in page.text
    assert "+0.1250" in page.texts  # of val/miou
    assert "mIoU of CAMs (cam, protocol=paper)" in page.text
    assert page.texts.count("⚠ true image labels") == 4  # val/miou of both, CAMs of the second; below one of, then all
    assert "predicted image labels" in page.texts


@pytest.mark.usefixtures("_altair")
@pytest.mark.slow
def test_pictures(command: Command, trained: Path, tmp_path: Path) -> None:
    """Of a training the first images; of an evaluation in detail, and of pseudo masks, the worst and the best."""
    checkpoint, few = trained / "checkpoints/last.ckpt", ["data.num_workers=0", "trainer.enable_progress_bar=false"]
    assert command("report", str(trained), f"out={tmp_path / 'run.html'}", "examples=2").code == 0
    page = read(tmp_path / "run.html")
    assert "The first 2 images of val" in page.text
    assert page.texts.count("CAM") == page.texts.count("prediction") == page.texts.count("truth") == 2
    sliders = [a for a in page.all("input") if a["type"] == "range"]
    assert [a["max"] for a in sliders] == ["4"] * 3  # image, CAM, pseudo label, prediction, truth; all at once first
    assert "red-stripes" in page.text

    evaluated, labelled = tmp_path / "eval", tmp_path / "labels"
    made = command("eval", f"checkpoint={checkpoint}", "detail=true", *few, f"hydra.run.dir={evaluated}")
    assert made.code == 0, made.err
    assert command("label", f"checkpoint={checkpoint}", f"out={labelled}", "num_workers=0").code == 0
    for folder, said in ((evaluated, "images of val"), (labelled, "images of train")):
        assert command("report", str(folder), "examples=3").code == 0
        page = read(folder / "report.html")
        assert (
            f"The 1 worst and then the 2 best of {len(read_scores(page)) + (1 if said.endswith('val') else 3)} {said}"
            in page.text
        )
        assert read_scores(page) == sorted(read_scores(page))
        assert (folder / "report.html").stat().st_size < 1_500_000
    assert page.texts.count("pseudo mask") == 3
    for gone in (labelled / "masks").iterdir():
        gone.unlink()
    assert command("report", str(labelled)).code == 0
    assert "There are no pictures" in read(labelled / "report.html").text


def read_scores(page: Page) -> list[float]:
    return [float(text.removeprefix("mean IoU ")) for text in page.texts if re.fullmatch(r"mean IoU \d\.\d+", text)]


@pytest.mark.usefixtures("_altair")
@pytest.mark.slow
def test_a_sweep_leaves_a_report(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    ended = command("train", "-m", "seed=1,2", *OVERRIDES, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ended.code == 0, ended.err
    page = read(tmp_path / "sweep/report.html")
    assert "Over seeds" in page.text
    assert "Mean IoU of CAMs by background threshold" in titles(page)  # of the tables.json that a training leaves


def test_without_the_extra(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence; a sweep and a pipeline end well."""
    from wsss.commands import report
    from wsss.report import afterwards

    run = make_run(tmp_path / "run")
    for module in (report, afterwards):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    ended = command("report", str(run))
    assert ended.code == 2
    assert ended.err.strip() == 'wsss-report: a report needs altair and vl_convert: pip install "wsss[report]"'
    afterwards.write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("_altair")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run is given"),
        (["{empty}"], "holds no run"),
        (["nowhere"], "holds no run"),
        (["{run}", "examples=-1"], "examples is -1"),
        (["{damaged}"], "metrics.json is damaged"),
    ],
)
def test_refused(command: Command, tmp_path: Path, arguments: list[str], said: str) -> None:
    places = {"empty": tmp_path / "empty", "run": make_run(tmp_path / "run"), "damaged": make_run(tmp_path / "damaged")}
    places["empty"].mkdir()
    (places["damaged"] / "metrics.json").write_text("{")
    ended = command("report", *(argument.format(**places) for argument in arguments))
    assert (ended.code, said in ended.err, "Traceback" in ended.err) == (2, True, False), ended.err


def test_damaged_configuration(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for tags in ({"val/miou": {"split": 3}}, {"val/miou": {"unheard": 1}}, {"val/miou": 1}):
        (run / "tags.json").write_text(json.dumps(tags))
        with pytest.raises(InputError, match=r"tags\.json is damaged"):
            read_all([run])
    (run / "tags.json").unlink()
    (alone,) = read_all([run])
    assert alone.notes["val/miou"] == [str(NOTE)]  # of a run from before there were tags
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        read_all([run])


@pytest.mark.parametrize("stages", [[], {"cam": 3}, {"cam": {"stage": "cam-01234567", "seconds": "some"}}])
def test_damaged_pipeline(tmp_path: Path, stages: Any) -> None:
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(InputError, match=r"pipeline\.json is damaged"):
        read_all([tmp_path])


def test_thumbnails() -> None:
    """Small files of a bounded size, masks with numbers and hatches."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1500, 500, 3), np.uint8)
    for value in (image, rng.random((1500, 500)).astype(np.float32), rng.integers(0, 3, (1500, 500))):
        content, size = thumbnail(value, image)
        assert size == (107, 320)
        assert content[:4] == b"RIFF"
        assert len(content) < 40_000
    mask = np.zeros((100, 100), np.uint8)
    mask[:50, :50], mask[60:] = 7, 255
    picture = numbered(mask)
    assert (picture[:50, :50] == 255).all(2).any()  # the number, in white
    assert len(np.unique(picture[60:])) == 2
    assert call("report", "--help") == 0
