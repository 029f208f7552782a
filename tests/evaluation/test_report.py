"""The report as a file, and as a page in a real browser."""

import base64
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

from resdet.data.annotations import AnnotationTable
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.data.images import FolderImages
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError
from resdet.evaluation.coco import coco_metrics
from resdet.evaluation.curves import Curve, best_score_threshold
from resdet.evaluation.detect import Evaluation
from resdet.evaluation.errors import find_errors
from resdet.evaluation.report import write_report, write_run_report
from resdet.evaluation.report_runs import ReportedRun, check_same_ground_truth, read_log
from resdet.evaluation.report_tables import thinned_curve
from resdet.evaluation.voc import voc_metrics
from resdet.types import Category, Detections

EVIL = "<script>alert(1)</script>"


def evaluated(table: AnnotationTable, detections: Detections) -> Evaluation:
    return Evaluation(
        coco=coco_metrics(table, detections),
        voc=voc_metrics(table, detections),
        detections=detections,
        score_threshold=best_score_threshold(table, detections),
    )


def make_dataset(num_images: int = 8) -> DetectionDataset:
    """Return shapes, with a class whose name is a script and one that no image shows."""
    table = shapes_table(num_images, 96, 0)
    names = ["circle", "square", EVIL, "never there"]
    categories = tuple(Category(label, label, name) for label, name in enumerate(names, start=1))
    return DetectionDataset(replace(table, categories=categories), ShapesImages(96, 0), training=False)


def make_detections(table: AnnotationTable, seed: int = 0) -> Detections:
    """Return good, shifted, misclassified, duplicated and made-up detections; some boxes have none."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(rng.random(table.num_boxes) < 0.85)
    rows = np.concatenate([rows, rows[::2]])
    xywh = table.boxes_xywh[rows] + rng.normal(0, 0.08, (len(rows), 4)) * np.tile(table.boxes_xywh[rows, 2:], 2)
    num_far = table.num_images
    far = np.concatenate([rng.uniform(0, 60, (num_far, 2)), np.full((num_far, 2), 20.0)], axis=1)
    xywh = np.concatenate([xywh, far])
    classes = len(table.categories)
    labels = np.where(rng.random(len(rows)) < 0.15, rng.integers(1, classes + 1, len(rows)), table.labels[rows])
    return Detections(
        np.concatenate([table.image_of_box()[rows], np.arange(num_far)]),
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        np.concatenate([labels, rng.integers(1, classes + 1, num_far)]).astype(np.int64),
        np.concatenate([rng.uniform(0.2, 1, len(rows)), rng.uniform(0.05, 0.6, num_far)]).round(3),
    )


def make_runs(table: AnnotationTable) -> list[ReportedRun]:
    def log(factor: float) -> list[dict[str, float]]:
        losses = [{"step": float(step), "loss": factor * 10 / step, "lr": 1e-3} for step in range(10, 101, 10)]
        return [*losses, {"step": 50, "AP": 0.2, "AP50": 0.4, "val_loss": 1.0}, {"step": 100, "AP": 0.3, "AP50": 0.5}]

    config = {"optim": {"lr": 0.01, "name": "sgd"}, "augment": [], "output_dir": "runs/a"}
    other = {"optim": {"lr": 0.02, "name": "sgd"}, "augment": [], "output_dir": "runs/b", "added": {"key": None}}
    return [
        ReportedRun("first", evaluated(table, make_detections(table)), config, log(1)),
        ReportedRun("second & <b>bold</b>", evaluated(table, make_detections(table, 1)), other, log(2)),
    ]


@pytest.fixture(scope="module")
def dataset() -> DetectionDataset:
    return make_dataset()


@pytest.fixture(scope="module")
def single(dataset: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "report.html"
    write_report(path, dataset, make_runs(dataset.table)[:1])
    return path


@pytest.fixture(scope="module")
def double(dataset: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("double") / "report.html"
    write_report(path, dataset, make_runs(dataset.table))
    return path


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


# The file ----------------------------------------------------------------------------------------------------------


def test_page_names_nothing_outside_of_itself(single: Path) -> None:
    text = single.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href|action|data|poster)="([^"]*)"', text)
    assert len(addresses) > 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in text
    assert "url(" not in text


def test_policy_allows_the_very_style_and_script_of_the_page(single: Path) -> None:
    text = single.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert not re.search(r"\s(style|on\w+)=", text[text.index("<body>") : text.rindex("<script>")])


def test_names_are_escaped(double: Path) -> None:
    text = double.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<b>bold" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert EVIL in embedded(double)["classes"], "the script has the name as it is, as text"


def test_undefined_numbers_are_dashes(single: Path) -> None:
    text = single.read_text(encoding="utf-8")
    row = re.search(r'<tr><th scope="row" data-sort="never there">.*?</tr>', text, re.DOTALL)
    assert row
    assert row[0].count('<span class="undefined" aria-hidden="true">&ndash;</span>') == 12, "all but name and boxes"
    assert "-1" not in re.sub(r"<[^>]*>", "", row[0])


def test_headline_numbers_are_those_of_the_evaluation(dataset: DetectionDataset, single: Path) -> None:
    text = single.read_text(encoding="utf-8")
    metrics = make_runs(dataset.table)[0].evaluation.metrics
    shown = re.findall(r"<dt>([^<]*)</dt><dd>(.*?)</dd>", text)
    assert len(shown) == len(metrics) == 14
    for (_, value), expected in zip(shown, metrics.values(), strict=True):
        assert ("&ndash;" in value) if expected < 0 else (value == f"{expected:.3f}")


def test_images_keep_to_their_budget_and_the_page_says_so(dataset: DetectionDataset, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    runs = make_runs(dataset.table)[:1]
    wrong = len(worst_images(dataset.table, runs[0].evaluation.detections))
    write_report(path, dataset, runs, max_images=3)
    assert len(pictures(path)) == 3
    assert f"3 of the {wrong} images with errors" in path.read_text(encoding="utf-8")

    write_report(path, dataset, runs, max_image_bytes=12_000)
    few = pictures(path)
    assert 0 < len(few) < wrong
    assert sum(map(len, few)) <= 12_000
    assert "0.012 MB" in path.read_text(encoding="utf-8")

    write_report(path, dataset, runs, max_image_bytes=10)
    assert "allows for none" in path.read_text(encoding="utf-8")


def worst_images(table: AnnotationTable, detections: Detections) -> list[int]:
    """Return the images with errors, by cost, then by number of errors."""
    analysis = find_errors(table, detections)
    counts = np.bincount(analysis.errors.image_index, minlength=table.num_images).tolist()
    wrong = [index for index, count in enumerate(counts) if count]
    return sorted(wrong, key=lambda index: (-analysis.image_loss[index], -counts[index]))


def pictures(path: Path) -> list[str]:
    return re.findall(r'<img src="(data:image/jpeg;base64,[^"]*)"', path.read_text(encoding="utf-8"))


def test_gallery_shows_what_find_errors_found(dataset: DetectionDataset, single: Path) -> None:
    """Each detection is shown once, with its kind; images come in the order of their cost."""
    text = single.read_text(encoding="utf-8")
    detections = make_runs(dataset.table)[0].evaluation.detections
    analysis = find_errors(dataset.table, detections)
    worst = worst_images(dataset.table, detections)
    assert re.findall(r'<span class="name">(.*?)</span>', text) == [str(dataset.table.file_names[i]) for i in worst]
    shown = np.isin(analysis.errors.image_index, worst)
    for kind in range(5):
        name = ("classification", "localisation", "both", "duplicate", "background")[kind]
        count = int(np.count_nonzero(analysis.errors.kind[shown] == kind))
        assert text.count(f'data-k="{name}"') == count
    assert text.count('class="det ') == int(np.isin(detections.image_index, worst).sum())


def test_points_of_a_curve_are_what_their_thresholds_give() -> None:
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.integers(0, 300, 2000) / 300)  # many equal
    curve = Curve("all", 0.5, 900, rng.random(2000) < np.linspace(0.9, 0.1, 2000), scores)
    drawn = thinned_curve(curve, 150)
    points = drawn["points"]
    assert 100 < len(points) <= 151

    def check(recall: float, precision: float, score: float) -> None:
        # Four decimals are written; scores that differ by 1/300 stay distinct.
        kept = curve.scores >= score - 6e-5
        assert recall == pytest.approx(curve.hits[kept].sum() / 900, abs=6e-5)
        assert precision == pytest.approx(curve.hits[kept].sum() / kept.sum(), abs=6e-5)

    for point in points:
        check(*point)
    with pytest.raises(AssertionError):
        check(points[5][0] + 2e-4, *points[5][1:])
    best = curve.best_f1()
    assert points[drawn["best"]] == pytest.approx([best.recall, best.precision, best.threshold], abs=6e-5)


def test_runs_differ_in_these_keys_only(double: Path) -> None:
    text = double.read_text(encoding="utf-8")
    section = text[text.index('<section id="config"') : text.index('<section id="curves"')]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', section) == ["optim.lr", "added.key"]
    assert re.findall(r"<td><code>(.*?)</code>", section) == ["0.01", "0.02", "not set", "null"]


def test_training_curves_come_from_the_logs(double: Path) -> None:
    charts = {chart["title"]: chart["series"] for chart in embedded(double)["logs"]}
    assert list(charts) == ["Loss", "AP", "AP50", "Learning rate"]
    assert [line["name"] for line in charts["Loss"]] == [
        "first",
        "first, validation",
        "second & <b>bold</b>",
        "second & <b>bold</b>, validation",
    ]
    assert charts["Loss"][2]["points"][:2] == [[10, 2], [20, 1]]
    assert charts["AP"][0]["points"] == [[50, 0.2], [100, 0.3]]


@pytest.mark.parametrize("what", ["no detections", "nothing right", "perfect", "no ground truth"])
def test_extremes_are_pages_too(what: str, dataset: DetectionDataset, tmp_path: Path) -> None:
    table = dataset.table
    perfect = np.concatenate([table.boxes_xywh[:, :2], table.boxes_xywh[:, :2] + table.boxes_xywh[:, 2:]], axis=1)
    found = Detections(table.image_of_box(), perfect, table.labels, np.linspace(0.9, 0.5, table.num_boxes))
    if what == "no detections":
        found = Detections(found.image_index[:0], found.boxes[:0], found.labels[:0], found.scores[:0])
    elif what == "nothing right":
        found = replace(found, labels=np.full_like(found.labels, 4))
    elif what == "no ground truth":
        table = replace(table, difficult=np.ones(table.num_boxes, dtype=np.bool_))
        dataset = DetectionDataset(table, ShapesImages(96, 0), training=False)
    write_report(tmp_path / "report.html", dataset, [ReportedRun("run", evaluated(table, found))])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("No image has any error." in text) == (what in ("perfect", "no ground truth"))
    assert bool(pictures(tmp_path / "report.html")) == (what in ("no detections", "nothing right"))
    assert ("Detections of score 0.50 (the default, as no detection is correct) or more" in text) == (what != "perfect")


def test_subset_is_the_dataset_of_its_images(dataset: DetectionDataset, tmp_path: Path) -> None:
    subset = Subset(dataset, [5, 2])
    table = dataset.select_images([5, 2]).table
    write_report(tmp_path / "report.html", subset, [ReportedRun("run", evaluated(table, make_detections(table)))])
    assert ": 2 images" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_more_classes_than_the_matrix_shows(dataset: DetectionDataset, tmp_path: Path) -> None:
    categories = tuple(Category(label, label, f"class {label}") for label in range(1, 131))
    many = DetectionDataset(replace(dataset.table, categories=categories), ShapesImages(96, 0), training=False)
    write_report(
        tmp_path / "report.html", many, [ReportedRun("run", evaluated(many.table, make_detections(many.table)))]
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "30 classes with the fewest confusions are left out" in text
    section = text[text.index('<section id="confusion"') :]
    assert section[: section.index("</tr>")].count('<th scope="col"') == 101


def test_run_report_is_in_the_folder_of_the_run(dataset: DetectionDataset, tmp_path: Path) -> None:
    run = make_runs(dataset.table)[0]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.log))
    write_run_report(tmp_path, dataset, run.evaluation, run.config)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<h1>{tmp_path.name}</h1>" in text
    assert embedded(tmp_path / "report.html")["logs"][0]["title"] == "Loss"


def test_only_the_last_line_of_a_log_may_be_cut_off(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_damaged_lines_of_a_log_are_left_out_of_the_curves(
    dataset: DetectionDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An evaluation does not depend on them, and the script of the page can read what is left."""
    damaged = [b'{"step": 1, "lo', b"\0" * 50, b"caf\xe9", b"[" * 100_000, b"[1]", b'{"loss": 2.0}', b'{"step": NaN}']
    damaged += [b'{"step": 1e999}', b'{"step": 1' + b"0" * 400 + b"}", b'{"step": "1"}', b'{"step": true}']
    whole = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": NaN, "AP": 1e999}', b'{"step": 3, "loss": 1.5}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*damaged, *whole, b"\0\0"]))
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert "metrics.jsonl: left out of the curves, as damaged: line 1, 2, 3, 4 and 7 more" in caplog.text
    run = replace(make_runs(dataset.table)[0], log=log)
    write_report(tmp_path / "report.html", dataset, [run])
    (chart,) = embedded(tmp_path / "report.html")["logs"]
    assert chart["series"][0]["points"] == [[1, 2.0], [3, 1.5]]


class Page(HTMLParser):
    """The names of a page's elements and of their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def test_no_name_becomes_an_element_or_an_attribute(dataset: DetectionDataset, tmp_path: Path) -> None:
    """Names of data, images, classes, runs and settings; also one that is no UTF-8."""
    evil = "</title></script></style>'\"><img src=x onerror=alert(1)>" + os.fsdecode(b"\xe9")
    table = replace(
        dataset.table,
        name=evil,
        file_names=np.array([f"{n}/{evil}.png" for n in range(dataset.table.num_images)]),
        categories=tuple(replace(category, name=f"{category.label} {evil}") for category in dataset.categories),
    )
    attacked = DetectionDataset(table, ShapesImages(96, 0), training=False)
    runs = [
        replace(run, name=f"{number} {evil}", config={evil: number, "key": f"{number} {evil}"})
        for number, run in enumerate(make_runs(table))
    ]
    write_report(tmp_path / "attacked.html", attacked, runs)
    plain = [replace(run, name=str(number), config={"a": number, "key": number}) for number, run in enumerate(runs)]
    write_report(tmp_path / "plain.html", dataset, plain)
    page, expected = Page(tmp_path / "attacked.html"), Page(tmp_path / "plain.html")
    page.tags.pop("wbr"), expected.tags.pop("wbr", None)  # after each / of a file's name
    assert page.tags == expected.tags
    assert page.attributes == expected.attributes
    assert not any(name.startswith("on") for name in page.attributes)


def test_only_runs_on_the_same_data_are_compared(dataset: DetectionDataset) -> None:
    table = dataset.table
    check_same_ground_truth([("a", table), ("b", replace(table, name="elsewhere"))])
    with pytest.raises(DataError, match=r"same classes in the same order: a has circle, square.*b has square, circle"):
        check_same_ground_truth([("a", table), ("b", table.select_classes(["square", "circle", EVIL, "never there"]))])
    with pytest.raises(DataError, match=r"same data: a has 8 images .* b has 7 .* image_ids, .* differ"):
        check_same_ground_truth([("a", table), ("b", table.select_images(np.arange(7)))])
    moved = replace(table, boxes_xywh=table.boxes_xywh + 1)
    with pytest.raises(DataError, match="and boxes_xywh differ"):
        check_same_ground_truth([("a", table), ("b", table), ("c", moved)])


def test_names_of_runs_are_unique(dataset: DetectionDataset, tmp_path: Path) -> None:
    run = make_runs(dataset.table)[0]
    for runs in ([], [run, run]):
        with pytest.raises(ValueError, match="with different names"):
            write_report(tmp_path / "report.html", dataset, runs)
    assert not list(tmp_path.iterdir())


# The page ----------------------------------------------------------------------------------------------------------

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install resdet[dev])")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium on the PATH")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = started.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Open pages; none of them may request anything or write to the console."""
    requested: list[str] = []
    complaints: list[str] = []
    contexts = []

    def visit(path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [url for url in requested if not url.startswith(("file:", "data:"))]
    assert len([url for url in requested if url.startswith("file:")]) == len(contexts)
    assert not complaints


def column(page: Any, table: str, number: int) -> list[str]:
    cells: list[str] = page.locator(f"{table} tbody tr > :nth-child({number})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.sort)"
    )
    return cells


def drawn(page: Any, what: str = ".det") -> int:
    count: int = page.locator(f".shot:not([hidden]) {what}:not([hidden])").count()
    return count


def slide(page: Any, value: float) -> None:
    page.locator("#filter-score").fill(str(value))


def test_headers_sort_with_undefined_values_last(visit: Open, single: Path) -> None:
    page = visit(single)
    headers = page.locator("#classes-0 thead th")
    assert column(page, "#classes-0", 1) == ["circle", "square", EVIL, "never there"]
    for order in ("descending", "ascending"):
        headers.nth(2).locator("button").click()
        assert headers.nth(2).get_attribute("aria-sort") == order
        *values, last = column(page, "#classes-0", 3)
        assert last == "", "the class that is never there"
        assert list(map(float, values)) == sorted(map(float, values), reverse=order == "descending")
    headers.nth(0).locator("button").click()
    assert headers.nth(0).get_attribute("aria-sort") == "ascending"
    assert headers.nth(2).get_attribute("aria-sort") is None
    assert column(page, "#classes-0", 1) == [EVIL, "circle", "never there", "square"]


def test_gallery_is_filtered_by_score_class_and_kind(visit: Open, single: Path, dataset: DetectionDataset) -> None:
    page = visit(single)
    detections = make_runs(dataset.table)[0].evaluation.detections
    shown = np.isin(detections.image_index, worst_images(dataset.table, detections))
    scores, labels = detections.scores[shown], detections.labels[shown]
    counts = []
    for score in (0, 0.3, 0.9):
        slide(page, score)
        counts.append(drawn(page))
        assert counts[-1] == np.count_nonzero(scores >= score)
        assert f"{counts[-1]} detection" in page.locator("#filter-count").inner_text()
    assert counts[0] > counts[1] > counts[2]
    assert page.locator("#filter-score-value").inner_text() == "0.90"

    num_lost = drawn(page, ".lost")
    slide(page, 0)
    assert drawn(page, ".lost") < num_lost, "a lower score finds more objects"

    page.locator("#filter-class").select_option(label="circle")
    assert drawn(page) == np.count_nonzero(labels == 1)
    assert drawn(page, ".gt") == page.locator(".gt[data-c='1']").count()
    page.locator("#filter-class").select_option("0")
    page.locator("#filter-kind").select_option("background")
    assert drawn(page) == page.locator(".det[data-k=background]").count() > 0
    num_images = page.locator(".shot:not([hidden])").count()
    assert num_images < page.locator(".shot").count()
    assert page.locator("#filter-count").inner_text().startswith(f"{num_images} of ")
    page.locator("#filter-kind").select_option("missed")
    assert drawn(page) == 0
    assert drawn(page, ".gt") == page.locator(".gt[data-m='1']").count() > 0
    page.locator("#filter-kind").select_option("")
    page.locator("#filter-truth").uncheck()
    assert drawn(page, ".gt") == 0


def test_pointing_at_a_curve_or_a_box_shows_its_numbers(visit: Open, single: Path) -> None:
    page = visit(single)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    chart = page.locator("#curve-chart svg")
    chart.hover()
    assert re.search(r"score at least 0\.\d+\nprecision [01]\.\d+\nrecall [01]\.\d+\nF1 0\.\d+", tip.inner_text())
    slide(page, 0)
    picture = page.locator(".picture").first
    picture.scroll_into_view_if_needed()
    box = page.locator(".shot .det rect").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.search(r"score \d", tip.inner_text()) or "object" in tip.inner_text()
    page.mouse.move(5, 5)
    assert tip.is_hidden()

    page.locator(".enlarge").first.click()
    page.locator("#large .picture").hover(position={"x": 200, "y": 200})
    box = page.locator("#large .det rect").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible()
    assert tip.evaluate("tip => tip.parentElement.id") == "large", "an open dialog covers everything outside it"


def test_the_whole_page_works_by_keyboard(visit: Open, single: Path) -> None:
    page = visit(single)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the numbers"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"

    def tab_to(query: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("query => document.activeElement.matches(query)", query):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus is seen"
                return
        raise AssertionError(f"no Tab leads to {query}")

    tab_to("#curve-class")
    page.keyboard.press("ArrowDown")
    assert page.locator("#curve-legend li").all_inner_texts()[0].startswith("all classes pooled")
    tab_to("#curve-chart svg")
    page.keyboard.press("Home")
    first = page.locator("#curve-chart svg").get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    second = page.locator("#curve-chart svg").get_attribute("aria-valuetext")
    assert first != second
    assert re.match(r"all classes pooled: score at least .*, precision .*, recall .*", second)
    assert page.locator("#tip").is_visible()
    tab_to("#classes-0 th button")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.locator("#classes-0 th").first.get_attribute("aria-sort") == "descending"
    tab_to("#filter-score")
    page.keyboard.press("Home")
    before = drawn(page)
    page.keyboard.press("End")
    assert drawn(page) < before
    page.keyboard.press("Home")
    tab_to(".enlarge")
    page.keyboard.press("Enter")
    dialog = page.locator("#large")
    assert dialog.is_visible()
    assert dialog.locator("text").count() == dialog.locator(".det").count() > 0
    title = page.locator("#large-title").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#large-title").inner_text() != title
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.className") == "enlarge"


LUMINANCE = """query => {
  const parse = color => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(query)].map(node => {
    const style = getComputedStyle(node);
    const ink = parse(node instanceof SVGElement ? style.fill : style.color);
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    const ground = layers.reverse().reduce((below, [r, g, b, a]) =>
      below.map((v, i) => v + ([r, g, b][i] - v) * a / 255), [255, 255, 255]);
    const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""
"""Computes the WCAG contrast of each element's text with its background."""


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_text_stands_out_in_light_and_dark(scheme: str, visit: Open, double: Path) -> None:
    page = visit(double, scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == (scheme == "dark")
    for query in ("h1", ".lead", "nav a", ".note", "td", "th", ".small", "summary", "button", ".legend li", "text"):
        contrasts = page.evaluate(LUMINANCE, query)
        assert contrasts
        assert min(contrasts) >= 4.5, f"{query}: WCAG AA"


@pytest.mark.parametrize("which", ["single", "double"])
def test_phone_never_scrolls_sideways(which: str, visit: Open, request: pytest.FixtureRequest) -> None:
    page = visit(request.getfixturevalue(which), width=360, height=740)
    for details in page.locator("main details").all():
        if details.is_visible():
            details.locator("summary").click()
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths == [360, 360]
    page.locator("#curve-chart svg").hover()
    page.locator(".enlarge:visible").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#large").bounding_box()["width"] <= 360


def test_page_is_accessible_to_screen_readers(visit: Open, double: Path) -> None:
    page = visit(double)
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    assert page.get_by_role("status").inner_text()
    unnamed = """() => [...document.querySelectorAll("select, input, button, [role=region], [role=slider], section")]
      .filter(node => !node.ariaLabel && !node.labels?.length && !node.hasAttribute("aria-labelledby"))
      .filter(node => node.localName !== "button" || !node.textContent.trim())
      .map(node => node.outerHTML)"""
    assert page.evaluate(unnamed) == []
    dangling = """() => [...document.querySelectorAll("[aria-labelledby]")]
      .filter(node => !document.getElementById(node.getAttribute("aria-labelledby"))).map(node => node.outerHTML)"""
    assert page.evaluate(dangling) == []
    assert page.locator("main table:not(dialog table)").count() == page.locator("main table caption").count()
    assert page.locator("img:not([alt])").count() == 0
    ids = page.locator("[id]").evaluate_all("nodes => nodes.map(node => node.id)")
    assert len(ids) == len(set(ids))


def test_several_runs_stand_side_by_side(visit: Open, double: Path) -> None:
    page = visit(double)
    assert page.locator("#metrics thead th").all_inner_texts() == ["Metric", "first", "second & <b>bold</b>"]
    assert page.locator("#metrics tbody tr").count() == 14
    assert page.locator("#curve-chart path.series").count() == 2
    assert page.locator("[data-log='0'] path.series").count() == 4, "two losses of each run"
    assert page.locator("#compared-classes tbody tr").count() == 4
    slide(page, 0)
    first = drawn(page, ".det[data-r='0']")
    assert first > 0
    assert drawn(page, ".det[data-r='1']") == 0
    page.locator("#filter-run").select_option("1")
    assert drawn(page, ".det[data-r='0']") == 0
    assert drawn(page, ".det[data-r='1']") > 0
    page.locator("#curve-class").select_option(label="circle")
    page.locator("#curve-iou").select_option("0.75")
    assert page.locator("#curve-legend li").count() == page.locator("#curve-chart path.series").count() == 2


def test_policy_blocks_an_injected_script(browser: Any, single: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(single.as_uri())
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.gotIn = true";
      document.body.append(script);
      fetch("https://example.org").catch(() => {});
    }""")
    assert page.evaluate("window.gotIn") is None
    assert len([text for text in said if "Content Security Policy" in text]) >= 2
    page.close()


@pytest.mark.slow
def test_eighty_classes_of_real_pictures(visit: Open, assets: Path, tmp_path: Path) -> None:
    folder = assets / "tiny_coco"
    table = read_coco(folder / "annotations" / "instances_val2017.json")
    dataset = DetectionDataset(table, FolderImages(folder / "val2017", table), training=False)
    path = tmp_path / "report.html"
    write_report(path, dataset, [ReportedRun("run", evaluated(table, make_detections(table)))])
    assert path.stat().st_size < 5_000_000
    for width in (360, 1200):
        page = visit(path, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        box = page.locator(".matrix").bounding_box()
        assert box["width"] <= width
        assert box["height"] <= 900, "a window on the matrix, not all of its 81 rows"
        page.locator(".matrix").evaluate("matrix => matrix.scrollTo(300, 300)")
        corner = page.locator(".matrix tbody th").nth(40).bounding_box()
        assert corner["x"] == pytest.approx(box["x"], abs=3), "names of rows stay in sight"
        page.locator("#filter-class").select_option(label="person")
        assert 0 < page.locator(".shot:not([hidden])").count() < page.locator(".shot").count()
