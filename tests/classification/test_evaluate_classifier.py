"""Averages over views, the fully convolutional form, counts of right answers, classes by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights

from resdet.classification.data import LabelledImages, read_folder
from resdet.classification.evaluate import evaluate_classifier, probabilities
from resdet.classification.imagenet import WORDNET_IDS
from resdet.classification.model import ImageClassifier, make_classifier, match_classes
from resdet.classification.spec import ClassifierSpec
from resdet.errors import DataError, WeightsError
from resdet.evaluation.settings import InferenceSettings

CLASSES = ("blue", "green", "red")
# Sums of float32 in another order, through a network of 20 layers.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    spec = ClassifierSpec(arch="cifar20", image_size=8, image_mean=(0.3, 0.4, 0.5), image_std=(0.2, 0.3, 0.4))
    made = make_classifier(spec, CLASSES)
    made.network(torch.randn(16, 3, 8, 8))  # statistics
    with torch.no_grad():
        made.network.fc.weight.mul_(10)
    made.network.eval()
    return made


def answers_by_hand(classifier: ImageClassifier, pixels: list[np.ndarray]) -> torch.Tensor:
    """Softmax of each picture alone, uint8 ``[H, W, 3]``, averaged, from the definitions."""
    mean, std = np.array(classifier.spec.image_mean), np.array(classifier.spec.image_std)
    total = torch.zeros(3)
    for picture in pixels:
        image = torch.from_numpy(((picture / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32))
        with torch.no_grad():
            total += torch.softmax(classifier.network(image)[0], 0) / len(pixels)
    return total


def test_ten_crops_of_real_files_are_decoded_cut_and_averaged_as_by_hand(
    folder: Path, classifier: ImageClassifier
) -> None:
    images = read_folder(folder / "val")
    right = 0
    losses = []
    for index in range(len(images)):
        with Image.open(images.pictures.name(index)) as stored:
            width, height = stored.size
            side = (10 * width // height, 10) if height < width else (10, 10 * height // width)
            scaled = np.array(stored.resize(side, Image.Resampling.BILINEAR))
        tall, wide = scaled.shape[:2]
        crops = []
        for pixels in (scaled, scaled[:, ::-1]):
            for top, left in ((0, 0), (0, wide - 8), (tall - 8, 0), (tall - 8, wide - 8)):
                crops.append(pixels[top : top + 8, left : left + 8])
            # torchvision rounds half a pixel to the even one.
            top, left = round((tall - 8) / 2), round((wide - 8) / 2)
            crops.append(pixels[top : top + 8, left : left + 8])
        answer = answers_by_hand(classifier, crops)
        right += int(answer.argmax() == images.labels[index])
        losses.append(-answer[images.labels[index]].log().item())
    metrics = evaluate_classifier(classifier, images, InferenceSettings(batch_size=4), views="ten_crop", resize=10)
    assert metrics.num_images == 15
    assert metrics.top1 == pytest.approx(right / 15)
    assert metrics.top5 == 1.0  # of three classes
    assert metrics.loss == pytest.approx(np.mean(losses), rel=TOLERANCE)
    single = evaluate_classifier(classifier, images, resize=10)
    assert single.loss != pytest.approx(np.mean(losses), rel=TOLERANCE), "the comparison cannot fail"


def test_the_mean_is_of_probabilities(classifier: ImageClassifier) -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    views = [torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()) for picture in pictures]
    with torch.no_grad():
        torch.testing.assert_close(
            probabilities(classifier, views)[0], answers_by_hand(classifier, pictures), rtol=0, atol=TOLERANCE
        )
        scores = torch.stack([classifier.network(classifier.normalise(view))[0] for view in views]).mean(0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scores.softmax(0), answers_by_hand(classifier, pictures), rtol=0, atol=TOLERANCE)


def dense_by_hand(classifier: ImageClassifier, image: torch.Tensor, window: int) -> torch.Tensor:
    """Classify every window of the last feature map by the network's own pooling and classifier."""
    network = classifier.network
    *_, features = network.body(image).values()
    answers = []
    for top in range(features.shape[2] - window + 1):
        for left in range(features.shape[3] - window + 1):
            vector = network.avgpool(features[:, :, top : top + window, left : left + window]).flatten(1)
            answers.append(network.classifier(vector) if hasattr(network, "classifier") else network.fc(vector))
    return torch.stack(answers).mean(0)


@torch.no_grad()
def test_fully_convolutional_scores_are_those_of_all_windows(classifier: ImageClassifier) -> None:
    image = torch.randn(1, 3, 20, 28)  # features of 5 x 7, windows of 2 x 2
    dense = classifier.dense_scores(image)
    torch.testing.assert_close(dense, dense_by_hand(classifier, image, 2), rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(dense, classifier.network(image), rtol=0, atol=1e-4)
    # At the size it was made for there is one window, and for less it pools what there is.
    for side in (8, 4):
        small = torch.randn(2, 3, side, side)
        torch.testing.assert_close(classifier.dense_scores(small), classifier.network(small), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_fully_convolutional_vgg() -> None:
    """Its classifier is not linear: windows are classified one by one (138 M parameters, hence slow)."""
    made = make_classifier(ClassifierSpec(arch="vgg16"), CLASSES)
    made.network.eval()
    image = torch.randn(1, 3, 256, 288)  # features of 8 x 9, windows of 7 x 7
    dense = made.dense_scores(image)
    torch.testing.assert_close(dense, dense_by_hand(made, image, 7), rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(dense, made.network(image), rtol=1e-4, atol=1e-6)


def test_several_scales_are_averaged(folder: Path, classifier: ImageClassifier) -> None:
    images = read_folder(folder / "val")
    losses = []
    for index in range(len(images)):
        total = torch.zeros(3)
        for side in (8, 12):
            with Image.open(images.pictures.name(index)) as stored:
                width, height = stored.size
                size = (side * width // height, side) if height < width else (side, side * height // width)
                pixels = np.array(stored.resize(size, Image.Resampling.BILINEAR))
            for view in (pixels, pixels[:, ::-1].copy()):
                image = classifier.normalise(torch.from_numpy(view.transpose(2, 0, 1)[None].copy()))
                with torch.no_grad():
                    total += classifier.dense_scores(image)[0].softmax(0) / 4
        losses.append(-total[images.labels[index]].log().item())
    metrics = evaluate_classifier(classifier, images, views="dense", scales=(8, 12))
    assert metrics.loss == pytest.approx(np.mean(losses), rel=TOLERANCE)
    other = evaluate_classifier(classifier, images, views="dense", scales=(8, 16))
    assert other.loss != pytest.approx(np.mean(losses), rel=TOLERANCE), "the comparison cannot fail"


def test_a_mean_of_each_pixel_is_used_at_its_size_and_its_average_elsewhere(classifier: ImageClassifier) -> None:
    mean = torch.rand(3, 8, 8)
    with_pixels = ImageClassifier(classifier.spec, CLASSES, classifier.network, mean)
    std = torch.tensor(classifier.spec.image_std)[:, None, None]
    for side, expected in ((8, mean), (9, mean.mean((1, 2), keepdim=True))):
        pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        torch.testing.assert_close(with_pixels.normalise(pixels), (pixels / 255 - expected) / std)
    shifts = torch.rand(2, 3)
    shifted = with_pixels.normalise(pixels, shifts)
    torch.testing.assert_close(shifted, (pixels / 255 + shifts[:, :, None, None] - expected) / std)


def test_five_of_many_classes_are_counted() -> None:
    """Against a count by sorting, on answers that differ from image to image."""
    torch.manual_seed(0)
    names = tuple(map(str, range(12)))
    made = make_classifier(ClassifierSpec(arch="cifar20", image_size=8), names)
    made.network(torch.randn(16, 3, 8, 8))

    class Noise:
        def __call__(self, index: int) -> np.ndarray:
            return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)

        def name(self, index: int) -> str:
            return f"noise {index}"

    images = LabelledImages("noise", names, np.arange(60) % 12, Noise())
    made.network.train()
    metrics = evaluate_classifier(made, images, InferenceSettings(batch_size=7))
    assert made.network.training
    made.network.eval()
    ranks = []
    with torch.no_grad():
        for index in range(60):
            view = torch.from_numpy(images.pictures(index).transpose(2, 0, 1)[None].copy())
            scores = made.network(made.normalise(view))[0]
            ranks.append(int((scores > scores[index % 12]).sum()))
    assert metrics.top1 == pytest.approx(np.mean(np.array(ranks) == 0))
    assert metrics.top5 == pytest.approx(np.mean(np.array(ranks) < 5))
    assert 0 < metrics.top5 < 1
    with torch.no_grad():
        made.network.fc.bias.fill_(torch.nan)
    with pytest.raises(WeightsError, match="computes NaN or infinity for noise 0"):
        evaluate_classifier(made, images)


def test_classes_are_matched_by_name() -> None:
    assert match_classes(["Red Wine", "beer"], ["beer", "water", "red_wine"], where="x").tolist() == [2, 0]
    with pytest.raises(DataError, match="1 of its 2 classes are none of the model's 2: tea"):
        match_classes(["tea", "beer"], ["beer", "water"], where="x")
    with pytest.raises(DataError, match="two classes called crane"):
        match_classes(["crane"], ["crane", "crane"], where="x")


NAMES = tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def test_imagenets_wordnet_ids_are_those_of_timm_in_the_order_of_torchvisions_names() -> None:
    info = ImageNetInfo()
    assert list(WORDNET_IDS) == sorted(WORDNET_IDS) == list(info.label_names())
    for name, described in zip(NAMES, info.label_descriptions(detailed=False), strict=True):
        # "crane bird" and "maillot tank suit" are torchvision's own, to tell them from their namesakes
        assert name.lower() in described.lower() or name in ("crane bird", "maillot tank suit")


@pytest.mark.parametrize("names", [NAMES, tuple(map(str, range(1000)))], ids=["torchvision's names", "numbers"])
def test_some_or_all_of_imagenets_folders_are_known_by_their_wordnet_ids(names: tuple[str, ...]) -> None:
    assert match_classes(["n01514859", "n02113186", "n02963159"], names, where="x").tolist() == [8, 264, 474]
    assert match_classes(["N15075141"], names, where="x").tolist() == [999]
    assert match_classes(WORDNET_IDS, names, where="x").tolist() == list(range(1000))
    assert match_classes(WORDNET_IDS[::-1], names, where="x").tolist() == list(range(1000))[::-1]
    with pytest.raises(DataError, match="x: 1 of its 2 classes are none of the model's 1000: n00000001; the model has"):
        match_classes(["n01514859", "n00000001"], names, where="x")


def test_ids_and_names_may_stand_side_by_side_and_a_name_of_two_classes_is_refused_with_both_ids() -> None:
    assert match_classes(["n01514859", "Great_white_shark"], NAMES, where="x").tolist() == [8, 2]
    with pytest.raises(
        DataError, match=r"^x: the model has two classes called Cardigan; name folders by WordNet ids, "
    ):
        match_classes(["Cardigan"], NAMES, where="x")
    with pytest.raises(DataError, match=r"which are n02113186 and n02963159 for cardigan$"):
        match_classes(["hen", "cardigan"], NAMES, where="x")


def test_ids_mean_nothing_to_a_classifier_of_other_classes() -> None:
    others = (*NAMES[1:], "bench")  # a thousand, but not ImageNet's in their order
    with pytest.raises(DataError, match="1 of its 1 classes are none of the model's 1000: n01514859"):
        match_classes(["n01514859"], others, where="x")
    by_ids = tuple(f"n{number:08d}" for number in range(1000))
    assert match_classes(["n00000007", "n00000003"], by_ids, where="x").tolist() == [7, 3]
