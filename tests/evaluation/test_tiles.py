"""Detection by tiles: what the tiles cover, which boxes are kept, and the doors to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

import resdet
from resdet.commands import eval as eval_command, predict
from resdet.config import parse_config
from resdet.data.coco import read_coco
from resdet.data.dataset import DetectionDataset
from resdet.drawing import draw
from resdet.errors import ConfigError, UserError, WeightsError
from resdet.evaluation import evaluate
from resdet.evaluation.inference import inference
from resdet.evaluation.settings import InferenceSettings
from resdet.evaluation.tiles import tile_grid
from resdet.models.detector import Detector, build_detector
from resdet.models.spec import DetectorSpec, Tiles, Tricks
from resdet.training.detection import train
from resdet.types import Category, Prediction

# ---- the grid


@pytest.mark.parametrize("size", [(4000, 6000), (800, 801), (9000, 12000), (333, 5000), (1440, 1440), (1441, 1440)])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.55, 0.9])
def test_tiles_cover_an_image_exactly_and_overlap_by_what_is_asked_for(size: tuple[int, int], overlap: float) -> None:
    height, width = size
    grid = tile_grid(height, width, Tiles(800, overlap))
    assert (grid[:, :2] >= 0).all()
    assert (grid[:, 2:] <= [width, height]).all()
    for axis, length in ((0, width), (1, height)):
        starts, ends = np.unique(grid[:, axis]), np.unique(grid[:, 2 + axis])
        assert (ends - starts == min(800, length)).all(), "no sliver"
        assert (starts[0], ends[-1]) == (0, length)
        assert (ends[:-1] - starts[1:] >= 800 * overlap - 1e-9).all()
        # One tile fewer would not do.
        assert len(starts) == 1 or 800 + (len(starts) - 2) * (800 - 800 * overlap) < length + 1
    assert len(np.unique(grid, axis=0)) == len(grid) == len(np.unique(grid[:, 0])) * len(np.unique(grid[:, 1]))


def test_small_images_are_one_tile() -> None:
    assert tile_grid(300, 799, Tiles(800)).tolist() == [[0, 0, 799, 300]]
    assert tile_grid(800, 800, Tiles(800)).tolist() == [[0, 0, 800, 800]]
    assert tile_grid(800, 1600, Tiles(800, 0.0)).tolist() == [[0, 0, 800, 800], [800, 0, 1600, 800]]


# ---- a perfect detector


def located(height: int, width: int) -> Tensor:
    """An image whose pixels say where they are: uint8 [3, H, W], 12 bits for each coordinate."""
    y, x = np.mgrid[:height, :width]
    return torch.from_numpy(np.stack([x >> 4, (x & 15) << 4 | y >> 8, y & 255]).astype(np.uint8))


SIDE = 128


class Perfect(nn.Module):
    """Returns every object as far as it can be seen, and nothing of one of which less than a quarter can.

    A tile's first pixel tells where it lies. What is no square of ``SIDE`` is the whole image, at some scale.
    """

    def __init__(self, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes, self.labels, self.size = boxes, labels, size
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        self.batches.append([tuple(image.shape[1:]) for image in images])
        return [self._seen(image) for image in images]

    def place(self, image: Tensor) -> tuple[int, int, Tensor]:
        """Return where a tile begins and its scale, of x and y."""
        height, width = image.shape[1:]
        if (height, width) != (SIDE, SIDE):
            return 0, 0, torch.tensor([width / self.size[1], height / self.size[0]])
        first, second, third = (image[:, 0, 0] * 255).round().int().tolist()
        return first << 4 | second >> 4, (second & 15) << 8 | third, torch.ones(2)

    def _seen(self, image: Tensor) -> Prediction:
        height, width = image.shape[1:]
        x, y, scale = self.place(image)
        boxes = (self.boxes - torch.tensor([x, y, x, y])) * scale.repeat(2)
        seen = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        part, whole = ((one[:, 2:] - one[:, :2]).clamp(min=0).prod(dim=1) for one in (seen, boxes))
        keep = part >= 0.25 * whole
        # Pieces are as sure as whole objects: scores alone do not tell them apart.
        scores = torch.linspace(0.9, 0.5, len(boxes))[keep]
        return Prediction(boxes=seen[keep], labels=self.labels[keep], scores=scores)


def scattered(size: tuple[int, int], sides: tuple[int, int], cell: int) -> tuple[Tensor, Tensor]:
    """Objects that do not touch each other: one at random in each cell of the image, and its class, 1 or 2."""
    rng = np.random.default_rng(len(str(size)) + cell)
    boxes = []
    for y in range(0, size[0] - cell + 1, cell):
        for x in range(0, size[1] - cell + 1, cell):
            width, height = rng.uniform(*sides, 2)
            left, top = x + rng.uniform(0, cell - width), y + rng.uniform(0, cell - height)
            boxes.append((left, top, left + width, top + height))
    order = rng.permutation(len(boxes))
    return torch.tensor(boxes)[order], torch.from_numpy(rng.integers(1, 3, len(boxes)))


def found_by_tiles(model: nn.Module, image: Tensor, **settings: object) -> Prediction:
    with inference(model, InferenceSettings(**{"tiles": (SIDE, 0.25), **settings})) as run:  # type: ignore[arg-type]
        return run([image], "a test")[0]


def same_boxes(found: Prediction, boxes: Tensor, labels: Tensor, tolerance: float) -> bool:
    """Whether the same boxes were found, each once and of its class."""
    if len(found["boxes"]) != len(boxes):
        return False
    distance = (found["boxes"][:, None] - boxes).abs().amax(dim=2)  # [found, boxes]
    nearest = distance.argmin(dim=1)
    return (
        sorted(nearest.tolist()) == list(range(len(boxes)))
        and bool((distance.amin(dim=1) <= tolerance).all())
        and bool((labels[nearest] == found["labels"]).all())
    )


SIZE = (640, 900)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("sides", [(3, 12), (20, 29)])
def test_objects_not_quite_as_large_as_the_overlap_are_found_once_and_exactly(
    sides: tuple[int, int], batch_size: int
) -> None:
    boxes, labels = scattered(SIZE, sides, 34)
    model = Perfect(boxes, labels, SIZE)
    found = found_by_tiles(model, located(*SIZE), batch_size=batch_size)
    assert same_boxes(found, boxes, labels, 1e-3)
    assert (found["scores"].diff() <= 0).all()
    num_tiles = len(tile_grid(*SIZE, Tiles(SIDE, 0.25)))
    *tiles, last = model.batches
    assert [len(batch) for batch in tiles[:-1]] == [batch_size] * (len(tiles) - 1)
    assert sum(map(len, tiles)) == num_tiles
    assert {size for batch in tiles for size in batch} == {(SIDE, SIDE)}
    assert last == [(128, 180)], "the whole image, its shorter side a tile's"


@pytest.mark.parametrize("sides", [(40, 100), (90, 150), (150, 300)])
def test_objects_larger_than_the_overlap_are_found_whole_and_their_pieces_dropped(sides: tuple[int, int]) -> None:
    boxes, labels = scattered(SIZE, sides, sides[1] + 5)
    found = found_by_tiles(Perfect(boxes, labels, SIZE), located(*SIZE))
    assert same_boxes(found, boxes, labels, 0.05)


def test_without_the_rules_for_cut_boxes_pieces_would_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, labels = scattered(SIZE, (20, 29), 34)
    monkeypatch.setattr("resdet.evaluation.tiles._MARGIN", -100.0)  # nothing is near a border
    found = found_by_tiles(Perfect(boxes, labels, SIZE), located(*SIZE))
    assert len(found["boxes"]) > len(boxes)
    assert not same_boxes(found, boxes, labels, 1e-3)


# ---- photographs


class Recognising(Perfect):
    """Returns of each photograph of a mosaic the annotated objects that a tile shows, as a real detector might.

    A box is off by up to a pixel, in each tile by another; scores say nothing of how much of an object is seen; and
    what overlaps a better box of its class is suppressed. It depends on nothing around a photograph: a network's
    answers also depend on that, which is no matter of tiles (the README of the evaluation has a measurement).
    """

    def __init__(self, boxes: Tensor, labels: Tensor, mosaic: Tensor, grid: np.ndarray) -> None:
        super().__init__(boxes, labels, (mosaic.shape[1], mosaic.shape[2]))
        self.places = {mosaic[:, y1:y2, x1:x2].numpy().tobytes(): (x1, y1) for x1, y1, x2, y2 in grid.tolist()}
        self.generator = torch.Generator().manual_seed(0)

    def place(self, image: Tensor) -> tuple[int, int, Tensor]:
        known = self.places.get((image * 255).round().byte().numpy().tobytes())
        if known is None:
            return 0, 0, torch.tensor([image.shape[2] / self.size[1], image.shape[1] / self.size[0]])
        return *known, torch.ones(2)

    def _seen(self, image: Tensor) -> Prediction:
        exact = super()._seen(image)
        noise = torch.rand(exact["boxes"].shape, generator=self.generator) * 2 - 1
        scale = self.place(image)[2].repeat(2)
        boxes = (exact["boxes"] + noise * scale).clamp(min=0)
        boxes = boxes.minimum(torch.tensor([image.shape[2], image.shape[1]] * 2))
        scores = torch.rand(len(boxes), generator=self.generator) / 2 + 0.5
        keep = batched_nms(boxes, scores, exact["labels"], 0.5)
        return Prediction(boxes=boxes[keep], labels=exact["labels"][keep], scores=scores[keep])


@pytest.mark.parametrize("overlap", [0.2, 0.5])
def test_a_mosaic_of_photographs_has_the_boxes_of_each(assets: Path, overlap: float) -> None:
    """4 x 4 photographs of COCO with their annotated boxes, of 4 to 640 pixels, side by side in rows as they are.

    Neither the photographs' sizes nor their places agree with the tiles, which cut nearly all of them, and objects are
    up to four times the overlap.
    """
    folder = assets / "tiny_coco"
    table = read_coco(folder / "annotations" / "instances_train2017.json")
    rows, boxes, labels = [], [], []
    y = 0
    for row in range(4):
        x, photographs = 0, []
        for index in range(4 * row, 4 * row + 4):
            pixels = np.asarray(Image.open(folder / "train2017" / str(table.file_names[index])).convert("RGB"))
            own = table.rows(index)
            boxes.append(torch.from_numpy(table.boxes_in_image()[own]).float() + torch.tensor([x, y, x, y]))
            labels.append(torch.from_numpy(table.labels[own]))
            photographs.append(np.pad(pixels, ((0, 640 - len(pixels)), (0, 0), (0, 0))))
            x += pixels.shape[1]
        strip = np.concatenate(photographs, axis=1)
        rows.append(np.pad(strip, ((0, 0), (0, 2560 - strip.shape[1]), (0, 0))))
        y += 640
    mosaic = torch.from_numpy(np.concatenate(rows).transpose(2, 0, 1).copy())
    every_box, every_label = torch.cat(boxes), torch.cat(labels)
    # What is found in each photograph alone: of boxes that overlap by half, one is suppressed there too.
    alone = batched_nms(every_box, torch.linspace(1, 0, len(every_box)), every_label, 0.5)
    grid = tile_grid(2560, 2560, Tiles(800, overlap))
    model = Recognising(every_box[alone], every_label[alone], mosaic, grid)
    found = found_by_tiles(model, mosaic, tiles=(800, overlap))
    distance = (every_box[alone][:, None] - found["boxes"]).abs().amax(dim=2)  # [alone, found]
    distance[every_label[alone][:, None] != found["labels"]] = torch.inf
    assert len(alone) > 150
    assert (distance.amin(dim=1) <= 2).float().mean() >= 0.98
    assert len(found["boxes"]) <= 1.02 * len(alone), "and hardly anything else"


# ---- the doors


def small_detector(**settings: object) -> Detector:
    torch.manual_seed(0)
    spec = DetectorSpec(
        arch="resnet18", norm="group", min_size=64, max_size=96, out_channels=16, box_head_channels=16, **settings
    )
    return build_detector(spec, num_classes=3, categories=(Category(1, 1, "car"), Category(2, 2, "pool"))).eval()


NOISE = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
TILED = InferenceSettings(tiles=(64, 0.25), batch_size=4)


def planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def test_predict_takes_tiles_and_an_image_of_one_tile_is_detected_in_as_ever() -> None:
    model = small_detector(box_score_thresh=0.0)
    by_settings = resdet.predict(model, NOISE, TILED)[0]
    by_argument = resdet.predict(model, NOISE, InferenceSettings(batch_size=4), tiles=(64, 0.25))[0]
    as_it_is = resdet.predict(model, NOISE)[0]
    assert torch.equal(by_settings.boxes, by_argument.boxes)
    assert len(by_settings.boxes) > len(as_it_is.boxes) == 100
    assert by_settings.boxes[:, 2].max() > 190, "tiles of every place are looked at"
    assert (by_settings.scores.diff() <= 0).all()
    one_tile = resdet.predict(model, NOISE[:64, :60], TILED)[0]
    assert torch.equal(one_tile.boxes, resdet.predict(model, NOISE[:64, :60])[0].boxes)
    each = next(resdet.predict_each(model, NOISE, tiles=(64, 0.25)))
    assert len(each.boxes) == len(by_settings.boxes)


def test_a_merged_image_has_as_many_detections_as_are_asked_for() -> None:
    model = small_detector(box_score_thresh=0.0, box_detections_per_img=5)
    with inference(model, InferenceSettings(tiles=(64, 0.25), max_detections=7)) as run:
        few = run([planes(NOISE)], "noise")[0]
    assert len(few["scores"]) == 7
    with inference(model, InferenceSettings(tiles=(64, 0.25))) as run:
        every = run([planes(NOISE)], "noise")[0]
    assert 7 < len(every["scores"]) <= 5 * (3 * 4 + 1)


@pytest.mark.parametrize(
    "tricks", [Tricks(flip=True), Tricks(voting=0.8, nms="soft-linear"), Tricks(class_agnostic=True), Tricks(refine=1)]
)
def test_test_time_tricks_are_done_in_each_tile(tricks: Tricks) -> None:
    model = small_detector(box_score_thresh=0.3)
    settings = InferenceSettings(tiles=(64, 0.25), tricks=tricks)
    with inference(model, settings) as run, inference(model, InferenceSettings(tricks=tricks)) as in_tile:
        found, first = run([planes(NOISE)], "noise")[0], in_tile([planes(NOISE[:64, :64])], "a tile")[0]
    boxes, scores = first["boxes"], first["scores"]
    inside = (boxes[:, 2:] < 40).all(dim=1)  # no other tile sees them
    assert inside.any()
    for box, score in zip(boxes[inside], scores[inside], strict=True):
        same = (found["boxes"] - box).abs().amax(dim=1) < 1e-3
        assert ((found["scores"][same] - score).abs() < 1e-4).any()


def test_nan_in_a_tile_is_reported() -> None:
    model = small_detector()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.fill_(torch.nan)
    with inference(model, TILED) as run, pytest.raises(WeightsError, match=r"NaN or infinity on a tile of photo\.jpg"):
        run([planes(NOISE)], "photo.jpg")


WRONG = (
    "tiles must be (side, overlap), a whole number of pixels from 32 on and a share of it in [0, 0.9], as in "
    "(800, 0.2), got "
)


@pytest.mark.parametrize("tiles", [(8, 0.2), (800, 1.0), (800, -0.1), (800.5, 0.2), (800, 0.2, 1), 800, "800"])
def test_what_are_no_tiles_is_refused(tiles: object) -> None:
    with pytest.raises(UserError) as caught:
        resdet.predict(small_detector(), NOISE, tiles=tiles)  # type: ignore[arg-type]
    assert str(caught.value) == f"{WRONG}{tiles!r}"


CONFIG = """
model: {arch: resnet18, norm: group, weights: null, out_channels: 16, box_head_channels: 16, min_size: 64, max_size: 96}
data: {train: {format: shapes}, val: {format: shapes}}
train: {steps: 1}
output_dir: out
"""


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ("[8, 0.2]", "eval.tiles.0: must be greater than or equal to 32; got 8 (whole number)"),
        ("[800, 1.5]", "eval.tiles.1: must be less than or equal to 0.9; got 1.5 (number)"),
        ("[800.5, 0.2]", "eval.tiles.0: must be integer; got 800.5 (number)"),
        ("800", "eval.tiles: must be an array or an object; got 800 (whole number)"),
    ],
)
def test_wrong_tiles_in_a_configuration_are_named(tiles: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(CONFIG, [f"eval.tiles={tiles}"])
    assert caught.value.problems == [f"command line (eval.tiles={tiles}): {message}"]
    assert parse_config(CONFIG, ["eval.tiles=[800]"]).eval.tiles == (800, 0.2)


def write_aerial(folder: Path, size: tuple[int, int], num_objects: int, sides: tuple[int, int]) -> None:
    """A made-up picture from above: small red cars and blue pools on uneven ground, with a COCO json."""
    rng = np.random.default_rng(0)
    height, width = size
    ground = Image.fromarray(rng.normal(110, 40, (height // 50, width // 50, 3)).clip(0, 255).astype(np.uint8))
    picture = np.asarray(ground.resize((width, height), Image.Resampling.BICUBIC)).copy()
    annotations = []
    for number in range(num_objects):
        w, h = rng.integers(*sides, 2).tolist()
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        kind = number % 2
        picture[y : y + h, x : x + w] = ((230, 40, 40), (40, 90, 240))[kind]
        box = {"id": number + 1, "image_id": 1, "category_id": kind + 1, "bbox": [x, y, w, h]}
        annotations.append(box | {"area": w * h, "iscrowd": 0})
    (folder / "images").mkdir(parents=True)
    Image.fromarray(picture).save(folder / "images" / "photo.jpg", quality=90)
    images = [{"id": 1, "file_name": "photo.jpg", "width": width, "height": height}]
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "pool"}]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(table))


def from_training_to_pictures(folder: Path, side: int) -> None:
    source = f"{{format: coco, images: {folder}/images, annotations: {folder}/boxes.json}}"
    config = parse_config(
        CONFIG,
        [
            *(f"data.train={source}", f"data.val={source}", f"output_dir={folder}/run"),
            *(f"augment=[{{RandomTile: {{side: {side}}}}}]", f"eval.tiles=[{side}, 0.2]", "eval.batch_size=4"),
            *("train.steps=2", "train.batch_size=2", "train.device=cpu", "loader.num_workers=0"),
            *("eval.num_pictures=1", "model.box_score_thresh=0.3", "optim.lr=1e-3"),
        ],
    )
    train(config)
    assert (folder / "run" / "pictures" / "photo.png").is_file()
    eval_command.main([str(folder / "run"), f"eval.tiles=[{side}, 0.5]", "eval.max_detections=200"])
    for report in (folder / "run" / "report.html", folder / "run" / "eval" / "report.html"):
        assert "The part with most errors: " in report.read_text()
    photo = str(folder / "images" / "photo.jpg")
    options = ["--tiles", str(side), "0.2", "--batch-size", "4", "--output", str(folder / "out")]
    predict.main([str(folder / "run" / "best.pt"), photo, *options])
    assert json.loads((folder / "out" / "detections.json").read_text()) is not None
    with Image.open(folder / "out" / "photo.png") as drawn, Image.open(photo) as read:
        assert drawn.size == read.size


def test_a_large_picture_goes_from_training_to_the_report_and_to_predictions(tmp_path: Path) -> None:
    write_aerial(tmp_path, (500, 660), 30, (8, 12))
    from_training_to_pictures(tmp_path, 200)


@pytest.mark.slow
def test_so_does_one_of_24_megapixels(tmp_path: Path) -> None:
    write_aerial(tmp_path, (4000, 6000), 100, (25, 60))
    from_training_to_pictures(tmp_path, 800)


def test_evaluation_by_tiles_finds_what_a_small_image_hides(tmp_path: Path) -> None:
    """Objects of 3 to 12 pixels in a perfect detector's eyes: AP is 1 by tiles, for each batch size and rank."""
    boxes, labels = scattered(SIZE, (5, 12), 34)
    image = located(*SIZE)
    images = [{"id": 1, "file_name": "a.png", "width": SIZE[1], "height": SIZE[0]}]
    annotations = [
        {"id": i, "image_id": 1, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "iscrowd": 0}
        for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True), 1)
    ]
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "pool"}]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    dataset = DetectionDataset(read_coco(tmp_path / "a.json"), lambda _: image.permute(1, 2, 0).numpy(), training=False)
    model = Perfect(boxes, labels, SIZE)
    settings = InferenceSettings(tiles=(SIDE, 0.25), batch_size=3, max_detections=1000)
    assert evaluate(model, dataset, settings).metrics["AP"] == pytest.approx(1, abs=1e-9)
    assert max(map(len, model.batches)) == 3


def test_lines_and_letters_suit_small_objects_in_a_large_picture() -> None:
    gray = np.full((2000, 3000, 3), 128, dtype=np.uint8)

    def drawn_on(*boxes: tuple[int, int, int, int]) -> float:
        count = len(boxes)
        found = Prediction(
            boxes=torch.tensor(boxes).float(), labels=torch.ones(count).long(), scores=torch.full((count,), 0.9)
        )
        return float((draw(gray, found, (Category(1, 1, "car"),)) != 128).any(axis=2).mean() * gray[..., 0].size)

    small, large = drawn_on((1000, 1000, 1030, 1030)), drawn_on((100, 400, 2900, 1900))
    assert small < 3000, "the box, of lines of 2 pixels, and its name"
    assert large > 50_000


def test_sahi_runs_this_detector_and_agrees() -> None:
    pytest.importorskip("sahi", reason="needs sahi")
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    model = small_detector(box_score_thresh=0.3)
    adapter = AutoDetectionModel.from_pretrained(
        model_type="torchvision",
        model=model,
        category_mapping={str(category.label): category.name for category in model.categories},
        confidence_threshold=0.3,
        device="cpu",
    )
    sliced = get_sliced_prediction(
        NOISE,
        adapter,
        slice_height=64,
        slice_width=64,
        overlap_height_ratio=0.25,
        overlap_width_ratio=0.25,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        verbose=0,
    )
    theirs = torch.tensor([one.bbox.to_xyxy() for one in sliced.object_prediction_list]).float()
    labels = torch.tensor([one.category.id for one in sliced.object_prediction_list])
    names = {one.category.id: one.category.name for one in sliced.object_prediction_list}
    assert names == {category.label: category.name for category in model.categories}
    ours = resdet.predict(model, NOISE, TILED, score_threshold=0.3)[0]
    alike = ours.labels[:, None] == labels
    # In the corner that no other tile sees, the same boxes; elsewhere they are merged by other rules.
    corner = (ours.boxes[:, 2:] < 48).all(dim=1)
    distance = (ours.boxes[:, None] - theirs).abs().amax(dim=2).where(alike, torch.inf)  # [ours, theirs]
    assert corner.sum() > 5
    assert (distance.amin(dim=1)[corner] < 0.01).all()
    assert (box_iou(ours.boxes, theirs).where(alike, 0).amax(dim=1) >= 0.5).float().mean() > 0.7
