"""Int8 detectors: each layer against float arithmetic, the whole against the float detector, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resdet
from resdet.errors import UserError, WeightsError
from resdet.models import int8
from resdet.models.checkpoint import save_int8_detector
from resdet.models.detector import Detector, build_detector
from resdet.models.int8 import MIDDLE, Int8Detector, Int8Layer
from resdet.models.int8_calibration import Range, quantize_detector
from resdet.models.norm import calibrate_norm
from resdet.models.spec import DetectorSpec

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="int8 needs a CPU with AVX512-VNNI, which this one lacks"
)

SPEC = DetectorSpec(arch="resnet18", min_size=128, max_size=192, out_channels=32, box_head_channels=64)


def image(seed: int, height: int = 96, width: int = 128) -> Tensor:
    """Smooth random colours, on which features are neither constant nor noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]


@pytest.fixture(scope="module")
def model() -> Detector:
    torch.manual_seed(0)
    detector = build_detector(SPEC, num_classes=4)
    calibrate_norm(detector.backbone.body, [torch.stack([image(0), image(1)]) * 4 - 2])
    # Freshly made heads answer with next to nothing.
    for layer in (
        detector.rpn.head.cls_logits,
        detector.rpn.head.bbox_pred,
        detector.roi_heads.box_predictor.cls_score,
    ):
        nn.init.normal_(layer.weight, 0, 0.1)
    return detector.eval()


@pytest.fixture(scope="module")
def quantized(model: Detector) -> Int8Detector:
    return quantize_detector(model, [image(seed) for seed in range(4)])


def random_layer(kind: str) -> tuple[nn.Conv2d | nn.Linear, Tensor]:
    """A float layer and uint8 input for it."""
    torch.manual_seed(0)
    layer: nn.Conv2d | nn.Linear
    if kind == "linear":
        layer = nn.Linear(48, 24)
        return layer, torch.randint(0, 256, (7, 48), dtype=torch.uint8)
    kernel, stride, dilation, groups = {
        "1x1": (1, 1, 1, 1),
        "1x1 strided": (1, 2, 1, 1),
        "3x3": (3, 1, 1, 1),
        "3x3 strided": (3, 2, 1, 1),
        "3x3 dilated": (3, 1, 2, 1),
        "3x3 grouped": (3, 1, 1, 4),
    }[kind]
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(32, 24, kernel, stride, padding, dilation, groups)
    x = torch.randint(0, 256, (2, 32, 13, 18), dtype=torch.uint8)
    return layer, x.contiguous(memory_format=torch.channels_last)


def exact(layer: Int8Layer, source: nn.Conv2d | nn.Linear, x: Tensor, added: Tensor | float = 0.0) -> Tensor:
    """Compute an int8 layer in float64, up to the rounding of its output."""
    source = copy.deepcopy(source).double()
    per_channel = (-1,) + (1,) * (source.weight.dim() - 1)
    source.weight.data = layer.weight.double() * layer.weight_scale.double().view(per_channel)
    assert source.bias is not None
    source.bias.data = layer.bias.double()
    out: Tensor = source((x.double() - layer.input_zero) * layer.input_scale) + added
    out = out.relu() if layer.output.after == "relu" else out
    return out / layer.output_scale + layer.output.zero


KINDS = ["linear", "1x1", "1x1 strided", "3x3", "3x3 strided", "3x3 dilated", "3x3 grouped"]


@pytest.mark.parametrize("input_zero", [0, MIDDLE])
@pytest.mark.parametrize("output", ["relu", "signed", "float32", "bfloat16", "bfloat16_relu"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_is_its_arithmetic(kind: str, output: int8.Output, input_zero: int) -> None:
    source, x = random_layer(kind)
    layer = Int8Layer(source, output, input_zero=input_zero)
    layer.fill(
        source,
        torch.zeros(x.shape[1] // layer.groups * layer.groups),
        0.05,
        0.07 if output in ("relu", "signed") else None,
    )
    found, expected = layer(x).double(), exact(layer, source, x)
    assert found.shape == expected.shape
    if layer.output.dtype != torch.uint8:
        # float32 scales and bias on exact integers; bfloat16 rounds them once, to 8 bits.
        rtol = 1e-5 if output == "float32" else 2**-8
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-4)
        layer.weight_scale.mul_(1.02)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found, exact(layer, source, x), rtol=rtol, atol=1e-4)
        return
    # Half a step is the rounding itself; the rest is float32 arithmetic on numbers of up to 255 near a tie.
    assert float((found - expected.clamp(0, 255)).abs().max()) <= 0.5 + 1e-3
    layer.output_scale.mul_(1.02)
    with pytest.raises(AssertionError):
        assert float((found - exact(layer, source, x).clamp(0, 255)).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("zero", [0, MIDDLE])
@pytest.mark.parametrize("kind", ["1x1", "3x3"])
@torch.no_grad()
def test_the_shortcut_is_added_with_its_own_scale(kind: str, zero: int) -> None:
    source, x = random_layer(kind)
    layer = Int8Layer(source, "relu")
    layer.fill(source, torch.zeros(32), 0.05, 0.07)
    shortcut = torch.randint(0, 256, layer(x).shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    kept = shortcut.clone(memory_format=torch.preserve_format)
    found = layer(x, shortcut, 0.03, zero).double()
    expected = exact(layer, source, x, (kept.double() - zero) * 0.03).clamp(0, 255)
    assert float((found - expected).abs().max()) <= 0.5 + 1e-3
    wrong = exact(layer, source, x, (kept.double() - zero) * 0.04).clamp(0, 255)
    assert float((found - wrong).abs().max()) > 0.5 + 1e-3


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
@torch.no_grad()
def test_a_wide_sum_is_bfloat16(kind: str) -> None:
    source, x = random_layer(kind)
    layer = Int8Layer(source, "bfloat16_relu")
    layer.fill(source, torch.zeros(32), 0.05, None)
    shortcut = torch.randn(layer(x).shape).bfloat16().contiguous(memory_format=torch.channels_last)
    kept = shortcut.double()
    # bfloat16 rounds the result once, and near zero keeps the float32 error of the two summands.
    found = layer(x, shortcut).double()
    torch.testing.assert_close(found, exact(layer, source, x, kept), rtol=2**-8, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, exact(layer, source, x, kept * 1.1), rtol=2**-8, atol=1e-4)


@torch.no_grad()
def test_rounding_the_weights_leaves_the_mean_of_the_output() -> None:
    torch.manual_seed(0)
    source = nn.Conv2d(64, 8, 1)
    x = torch.rand(4, 64, 16, 16) + 1
    layer = Int8Layer(source, "float32")
    layer.fill(source, x.double().mean(dim=(0, 2, 3)), 1.0, None)
    weight = layer.weight.float() * layer.weight_scale[:, None, None, None]
    corrected = F.conv2d(x, weight, layer.bias).mean(dim=(0, 2, 3))
    plain = F.conv2d(x, weight, source.bias).mean(dim=(0, 2, 3))
    expected = source(x).mean(dim=(0, 2, 3))
    torch.testing.assert_close(corrected, expected, rtol=0, atol=1e-5)  # float32 sums of 64 products
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


def test_a_range_clips_an_outlier_and_only_that() -> None:
    torch.manual_seed(0)
    values = torch.rand(1, 4, 400, 400)
    seen = Range()
    seen.add(values[:, :, :200])
    seen.add(values[:, :, 200:])
    # Nothing is gained by clipping uniform values: up to the grid of limits, every hundredth of the largest.
    assert float(values.max()) / 255 * 0.98 <= seen.scale(signed=False) <= float(values.max()) / 255
    torch.testing.assert_close(seen.mean, values.double().mean(dim=(0, 2, 3)))
    values[0, 0, 0, 0] = 3
    seen.add(values)
    # The best limit c balances (3 - c) ** 2 of one value and (c / 255) ** 2 / 12 of 1,280,000: c = 1.14.
    assert seen.scale(signed=False) * 255 == pytest.approx(1.14, abs=0.03)
    with pytest.raises(WeightsError, match="NaN or infinity"):
        seen.add(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_to_the_nearest_and_clips(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 8, 5, 7).mul(40).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    found = int8.to_uint8(x, 0.125)  # a power of two, so that quotients are exact
    assert torch.equal(found.double(), x.double().div(0.125).round().clamp(0, 255))
    assert int(found.max()) == 255
    assert torch.equal(x, kept)
    assert not torch.equal(found.double(), x.double().div(0.126).round().clamp(0, 255))


def difference(model: Detector, quantized: Int8Detector, picture: Tensor) -> float:
    """Distance of the two pyramids over the norm of the float one."""
    with torch.no_grad():
        images = model.transform([picture])[0].tensors
        levels, found = model.backbone(images), quantized.backbone(images)
    scale = float(quantized.backbone.layer_blocks[0].output_scale)
    pairs = [(((found[name].float() - MIDDLE) * scale) - level, level) for name, level in levels.items()]
    return float(torch.stack([d.square().sum() for d, _ in pairs]).sum().sqrt()) / float(
        torch.stack([level.square().sum() for _, level in pairs]).sum().sqrt()
    )


def test_a_detector_comes_near_the_float_one(model: Detector, quantized: Int8Detector) -> None:
    unseen = image(99)
    # Each of about 20 roundings in a row adds an error of around 1 % of its tensor's norm (8 bits); in quadrature 5 %.
    assert difference(model, quantized, unseen) < 0.08
    perturbed = copy.deepcopy(quantized)
    perturbed.backbone.stages[1][0].layers[0].output_scale.mul_(1.3)
    assert difference(model, perturbed, unseen) > 0.08
    with torch.no_grad():
        expected, found = model([unseen])[0], quantized([unseen])[0]
    assert len(expected["boxes"]) > 0
    assert abs(float(found["scores"][0]) - float(expected["scores"][0])) < 0.1


@torch.no_grad()
def test_batches_and_other_sizes_run(quantized: Int8Detector) -> None:
    pictures = [image(5), image(6, 150, 90)]
    together = quantized(pictures)
    assert len(together) == 2
    alone = quantized(pictures[:1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(pictures[:1])[0]["boxes"].dtype == torch.float32
    torch.testing.assert_close(alone, quantized(pictures[:1])[0], rtol=0, atol=0)  # nothing is carried over


def test_no_proposals_are_no_boxes(quantized: Int8Detector) -> None:
    assert quantized.roi_heads.box_head(torch.zeros(0, 32, 7, 7, dtype=torch.uint8)).shape == (0, 64)


def test_a_file_gives_the_same_detector(quantized: Int8Detector, tmp_path: Path) -> None:
    path = tmp_path / "int8.pt"
    save_int8_detector(quantized, path)
    loaded = resdet.load_detector(path)
    assert isinstance(loaded, Int8Detector)
    assert loaded.spec == quantized.spec
    with torch.no_grad():
        torch.testing.assert_close(loaded([image(7)]), quantized([image(7)]), rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"is in int8: .* nothing else can be made from it"):
        resdet.fasterrcnn_resnet101_fpn(weights=path)


@pytest.mark.parametrize("norm", ["batch"])
def test_batch_norm_is_folded_too(norm: str) -> None:
    torch.manual_seed(0)
    model = build_detector(SPEC.model_copy(update={"norm": norm}), num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    model.backbone.train()
    with torch.no_grad():
        for seed in range(30):
            model.backbone(torch.stack([image(seed)]) * 4 - 2)
    model.eval()
    assert difference(model, quantize_detector(model, [image(0), image(1)]), image(99)) < 0.08


def test_refusals(model: Detector, quantized: Int8Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="got no image to calibrate on"):
        quantize_detector(model, [])
    with pytest.raises(
        UserError, match=r"floating point \[3, H, W\] in \[0, 1\], got torch.uint8 \[3, 8, 8\] \(image 1\)"
    ):
        quantize_detector(model, [torch.zeros(3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(UserError, match="in training mode"):
        quantize_detector(copy.deepcopy(model).train(), [image(0)])
    with pytest.raises(UserError, match="in int8 already"):
        quantize_detector(quantized, [image(0)])
    with pytest.raises(UserError, match="cannot be trained"):
        quantized.train()
    with pytest.raises(UserError, match=r"cannot be brought to torch\.float16"):
        quantized.half()
    with pytest.raises(UserError, match="cannot be brought to meta"):
        quantized.to("meta")
    for changes, message in (
        ({"arch": "vgg16"}, "got vgg16 with layout fpn"),
        ({"arch": "resnet50", "layout": "c4", "anchor_sizes": (64,)}, "got resnet50 with layout c4"),
        ({"arch": "resnet50d"}, "got resnet50d"),
        ({"norm": "group"}, "this model has norm group"),
        ({"fast": False}, "needs fast=True"),
    ):
        with pytest.raises(UserError, match=message):
            Int8Detector.empty(DetectorSpec(**changes), 3)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UserError, match="no AVX512-VNNI"):
        quantize_detector(model, [image(0)])


def test_a_diverged_model_is_told(model: Detector) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.backbone.fpn.inner_blocks[0][0].weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="NaN or infinity"):
        quantize_detector(broken, [image(0)])
