"""Model cards and timm's ``config.json``: what they state is recorded, and the code in them loads the file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from resdet.build import build_dataset, build_model
from resdet.config import load_config
from resdet.config_reading import config_to_plain
from resdet.errors import UserError
from resdet.export.backbone import export_backbone
from resdet.export.card import write_card
from resdet.export.compare import ExportReport, compare_detections
from resdet.export.detector import export_detector
from resdet.export.timm_config import timm_problem
from resdet.models.archs import ARCHS
from resdet.models.bodies import make_body
from resdet.models.checkpoint import checkpoint_payload, load_detector
from resdet.models.detector import Detector
from resdet.models.norm import calibrate_norm
from resdet.types import Category, Prediction
from resdet.weights.files import WeightsFile, weights_in

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"AP": 0.41237, "AP50": 0.6, "AP75": 0.5, "AP_large": -1.0, "val_loss": 0.7}
NAMES = ("a|b", "<b>c</b>", "*d*\n")


def record(**changes: Any) -> dict[str, Any]:
    """A checkpoint as a run writes it, of a small detector."""
    torch.manual_seed(0)
    sizes = ["model.out_channels=32", "model.box_head_channels=32", "model.norm=frozen", "model.calibration_images=8"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*sizes, "output_dir=/home/me/run"])
    dataset = build_dataset(config.data.train, training=False)
    model = build_model(config.model, dataset, resume_from=None)
    calibrate_norm(model.backbone.body, [torch.randn(2, 3, 64, 64)])
    model.categories = tuple(Category(label, label, name) for label, name in enumerate(NAMES, 1))
    model.score_threshold = 0.123
    evaluation = {"step": 20, "metrics": METRICS, "num_images": {"train": 2000, "val": 200}}
    plain = config_to_plain(config)
    return checkpoint_payload(model) | {"config": plain, "evaluation": evaluation} | changes


@pytest.fixture(scope="module")
def source() -> WeightsFile:
    return weights_in(record(), Path("run/best.pt"))


@pytest.fixture(scope="module")
def model(source: WeightsFile) -> Detector:
    return load_detector(source)


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    values: dict[str, Any] = yaml.safe_load(match[1])
    return values


def run_code(card: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Run the blocks of a card in its folder; give what each computes as features, or as boxes, labels and scores."""
    monkeypatch.chdir(card.parent)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(image).save("photo.jpg")
    names: dict[str, Any] = {}
    found = {}
    for code in re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL):
        kind = re.findall(r"import (resdet|onnxruntime|openvino|torchvision|timm|torch)\b", code)
        names.pop("features", None)
        with torch.no_grad():
            exec(compile(code, str(card), "exec"), names)
        if names.get("features") is not None:
            found[kind[0]] = [torch.as_tensor(features) for features in names["features"]]
        elif "scores" in names:
            found[kind[0] if kind else "copy"] = [torch.as_tensor(names[n]) for n in ("boxes", "labels", "scores")]
    found["photo"] = [torch.from_numpy(np.asarray(Image.open("photo.jpg")).transpose(2, 0, 1).copy())]
    if "network" in names:
        found["network"] = names["network"]
    return found


def pixels(model: Detector, photo: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.spec.image_mean, model.spec.image_std))
    return ((photo.float() / 255 - mean) / std)[None]


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("torchscript", "d.pt"),
        pytest.param("onnx", "d.onnx", marks=pytest.mark.slow),
        pytest.param("openvino", "d.xml", marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_detectors_card_detects(
    format: Any, name: str, tmp_path: Path, model: Detector, source: WeightsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.roi_heads.score_thresh = 0.01
    export_detector(model, tmp_path / name, format=format, checkpoint=source)
    found = run_code(tmp_path / "README.md", monkeypatch)
    with torch.no_grad():
        expected = model([found["photo"][0].float() / 255])[0]
    assert len(expected["scores"])
    (ours,) = (found[kind] for kind in found if kind not in ("photo", "copy"))
    computed = Prediction(boxes=ours[0], labels=ours[1], scores=ours[2])
    assert compare_detections(computed, expected, score_thresh=0.01, most=100)[2] == 0  # equal scores in any order
    computed["boxes"] += 1
    assert compare_detections(computed, expected, score_thresh=0.01, most=100)[2] > 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"A Faster R-CNN on a resnet18 with a feature pyramid, exported as {format} by resdet" in text
    if format == "openvino":
        assert (tmp_path / "half.bin").stat().st_size < 0.6 * (tmp_path / "d.bin").stat().st_size


@pytest.mark.parametrize(
    ("format", "name", "include_fpn"),
    [
        ("safetensors", "b.safetensors", True),
        ("torchscript", "b.pt", False),
        pytest.param("export", "b.pt2", True, marks=pytest.mark.slow),
        pytest.param("onnx", "b.onnx", True, marks=pytest.mark.slow),
        pytest.param("openvino", "b.xml", False, marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_backbones_card_computes_its_maps(
    format: Any, name: str, include_fpn: bool, tmp_path: Path, model: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_backbone(model, tmp_path / name, format=format, include_fpn=include_fpn)
    found = run_code(tmp_path / "README.md", monkeypatch)
    part: nn.Module = model.backbone if include_fpn else model.backbone.body
    with torch.no_grad():
        expected = list(part(pixels(model, found["photo"][0])).values())
    (ours,) = (found[kind] for kind in found if kind not in ("photo", "network"))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.abs().max()))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    letter = "P" if include_fpn else "C"
    for index, features in enumerate(expected):
        key = f"{letter}{index + 2}" if format in ("onnx", "openvino") else str(index)
        stride = 4 * 2**index
        assert f"| output | `{key}` | float32 `[B, {features.shape[1]}, H / {stride}, W / {stride}]`, sizes" in text
    assert "Not evaluated: no checkpoint was named to the export." in text


def test_a_folder_for_timm(
    tmp_path: Path, model: Detector, source: WeightsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of all three libraries; timm's own loader, offline, gives C2-C5, and a change of one value shows."""
    timm = pytest.importorskip("timm", reason="needs timm, which is in the dev extra")
    report = export_backbone(model, tmp_path / "model.safetensors", names="timm", checkpoint=source)
    names = [path.name for path in report.beside]
    assert names == ["config.json", "model.safetensors.json", "README.md"]
    found = run_code(tmp_path / "README.md", monkeypatch)
    body = model.backbone.body
    with torch.no_grad():
        expected = list(body(pixels(model, found["photo"][0])).values())
    for library in ("resdet", "timm"):
        for one, other in zip(found[library], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert tuple(timm.data.resolve_data_config(model=found["network"])["mean"]) == model.spec.image_mean

    whole = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (whole.num_classes, whole.num_features) == (0, 512)
    adapted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert torch.equal(adapted.layer4[1].bn2.running_var, body.layer4[1].bn2.running_var)
    with torch.no_grad():
        network: Any = found["network"]
        network.layer4[1].bn2.running_var[0] *= 100
        changed = network(pixels(model, found["photo"][0]))[-1]
    assert not torch.allclose(changed, expected[-1], rtol=0, atol=1e-4 * float(expected[-1].abs().max()))
    assert front_matter((tmp_path / "README.md").read_text())["library_name"] == "timm"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"arch": "vgg16"}, "its vgg16 has other layers"),
        ({"arch": "resnet34_option_c"}, "it has no resnet34_option_c"),
        ({"arch": "cifar20"}, "it has no cifar20"),
        ({"norm": "group"}, "its ResNets have BatchNorm, not GroupNorm"),
        ({"norm_eps": 0.0}, "its norms add 1e-05 to the variance, not 0"),
        (
            {"arch": "resnet50", "stride_in_1x1": True},
            "its bottlenecks stride in their 3x3 convolution, not in the 1x1",
        ),
        ({"dilate_c5": True}, "its stage 4 strides, and this one is dilated"),
        ({"returned_layers": (2, 3)}, "it needs all four stages, and this body ends with stage 3"),
    ],
)
def test_what_timm_does_not_have(arguments: dict[str, Any], problem: str) -> None:
    with torch.device("meta"):
        assert timm_problem(make_body(**{"arch": "resnet18", **arguments})) == problem


def test_timm_has_all_others() -> None:
    timm = pytest.importorskip("timm", reason="needs timm, which is in the dev extra")
    with torch.device("meta"):
        taken = [arch for arch in ARCHS if arch != "cifar1202" and timm_problem(make_body(arch)) is None]
        assert len(taken) > 15
        for arch in taken:
            names = {n: t.shape for n, t in make_body(arch, norm="batch").state_dict().items()}
            assert {n: t.shape for n, t in timm.create_model(arch, num_classes=0).state_dict().items()} == names


def test_what_timm_does_not_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    export_backbone(make_body("resnet18", returned_layers=(1,)), path)
    problem = "it needs all four stages, and this body ends with stage 1"
    assert caplog.messages == [f"{path}: no config.json for timm's loader was written: {problem}"]
    text = (tmp_path / "README.md").read_text()
    assert f"timm's loader does not take this file: {problem}." in text
    assert "torchvision, whose classifier" not in text
    assert "local-dir" not in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", path.name, f"{path.name}.json"]


def test_another_config_json_is_left_and_another_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body, path = make_body("resnet18"), tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"architecture": "mine"}')
    export_backbone(body, path)
    assert (tmp_path / "config.json").read_text() == '{"architecture": "mine"}'
    export_backbone(body, tmp_path / "r18.safetensors", names="timm")
    start = "no config.json for timm's loader was written:"
    assert caplog.messages == [
        f"{path}: {start} {tmp_path}/config.json is another program's and was left as it is",
        f"{tmp_path}/r18.safetensors: {start} timm finds the weights by the name model.safetensors: give the output "
        "this name",
    ]
    (tmp_path / "config.json").write_text('{"written_by": "resdet 0.0.1"}')  # ours is replaced
    assert (tmp_path / "config.json") in export_backbone(body, path).beside
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "resnet18"


def test_what_a_card_states(tmp_path: Path, model: Detector, source: WeightsFile) -> None:
    report = export_backbone(model, tmp_path / "b.safetensors", checkpoint=source)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for line in (
        f"Compared with the model when it was written: {report}.",
        "The detector that it is a part of after step 20, on its validation data.",
        "| AP | 0.4124 |",
        "| AP_large | - |",
        "| training data | 2000 images; format shapes; image_size 128 |",
        "| validation data | 200 images; format shapes; image_size 128; seed 1 |",
        r"| classes | 1 a\|b, 2 \<b\>c\</b\>, 3 \*d\*\\n |",
        "Training began with random weights, so nobody else's licence applies to them.",
        "| architecture | resnet18, layout fpn, norm frozen |",
        "| `train.steps` | 700 |",
        "| `train.precision` | fp32 |",
        "RGB in [0, 1], minus 0.485, 0.456, 0.406, divided by 0.229, 0.224, 0.225 |",
        "The detector scales images to 128 pixels on the shorter side",
        "timm loads it from a folder in which it is called `model.safetensors`",
    ):
        assert line in text, line
    assert "val_loss" not in text
    assert "/home/me" not in text
    assert "\n\n\n" not in text
    values = front_matter(text)
    assert values["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in values


def test_the_hub_reads_a_detectors_card(tmp_path: Path, model: Detector, source: WeightsFile) -> None:
    export_detector(model, tmp_path / "d.pt", format="torchscript", checkpoint=source)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    values = front_matter(text)
    index = values.pop("model-index")
    assert values == {
        "library_name": "pytorch",
        "license": "unknown",
        "pipeline_tag": "object-detection",
        "tags": ["resdet", "object-detection", "faster-rcnn", "resnet18", "torchscript"],
        "metrics": ["map", "map_50", "map_75"],
    }
    assert index[0]["results"][0]["metrics"][0] == {"type": "map", "value": 0.41237}
    assert "score of 0.123, where F1 was best" in text
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which timm brings")
    results = hub.ModelCard(text).data.eval_results
    assert [(result.dataset_name, result.metric_type, result.metric_value) for result in results] == [
        ("shapes", "map", 0.41237),
        ("shapes", "map_50", 0.6),
        ("shapes", "map_75", 0.5),
    ]


@pytest.mark.parametrize(
    ("weights", "licence", "sentence"),
    [
        (
            "IMAGENET1K_V1",
            "unknown",
            r"Training began with torchvision's weights IMAGENET1K\_V1, under BSD-3-Clause, the",
        ),
        (
            "detectron2_r101_fpn_3x",
            "cc-by-sa-3.0",
            r"began with the published detector detectron2\_r101\_fpn\_3x, under CC",
        ),
        ("/home/me/first.pth", "unknown", "Training began with first.pth, whose licence is not recorded. Whoever"),
        (
            None,
            "cc-by-sa-3.0",
            r"These are the published detector detectron2\_r101\_fpn\_3x, under CC BY-SA 3.0 (https",
        ),
    ],
)
def test_first_weights(
    weights: str | None, licence: str, sentence: str, tmp_path: Path, model: Detector, source: WeightsFile
) -> None:
    content = {key: value for key, value in source.content.items() if key != "config"}
    if weights is not None:
        config = source.content["config"]
        content["config"] = {**config, "model": {**config["model"], "weights": weights}}
    trained = replace(source, content=content, path=Path("model_final_f6e8b1.pkl"))
    report = ExportReport(Path("b"), "body", "safetensors", (), {}, {}, None, None)
    write_card(tmp_path / "card.md", report, model, source=trained)
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert sentence in text
    assert front_matter(text)["license"] == licence


def test_a_checkpoint_that_says_nothing(tmp_path: Path, model: Detector, source: WeightsFile) -> None:
    bare: dict[str, Any] = {key: value for key, value in source.content.items() if key not in ("config", "evaluation")}
    export_backbone(model, tmp_path / "b.safetensors", checkpoint=replace(source, content=bare))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not evaluated: the checkpoint holds no evaluation." in text
    assert "| training data | not recorded |" in text
    odd = {**bare, "config": ["no", "mapping"], "evaluation": {"metrics": 3}}
    export_backbone(model, tmp_path / "b.safetensors", checkpoint=replace(source, content=odd))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_cards_replace_no_other_file(tmp_path: Path) -> None:
    body = make_body("resnet18", returned_layers=(1,))
    first = export_backbone(body, tmp_path / "a").beside[-1]
    second = export_backbone(body, tmp_path / "b").beside[-1]
    assert (first.name, second.name) == ("README.md", "b.README.md")
    for path, card in ((tmp_path / "a", first), (tmp_path / "b", second)):
        assert export_backbone(body, path).beside[-1] == card
    first.write_text("my own\n")
    assert export_backbone(body, tmp_path / "a").beside[-1] == tmp_path / "a.README.md"
    assert first.read_text() == "my own\n"
    (tmp_path / "a.README.md").write_text("my own, too\n")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(UserError) as caught:
        export_backbone(body, tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path}/a.README.md: would be replaced by the model card of this export, but is none of an earlier one; "
        "give another --output"
    )
    assert (tmp_path / "a").read_bytes() == before
