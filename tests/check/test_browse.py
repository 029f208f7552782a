import dataclasses
import re
import runpy
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from resdet.check.browse import write_browse_page
from resdet.data.augment.pipeline import build_augment
from resdet.data.dataset import DetectionDataset
from resdet.data.order import TrainBatches, class_balanced_order
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.errors import DataError, UserError

EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """What a page holds: for each card its text and, for each pane, the boxes."""

    def __init__(self, text):
        super().__init__()
        self.cards, self.tags, self.text, self._pane = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        classes = (attributes.get("class") or "").split()
        self.tags.append((tag, attributes))
        if "card" in classes:
            self.cards.append({"trained": [], "stored": [], "text": ""})
        if "pane" in classes:
            self._pane = classes[1]
        if "box" in classes:
            places = [float(value) for value in re.findall(r":([\d.]+)%", attributes["style"])]
            self.cards[-1][self._pane].append((*places, int(attributes["data-label"]), "left-out" in classes))

    def handle_data(self, data):
        self.text += data
        if self.cards:
            self.cards[-1]["text"] += " ".join(data.split()) + "\n"


def make_table(num_images=6, **columns):
    return dataclasses.replace(shapes_table(num_images, 64, seed=0), **columns)


def make_page(tmp_path, table, *, images=None, augment=None, **options):
    dataset = DetectionDataset(table, images or ShapesImages(64, seed=0), augment, training=True)
    write_browse_page(tmp_path / "page.html", dataset, **options)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return dataset, text, Page(text)


def expected_boxes(dataset, sample):
    height, width = sample.image.shape[:2]
    scale = np.array([width, height, width, height]) / 100
    places = np.concatenate([sample.boxes[:, :2], sample.boxes[:, 2:] - sample.boxes[:, :2]], axis=1) / scale
    columns = zip(places.tolist(), sample.labels.tolist(), (~dataset.is_target(sample)).tolist(), strict=True)
    return sorted((*place, label, left_out) for place, label, left_out in columns)


def test_images_come_as_training_draws_and_augments_them(tmp_path):
    augment = build_augment([{"HorizontalFlip": {"p": 0.5}}, {"RandomCrop": {"height": 40, "width": 48}}])
    table = make_table()
    dataset, _, page = make_page(tmp_path, table, augment=augment, num_images=9, batch_size=3, seed=5)
    keys = [key for batch, _ in zip(TrainBatches(table.sizes, 3, seed=5), range(3), strict=False) for key in batch]
    assert len(page.cards) == len(keys) == 9
    for number, (card, key) in enumerate(zip(page.cards, keys, strict=True), start=1):
        assert f"draw {number}, image id {table.image_ids[key[0]]}\n" in card["text"]
        assert f"{table.file_names[key[0]]}\n" in card["text"]
        assert "as trained, 48 x 40\n" in card["text"]
        assert "as stored, 64 x 64\n" in card["text"]
        for pane, sample in (("trained", dataset.sample(key)), ("stored", dataset.stored(key))):
            np.testing.assert_allclose(sorted(card[pane]), expected_boxes(dataset, sample), atol=1e-3)
    assert any(card["trained"] != card["stored"] for card in page.cards)
    other = expected_boxes(dataset, dataset.stored(keys[1]))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(sorted(page.cards[0]["stored"]), other, atol=1e-3)


def test_the_order_is_that_of_the_sampling(tmp_path):
    table = make_table(20)
    images, labels = np.divmod(np.unique(table.image_of_box() * 4 + table.labels), 4)
    batches = TrainBatches(table.sizes, 4, order=class_balanced_order(images, labels, 20), seed=1)
    expected = [int(table.image_ids[index]) for index, _ in next(iter(batches))]
    _, text, _ = make_page(tmp_path, table, num_images=4, batch_size=4, seed=1, sampling="class_balanced")
    assert [int(number) for number in re.findall(r"image id (\d+)", text)] == expected


def test_crowd_and_difficult_boxes_are_marked(tmp_path):
    table = make_table()
    crowd, difficult = np.zeros((2, table.num_boxes), dtype=bool)
    crowd[table.rows(2).start] = difficult[table.rows(4).start] = True
    table = dataclasses.replace(table, crowd=crowd, difficult=difficult)
    _, _, page = make_page(tmp_path, table, num_images=6)
    for pane in ("trained", "stored"):
        assert sum(box[-1] for card in page.cards for box in card[pane]) == 2
    assert "crowd, not trained on" in page.text
    assert "difficult, not trained on" in page.text
    write_browse_page(
        tmp_path / "used.html",
        DetectionDataset(table, ShapesImages(64, seed=0), training=True, use_difficult=True),
        num_images=6,
    )
    used = (tmp_path / "used.html").read_text(encoding="utf-8")
    assert "difficult, not trained on" not in used
    assert "(difficult)" in used


def test_boxes_that_are_left_out_are_named(tmp_path):
    table = make_table(2)
    boxes = table.boxes_xywh.copy()
    boxes[0, 2] = 0
    boxes[1] = np.nan
    _, _, page = make_page(tmp_path, dataclasses.replace(table, boxes_xywh=boxes), num_images=2)
    assert "2 of its boxes left out, not finite or too thin: annotation 1, 2\n" in page.text


class Broken(ShapesImages):
    def __call__(self, index):
        if index == 1:
            raise DataError("image 2: shapes_0_000001.png: cannot be decoded: <truncated>")
        return super().__call__(index)


def test_an_image_that_cannot_be_read_is_shown_as_its_error(tmp_path):
    _, _, page = make_page(tmp_path, make_table(), images=Broken(64, 0), num_images=6)
    broken = [card for card in page.cards if "image id 2\n" in card["text"]]
    assert "image 2: shapes_0_000001.png: cannot be decoded: <truncated>\n" in broken[0]["text"]
    assert sum(bool(card["trained"]) for card in page.cards) == 5


def test_names_are_text_and_nothing_comes_from_elsewhere(tmp_path):
    table = make_table()
    categories = (dataclasses.replace(table.categories[0], name=EVIL), *table.categories[1:])
    names = np.array([f"{EVIL}{i}.png" for i in range(6)])
    table = dataclasses.replace(table, categories=categories, file_names=names, name=EVIL)
    _, text, page = make_page(tmp_path, table, num_images=6, facts=[(EVIL, EVIL)])
    assert "<script>alert" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(EVIL) > 10
    assert any(EVIL in (attributes.get("title") or "") for _, attributes in page.tags)
    sources = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert len(sources) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in text
    assert "url(" not in text


def test_a_page_of_more_images_shows_smaller_ones(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    table = make_table(8, sizes=np.full((8, 2), 480, dtype=np.int32))
    bytes_per_image = []
    for num_images in (2, 96):
        make_page(tmp_path, table, images=lambda index: noise, num_images=num_images)
        bytes_per_image.append((tmp_path / "page.html").stat().st_size / num_images)
    assert bytes_per_image[1] < 0.6 * bytes_per_image[0]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/page\.html: its directory does not exist"):
        make_page(tmp_path / "nowhere", make_table(), num_images=1)


@pytest.mark.slow
def test_the_page_works_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    table = make_table(12)
    crowd = np.zeros(table.num_boxes, dtype=bool)
    crowd[0] = True
    dataset, _, _ = make_page(tmp_path, dataclasses.replace(table, crowd=crowd), num_images=12)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with (
        playwright.sync_playwright() as play,
        play.chromium.launch(executable_path=chromium, args=arguments) as browser,
    ):
        problems = []
        for width in (1280, 360):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark")
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: problems.append(request.url))
            page.goto((tmp_path / "page.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            visible = "() => [...document.querySelectorAll('{}')].filter((e) => e.checkVisibility()).length"
            num_boxes = 2 * table.num_boxes
            assert page.evaluate(visible.format(".box")) == num_boxes
            page.keyboard.press("3")
            assert page.evaluate(visible.format(".pane")) == 12
            page.keyboard.press("1")
            page.keyboard.press("b")
            assert page.evaluate(visible.format(".box")) == 0
            page.keyboard.press("b")
            page.keyboard.press("n")
            assert page.evaluate(visible.format(".tag")) == 0
            # The filter leaves one class and the images that have it.
            page.get_by_role("button", name="none").click()
            assert page.evaluate(visible.format(".card")) == 0
            page.get_by_role("checkbox", name="triangle").check()
            assert page.evaluate(visible.format(".box")) == 2 * int((table.labels == 3).sum())
            with_triangle = {int(i) for i in table.image_of_box()[table.labels == 3]}
            assert page.evaluate(visible.format(".card")) == len(with_triangle)
            page.get_by_role("button", name="all").click()
            # A box lies where its numbers say, to the half pixel of the layout.
            place, picture = page.evaluate(
                "() => { const b = document.querySelector('.pane.stored .box'), r = (e) => e.getBoundingClientRect();"
                "const [x, y] = [r(b), r(b.parentElement)];"
                "return [[x.left - y.left, x.top - y.top, x.width, x.height], [y.width, y.height]]; }"
            )
            key = next(iter(TrainBatches(table.sizes, 1)))[0]
            sample = dataset.stored(key)
            largest = int(np.prod(sample.boxes[:, 2:] - sample.boxes[:, :2], axis=1).argmax())
            x1, y1, x2, y2 = sample.boxes[largest] / 64
            expected = np.array([x1, y1, x2 - x1, y2 - y1]) * np.tile(picture, 2)
            np.testing.assert_allclose(place, expected, atol=0.6)
            page.close()
    assert [problem for problem in problems if not problem.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("name", ["tiny_coco", "bccd", "voc2012_mini"])
def test_real_data(name, assets, tmp_path):
    from resdet.build import build_browse_page
    from resdet.config import load_config

    root = assets / name
    if name == "tiny_coco":
        overrides = [
            f"data.train.images={root / 'train2017'}",
            f"data.train.annotations={root / 'annotations' / 'instances_train2017.json'}",
        ]
        config = load_config("configs/frcnn_r101.yaml", overrides)
    else:
        folder = root / "VOC2012" if name == "voc2012_mini" else root
        config = load_config("configs/frcnn_r101_voc.yaml", [f"data.train.root={folder}", "data.train.split=train"])
    path = tmp_path / "page.html"
    build_browse_page(config, path, num_images=4)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.cards) == 4
    assert any(card["trained"] for card in page.cards)
    assert "HorizontalFlip: {p: 0.5}" in page.text
    assert path.stat().st_size < 4 * 8e6 / 48


@pytest.mark.parametrize(("num_images", "code"), [("3", 0), ("0", 2)])
def test_the_tool_writes_the_page(tmp_path, capsys, num_images, code):
    main = runpy.run_path("tools/check_data.py")["main"]
    path = tmp_path / "page.html"
    few = ["data.train.num_images=5", "data.val.num_images=5"]
    arguments = ["configs/quickstart.yaml", *few, "--no-images", "--browse", str(path), "--browse-images", num_images]
    if code:
        with pytest.raises(SystemExit):
            main(arguments)
        assert "--browse-images must be at least 1, got 0" in capsys.readouterr().err
    else:
        main(arguments)
        assert f"written: {path}" in capsys.readouterr().out
        assert len(Page(path.read_text(encoding="utf-8")).cards) == 3
