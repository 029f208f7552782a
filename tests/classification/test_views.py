"""What the network sees of an image, against crops cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from resdet.classification.config import AugmentConfig
from resdet.classification.views import TrainView, centre_views, dense_views, scale_short_side, ten_crop_views


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_hand(image: Image.Image, top: int, left: int, size: int, *, mirrored: bool = False) -> torch.Tensor:
    pixels = np.array(image)[:, ::-1] if mirrored else np.array(image)
    return torch.from_numpy(pixels[top : top + size, left : left + size].transpose(2, 0, 1).copy())


def test_short_side_is_scaled_as_pillow_scales(image: Image.Image) -> None:
    scaled = scale_short_side(image, 20)
    assert scaled.size == (30, 20)
    assert np.array_equal(np.array(scaled), np.array(image.resize((30, 20), Image.Resampling.BILINEAR)))
    assert scale_short_side(image, 30) is image
    assert scale_short_side(image.transpose(Image.Transpose.ROTATE_90), 20).size == (20, 30)


def test_centre_is_cut_from_the_middle(image: Image.Image) -> None:
    scaled = image.resize((30, 20), Image.Resampling.BILINEAR)
    (view,) = centre_views(image, resize=20, size=16)
    assert torch.equal(view, by_hand(scaled, 2, 7, 16))
    assert not torch.equal(view, by_hand(scaled, 2, 6, 16))


def test_ten_crops_are_corners_and_centre_and_their_mirrors(image: Image.Image) -> None:
    scaled = image.resize((30, 20), Image.Resampling.BILINEAR)
    views = ten_crop_views(image, resize=20, size=16)
    places = [(0, 0), (0, 14), (4, 0), (4, 14), (2, 7)]
    expected = [by_hand(scaled, top, left, 16, mirrored=m) for m in (False, True) for top, left in places]
    assert len(views) == 10
    assert all(torch.equal(view, crop) for view, crop in zip(views, expected, strict=True))
    expected[7] = by_hand(scaled, 4, 0, 16)
    assert not torch.equal(views[7], expected[7]), "the comparison cannot fail"


def test_dense_views_are_whole_images_and_their_mirrors(image: Image.Image) -> None:
    views = dense_views(image, scales=[20, 30])
    assert [tuple(view.shape) for view in views] == [(3, 20, 30)] * 2 + [(3, 30, 45)] * 2
    assert torch.equal(views[2], by_hand(image, 0, 0, 45))
    assert torch.equal(views[3], views[2].flip(2))


def view_of(**settings: object) -> TrainView:
    return TrainView(AugmentConfig.model_validate({"flip": 0.0, **settings}), size=16, resize=20)


def test_training_scales_the_short_side_and_crops(image: Image.Image) -> None:
    """Every view is a crop of the image at one of the sizes, cut by hand; all sizes come."""
    view = view_of(crop="short_side", short_side=(18, 20))
    found = set()
    for seed in range(40):
        pixels, shift = view(image, seed)
        assert shift.tolist() == [0, 0, 0]
        for side in (18, 19, 20):
            scaled = image.resize((int(45 * side / 30), side), Image.Resampling.BILINEAR)
            windows = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).unfold(1, 16, 1).unfold(2, 16, 1)
            if (windows == pixels[:, None, None]).all(dim=(0, 3, 4)).any():
                found.add(side)
                break
        else:
            raise AssertionError(f"seed {seed}: no crop of the image at any size")
    assert found == {18, 19, 20}


def test_training_pads_and_crops(image: Image.Image) -> None:
    small = image.crop((0, 0, 20, 20))
    view = TrainView(AugmentConfig(crop="pad", pad=4, flip=0.0), size=20, resize=20)
    padded = torch.from_numpy(np.pad(np.array(small), ((4, 4), (4, 4), (0, 0)))).permute(2, 0, 1)
    windows = padded.unfold(1, 20, 1).unfold(2, 20, 1)  # [3, 9, 9, 20, 20]
    places = set()
    for seed in range(60):
        same = (windows == view(small, seed)[0][:, None, None]).all(dim=(0, 3, 4)).nonzero()
        assert len(same) == 1
        places.add(tuple(same[0].tolist()))
    assert {top for top, _ in places} == set(range(9))


def test_a_seed_decides_everything_and_nothing_else_is_touched(image: Image.Image) -> None:
    view = view_of(
        crop="area", flip=0.5, rotate=20, shift=0.1, scale=1.2, trivial=True, colour_pca=0.1, erase=0.5, size=16
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = view(image, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = view(image, 5), view(image, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].shape == (3, 16, 16)


def test_gpus_keep_their_random_state(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would reseed all of them, and nothing would restore that."""
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    view_of(crop="pad", pad=2)(image, 5)
    assert reseeded == []


def test_flips_come_as_often_as_told(image: Image.Image) -> None:
    small = image.crop((0, 0, 16, 16))
    whole = TrainView(AugmentConfig(crop="none", flip=0.0), size=16, resize=16)(small, 0)[0]
    view = TrainView(AugmentConfig(crop="none", flip=0.25), size=16, resize=16)
    mirrored = [torch.equal(view(small, seed)[0], whole.flip(2)) for seed in range(400)]
    assert 0.18 < np.mean(mirrored) < 0.32  # three standard deviations of 400 draws


def test_colours_move_along_the_principal_components(image: Image.Image) -> None:
    view = view_of(crop="none", colour_pca=0.1)
    shifts = torch.stack([view(image, seed)[1] for seed in range(400)])
    # Of the covariance V diag(0.1 s)^2 V^T, within the error of 400 draws.
    s, v = np.linalg.eigh(np.cov(shifts.numpy().T))
    np.testing.assert_allclose(np.sqrt(s[::-1]), [0.02175, 0.00188, 0.00045], rtol=0.15)
    assert abs(v[:, 2] @ [-0.5675, -0.5808, -0.5836]) > 0.99


def test_erasing_paints_the_mean_colour(image: Image.Image) -> None:
    augment = AugmentConfig(crop="none", flip=0.0, erase=1.0)
    pixels, _ = TrainView(augment, size=30, resize=30, mean_colour=(1, 2, 3))(image, 0)
    plain, _ = TrainView(AugmentConfig(crop="none", flip=0.0), size=30, resize=30)(image, 0)
    erased = (pixels != plain).any(0)
    assert 0.01 < erased.float().mean() < 0.34
    assert {tuple(colour) for colour in pixels[:, erased].T.tolist()} == {(1, 2, 3)}
