"""torchvision's detector and ours beside each other: the same weights, every kind of work, sane figures."""

import contextlib
import json
import sys

import pytest
import torch
from benchmarks import inference, run_benchmark
from benchmarks.inference import agreement, detection_runs
from benchmarks.memory import measure_steps
from benchmarks.pair import Variant, build_ours, build_torchvision, float_images, variants
from benchmarks.peers import PRECISIONS_OF
from benchmarks.pictures import GENERATED_SIZE, annotated_pictures, photographs
from benchmarks.roi_align import random_boxes
from benchmarks.timing import in_turn, time_rows
from benchmarks.training import make_step
from cards import require_cuda
from PIL import Image

from resdet.errors import DataError, TrainingError, UserError
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.types import Prediction

CPU = torch.device("cpu")
VARIANTS = ["torchvision fp32", "ours fp32", "torchvision bf16", "ours bf16"]
ALL_SETTINGS = {"num_classes": 4, "min_size": 64, "max_size": 96, "seed": 0, "arch": "resnet18"}


@pytest.fixture
def photos(tmp_path):
    """Two generated pictures as files, and their boxes as a COCO json."""
    pictures = annotated_pictures("", "", num_images=2, batch_size=1)
    folder = tmp_path / "photos"
    folder.mkdir()
    entries = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "thing"}]}
    for number, batch in enumerate(pictures.batches):
        Image.fromarray(batch.images[0].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        height, width = batch.images[0].shape[1:]
        entries["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        x1, y1, x2, y2 = batch.targets[0]["boxes"][0].tolist()
        entries["annotations"].append(
            {"id": number, "image_id": number, "category_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        )
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    return folder, tmp_path / "boxes.json"


def check_times(rows):
    assert [row["what"] for row in rows] == VARIANTS
    for row in rows:
        assert 0 < row["fastest [s]"] <= row["median [s]"] <= row["slowest [s]"]
    assert rows[0]["speed (torchvision fp32 = 1)"] == rows[2]["speed (torchvision bf16 = 1)"] == 1
    ratio = rows[0]["median [s]"] / rows[3]["median [s]"]
    assert rows[3]["speed (torchvision fp32 = 1)"] == ratio


def check_bound(rows, *, is_trained):
    assert [(row["precision"], row["3x3 by"]) for row in rows] == [
        (precision, way) for precision in ("fp32", "bf16") for way in ("direct", "Winograd")
    ]
    assert rows[1]["bound [s]"] < rows[0]["bound [s]"]
    assert all(row[key] > 0 for row in rows for key in ("TFLOP", "bound [s]", "ours reaches [%]"))
    assert all(2 < row["times forward"] < 3 if is_trained else row["times forward"] == 1 for row in rows)


def test_inference_of_a_checkpoint_on_photographs(small_detector, photos, tmp_path):
    report = run_benchmark(
        [
            "work=inference",
            f"weights={small_detector}",
            f"images={photos[0]}",
            "min_size=64",
            "max_size=96",
            "repeats=2",
            "warmup=0",
        ]
    )
    times, bound, equality = report.tables.values()
    title = next(iter(report.tables))
    assert "the first 2 images of photos at 64/96 (64x96)" in title
    check_times(times)
    check_bound(bound, is_trained=False)
    assert equality[0]["detections"] > 0
    assert equality[0]["unmatched"] == 0
    # Boxes of up to 640 pixels, decoded in float32 from features that were summed in another order.
    assert float(equality[0]["largest difference of a corner [px]"]) < 0.05
    assert float(equality[0]["of a score"]) < 1e-4
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"]["arch"] == "resnet18"
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert [row["what"] for row in written["tables"][title]] == VARIANTS


@pytest.mark.parametrize("peer", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_peers_run_our_export_and_find_the_same(small_detector, photos, peer):
    pytest.importorskip(peer)
    settings = [f"weights={small_detector}", f"images={photos[0]}", "min_size=64", "max_size=96", "repeats=1"]
    report = run_benchmark(["work=inference", *settings, "warmup=0", "num_images=2", f"peers={peer}"])
    rows = report.tables["Detectors, the peers' times over ours"]
    assert [(row["peer"], row["precision"]) for row in rows] == [(peer, precision) for precision in PRECISIONS_OF[peer]]
    assert all(row["peer / ours"] == row["peer [s]"] / row["ours [s]"] for row in rows)
    agreements = {row["of"]: row for row in report.tables["Detections against ours in the same precision"]}
    assert agreements[f"{peer} fp32"]["detections"] > 0
    assert agreements[f"{peer} fp32"]["unmatched"] == 0
    assert float(agreements[f"{peer} fp32"]["largest difference of a corner [px]"]) < 0.01
    if peer == "openvino":
        features = report.tables["Body and pyramid alone"]
        assert [row["precision"] for row in features] == ["fp32", "bf16"]


def test_without_peers_nothing_is_exported(small_detector, monkeypatch):
    """A plain comparison needs neither the time nor the packages of an export."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    settings = [f"weights={small_detector}", "min_size=64", "max_size=96", "repeats=1", "warmup=0", "num_images=1"]
    assert len(run_benchmark(["work=inference", *settings]).tables) == 3


def test_peers_are_known_by_name(monkeypatch):
    with pytest.raises(UserError, match="peers must be of onnxruntime, openvino, separated by commas; got 'tensorrt'"):
        run_benchmark(["work=inference", "peers=onnxruntime,tensorrt"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="peers=openvino: it is not installed: pip install openvino"):
        run_benchmark(["work=inference", "peers=openvino"])


def test_each_model_is_given_images_on_its_own_device(monkeypatch):
    """An int8 detector computes on the CPU where the others compute on a GPU."""
    monkeypatch.setattr(inference, "autocast", lambda device, precision: contextlib.nullcontext())
    devices = {}

    def model(name):
        return lambda images: devices.setdefault(name, {image.device.type for image in images})

    batches = annotated_pictures("", "", num_images=2, batch_size=1).batches
    models = {
        "ours fp32": Variant(model("ours fp32"), "fp32", True, torch.device("meta")),
        "ours int8": Variant(model("ours int8"), "fp32", True, CPU),
    }
    for run in detection_runs(models, batches).values():
        run(0), run(1)
    assert devices == {"ours fp32": {"meta"}, "ours int8": {"cpu"}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI")
def test_int8_beside_a_gpu(small_detector, request):
    require_cuda(request)
    settings = [f"weights={small_detector}", "min_size=64", "max_size=96", "repeats=1", "warmup=0", "num_images=1"]
    report = run_benchmark(["work=inference", *settings, "int8=true", "device=cuda"])
    assert [row["what"] for row in next(iter(report.tables.values()))] == [*VARIANTS, "ours int8"]


@pytest.mark.slow
def test_training_on_annotated_photographs(small_detector, photos):
    folder, annotations = photos
    report = run_benchmark(
        [
            "work=training",
            f"weights={small_detector}",
            f"images={folder}",
            f"annotations={annotations}",
            "sizes=64/96",
            "repeats=1",
            "warmup=0",
        ]
    )
    times, bound = report.tables.values()
    check_times(times)
    check_bound(bound, is_trained=True)
    losses = [row["loss"] for row in times]
    # Each samples boxes by its own numbers, and bfloat16 rounds: the same task, not the same bits.
    assert max(losses) < 1.3 * min(losses)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_is_what_tensors_take(small_detector):
    for is_ours in (False, True):
        peak = measure_steps(small_detector, is_ours, "fp32", "", "", 1, CPU)["peak_mb"]
        # Momentum and gradients of 14 million trained parameters (11 of them the body's) and what is small beside it.
        assert 8 * 10 < peak < 1000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_in_processes_of_their_own(small_detector):
    report = run_benchmark(["work=memory", f"weights={small_detector}", "sizes=64/96", "batch_size=1"])
    (rows,) = report.tables.values()
    assert [row["what"] for row in rows] == VARIANTS
    assert all(row["peak [MB]"] > 80 for row in rows)
    assert rows[0]["of torchvision fp32 [%]"] == 100


def test_roi_align_is_compared_with_torchvisions():
    report = run_benchmark(
        ["work=roi_align", "num_boxes=30", "channels=8", "height=128", "width=192", "repeats=1", "warmup=0"]
    )
    forward, both, differences = report.tables.values()
    check_times(forward)
    check_times(both)
    fp32, bf16 = differences
    assert float(fp32["features"]) < 1e-5 < 1e-3 < float(bf16["features"]) < 0.05
    assert float(fp32["gradients"]) < 1e-4
    assert float(fp32["largest feature"]) > 0.5


def test_boxes_to_pool_are_of_all_sizes_and_inside():
    boxes = random_boxes(4000, 800, 1216, torch.Generator().manual_seed(0))
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 1216).all()
    assert (boxes[:, 3] <= 800.001).all()
    size = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    # Log-uniform: a quarter of all between 16 and 800 lies below the fourth root of the way.
    assert (size < 16 * 50**0.25).float().mean() == pytest.approx(0.25, abs=0.02)


def test_both_have_the_same_weights_and_knobs(small_detector):
    pictures = annotated_pictures("", "", num_images=1, batch_size=1)
    ours = build_ours(weights=str(small_detector), batches=pictures.batches, **ALL_SETTINGS)
    theirs = build_torchvision(ours)
    assert ours.spec.arch == "resnet18"
    assert ours.spec.box_loss == "smooth_l1"
    assert [n for n, p in theirs.named_parameters() if p.requires_grad] == [
        n for n, p in ours.named_parameters() if p.requires_grad
    ]
    assert theirs.roi_heads.score_thresh == ours.roi_heads.score_thresh == 0.1
    assert theirs.roi_heads.box_roi_pool.sampling_ratio == 1
    images = float_images(pictures.batches[0], CPU)
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
        same = agreement(expected, found)
        ours.rpn.head.conv[0][0].weight[0] += 1
        other = agreement(expected, ours(images))
    assert same["unmatched"] == 0 < same["detections"]
    assert other["unmatched"] > 0


def test_weights_stay_where_they_are(small_detector):
    """Else each repetition would train another network than the one before."""
    batches = annotated_pictures("", "", num_images=1, batch_size=1).batches
    ours = build_ours(weights=str(small_detector), batches=batches, **ALL_SETTINGS)
    for name, variant in variants(ours, CPU, training=True).items():
        if name.endswith("fp32"):
            step = make_step(variant, batches, CPU)
            before = {n: p.clone() for n, p in variant.model.state_dict().items()}
            step(0), step(1)
            after = variant.model.state_dict()
            moved = [n for n, value in before.items() if not torch.equal(after[n], value)]
            assert "roi_heads.box_predictor.cls_score.weight" in moved
            assert all((after[n] - before[n]).norm() < 1e-2 * (before[n].norm() + 1e-2) for n in moved)


def test_a_loss_that_is_not_finite_is_refused(small_detector):
    batches = annotated_pictures("", "", num_images=1, batch_size=1).batches
    ours = build_ours(weights=str(small_detector), batches=batches, **ALL_SETTINGS)
    with torch.no_grad():
        ours.roi_heads.box_predictor.cls_score.bias.fill_(torch.nan)
    for name, variant in variants(ours, CPU, training=True).items():
        with pytest.raises(TrainingError, match=f"{name}: loss nan"):
            make_step(variant, batches, CPU)(0)


def test_random_heads_detect_something():
    """Scores of untouched heads are all about 1/91, and nothing would be compared."""
    pictures = annotated_pictures("", "", num_images=1, batch_size=1)
    ours = build_ours(weights="", batches=pictures.batches, **ALL_SETTINGS)
    assert not ours.training
    with torch.no_grad():
        (found,) = ours(float_images(pictures.batches[0], CPU))
    assert len(found["boxes"]) > 0


def test_agreement_counts_what_has_no_counterpart():
    def detections(*boxes, labels=None, scores=None):
        count = len(boxes)
        return Prediction(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(labels or [1] * count, dtype=torch.int64),
            scores=torch.tensor(scores or [0.5] * count),
        )

    a, b = [0, 0, 10, 10], [50, 50, 90, 90]
    row = agreement([detections(a, b)], [detections([50, 50, 90, 90.5], a, scores=[0.75, 0.5])])
    assert row == {
        "detections": 2,
        "unmatched": 0,
        "largest difference of a corner [px]": "5.0e-01",
        "of a score": "2.5e-01",
    }
    assert agreement([detections(a)], [detections(a, labels=[2])])["unmatched"] == 2
    assert agreement([detections(a)], [detections(a, a)])["unmatched"] == 1
    assert agreement([detections(a)], [detections([0, 0, 10, 12])])["unmatched"] == 2
    assert agreement([detections(a)], [detections()])["unmatched"] == 1
    assert agreement([detections()], [detections()])["detections"] == 0


def test_things_are_timed_in_turn():
    calls = []
    runs = {name: lambda number, name=name: calls.append((name, number)) for name in ("a", "b")}
    seconds = in_turn(runs, repeats=2, warmup=1, device=CPU)
    # Each once untimed, then timed.
    assert calls == [(name, number) for number in (0, 0, 1) for name in ("a", "b") for _ in range(2)]
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 2, "b": 2}
    rows = time_rows({"torchvision fp32": [1, 3, 8], "torchvision bf16": [2.0], "ours": [0.5]})
    assert rows[0] == {
        "what": "torchvision fp32",
        "median [s]": 3,
        "fastest [s]": 1,
        "slowest [s]": 8,
        "speed (torchvision fp32 = 1)": 1,
        "speed (torchvision bf16 = 1)": 2 / 3,
    }
    assert (rows[2]["speed (torchvision fp32 = 1)"], rows[2]["speed (torchvision bf16 = 1)"]) == (6, 4)


def test_generated_pictures_have_their_boxes():
    batches = annotated_pictures("", "", num_images=3, batch_size=2).batches
    assert len(batches) == 1
    (batch,) = batches
    height, width = GENERATED_SIZE
    for image, target in zip(batch.images, batch.targets, strict=True):
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, height, width))
        assert len(target["boxes"]) == len(target["labels"]) > 0
        assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert target["boxes"][:, 3].max() > 0.3 * height
    again = annotated_pictures("", "", num_images=2, batch_size=2).batches[0]
    assert torch.equal(batch.images[1], again.images[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("inference images=FOLDER", "no images in this folder"),
        ("inference images=FOLDER/nothing", "no such file or folder"),
        ("inference num_images=1 batch_size=2", "num_images: must give at least batch_size=2 images, got 1"),
        ("inference repeats=0", "repeats must be 1 or more, got 0"),
        ("inference warmup=-1", "warmup must be 0 or more, got -1"),
        ("inference min_size=800 max_size=600", "min_size must lie between 1 and max_size, got 800 and 600"),
        ("inference device=tpu", "device must be auto, cpu or cuda, got 'tpu'"),
        ("inference arch=resnet", "arch: there is no 'resnet'; did you mean"),
        ("inference arch=vgg16", "arch must be a ResNet of torchvision's.*'vgg16'"),
        ("inference weights=FOLDER/none.pth", "there is no such file"),
        ("training sizes=480x640", "sizes must be like 480/640,800/1333 .*got '480x640'"),
        ("training sizes=480/640,", "sizes must be like .*got ''"),
        ("training images=FOLDER", "images= and annotations= belong together: give annotations=FILE"),
        ("training annotations=FOLDER/a.json", "images= and annotations= belong together: give images=FOLDER"),
        ("memory batch_size=0", "batch_size must be 1 or more, got 0"),
        ("roi_align num_boxes=0", "num_boxes must be 1 or more, got 0"),
        ("roi_align height=32", "height must be 64 or more, got 32"),
    ],
)
def test_mistakes_are_named(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_benchmark(f"work={settings.replace('FOLDER', str(tmp_path))}".split())


def test_a_detector_that_torchvision_has_no_equal_of_is_refused(tmp_path):
    spec = DetectorSpec(arch="resnet18", roi_aligned=True, box_head_channels=8)
    torch.save(checkpoint_payload(build_detector(spec, num_classes=3)), tmp_path / "aligned.pt")
    with pytest.raises(UserError, match="nothing like roi_aligned=True"):
        run_benchmark(["work=inference", f"weights={tmp_path / 'aligned.pt'}"])


def test_a_detector_of_fewer_classes_than_the_boxes_is_refused(tmp_path):
    model = build_detector(DetectorSpec(arch="resnet18", box_head_channels=8), num_classes=3)
    torch.save(checkpoint_payload(model), tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"two\.pt: knows 2 classes, but the pictures' boxes are of 3"):
        run_benchmark(["work=training", f"weights={tmp_path / 'two.pt'}"])


def test_photographs_without_boxes_to_train_on_are_refused(photos):
    folder, annotations = photos
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match="none of its 2 images has a box to train on"):
        annotated_pictures(str(folder), str(annotations), num_images=2, batch_size=1)
    assert len(photographs(str(folder), num_images=2, batch_size=1).batches) == 2
