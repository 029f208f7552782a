"""What a run's continuation may change: every key is applied, or refused with both values."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from coco_files import coco_folder
from pydantic import BaseModel
from small_runs import logged, train_here

from resdet.classification.config import PretrainConfig
from resdet.config import Config
from resdet.data.shapes import shapes_table
from resdet.errors import UserError, WeightsError
from resdet.training.loop import TrainResult
from resdet.training.resume import APPLIED, REFUSED, REJUDGED

SHORT = ("train.steps=1", "loader.num_workers=0", "optim.warmup_steps=0", "optim.schedule=constant")


def run(folder: Path, *overrides: str) -> TrainResult:
    return train_here(folder, *SHORT, *overrides)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with SGD."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    run(folder, "optim.name=sgd", "optim.lr=0.001")
    return folder


def go_on(begun: Path, folder: Path, *overrides: str) -> TrainResult:
    return run(folder, "optim.name=sgd", "optim.lr=0.001", f"resume={begun / 'last.pt'}", *overrides)


def leaf_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, of every kind of dataset."""
    for name, field in section.model_fields.items():
        annotations = [field.annotation, *get_args(field.annotation)]
        below = [kind for kind in annotations if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in below:
            yield from leaf_keys(kind, f"{prefix}{name}.")
        if not below:
            yield f"{prefix}{name}"


def test_every_key_of_both_configurations_is_decided() -> None:
    """A new key is decided where the others are: applied, refused, or applied and evaluations begin anew."""
    keys = {*leaf_keys(Config), *leaf_keys(PretrainConfig)}
    assert {"optim.lr", "data.train.split", "eval.tricks.flip", "augment.crop", "augment"} <= keys
    whole = {name for name in REJUDGED if name in ("data.val", "eval.tricks")}
    decided = {
        key: [key in REFUSED, key in APPLIED, key in REJUDGED or key.startswith(tuple(f"{name}." for name in whole))]
        for key in keys
    }
    assert [key for key, places in decided.items() if sum(places) != 1] == []
    assert (REFUSED.keys() | APPLIED | REJUDGED) - keys - whole == set(), "decided, and no key"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.arch=resnet34", "(the checkpoint's weights are of the old one)"),
        ("model.arch=resnet34", 'model.arch was "resnet18" and is "resnet34"'),
        ("model.norm=batch", 'model.norm was "group" and is "batch"'),
        ("model.anchor_sizes=[8, 16, 32, 64, 128]", "model.anchor_sizes was [16, 24, 32, 48, 64] and is [8, 16,"),
        ("model.trainable_layers=2", "model.trainable_layers was 5 and is 2"),
        ("model.weights=other.pth", 'model.weights was null and is "other.pth" (it decides how a run begins'),
        ("optim.name=adamw", 'optim.name was "sgd" and is "adamw" (the checkpoint\'s optimizer state is the old'),
        (
            "data.train={format: voc, root: nowhere, split: train}",
            'data.train.format was "shapes" and is "voc"',
        ),
    ],
)
def test_what_the_weights_depend_on_is_refused_with_both_values(
    override: str, told: str, begun: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        go_on(begun, tmp_path, override)
    message = str(caught.value)
    assert message.startswith(f"{begun / 'last.pt'}: cannot be resumed with this configuration: ")
    assert told in message
    assert "Leave these as they were, or begin another run with another output_dir" in message
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ("[square, circle, triangle]", "the first to differ is label 1, 'circle' there and 'square' here"),
        ("[circle, square]", "its run has 3 classes, circle, square, triangle; data.train has 2, circle, square: the"),
    ],
)
def test_other_classes_or_another_order_are_refused(classes: str, told: str, begun: Path, tmp_path: Path) -> None:
    changed = (f"data.train.classes={classes}", f"data.val.classes={classes}")
    with pytest.raises(UserError) as caught:
        go_on(begun, tmp_path, *changed)
    assert told in str(caught.value)
    assert ("data.train.classes keeps their order" in str(caught.value)) == (classes.count(",") == 2)
    assert "Classes and their order must stay as they are" in str(caught.value)


def test_classes_that_are_now_named_in_their_order_go_on(begun: Path, tmp_path: Path) -> None:
    assert go_on(begun, tmp_path, "train.steps=2", "data.train.classes=[circle, square, triangle]").steps == 2


def test_the_same_data_exported_with_other_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other numbers in the same order mean the same classes; in another order they would change places."""
    caplog.set_level("INFO")
    first = coco_folder(tmp_path / "first", 4, {"circle": 1, "square": 2, "triangle": 3})
    shifted = coco_folder(tmp_path / "shifted", 6, {"circle": 10, "square": 20, "triangle": 30})
    swapped = coco_folder(tmp_path / "swapped", 4, {"square": 1, "circle": 2, "triangle": 3})

    def source(folder: Path) -> tuple[str, ...]:
        text = f"{{format: coco, images: {folder}, annotations: {folder / 'a.json'}}}"
        return f"data.train={text}", f"data.val={text}"

    run(tmp_path / "run", *source(first))
    with pytest.raises(UserError, match="label 1, 'circle' there and 'square' here"):
        run(tmp_path / "run", *source(swapped), "resume=auto")
    assert run(tmp_path / "run", *source(shifted), "resume=auto", "train.steps=2").steps == 2
    last = tmp_path / "run" / "last.pt"
    assert f"changed since {last}: data.train from 4 to 6 images" in caplog.text
    assert f'data.train.annotations from "{first / "a.json"}" to "{shifted / "a.json"}"' in caplog.text
    categories = torch.load(last, weights_only=True)["categories"]
    assert [category["category_id"] for category in categories] == [10, 20, 30]
    # The boxes of an earlier json would have made other evaluations: the best is sought anew.
    assert "evaluations are not comparable with earlier ones" in caplog.text


@pytest.mark.parametrize(
    ("override", "group", "name", "value"),
    [
        ("optim.weight_decay=0.5", 0, "weight_decay", 0.5),
        ("optim.norm_weight_decay=0.25", 1, "weight_decay", 0.25),
        ("optim.momentum=0.5", 0, "momentum", 0.5),
        ("optim.lr=0.002", 0, "lr", 0.002 * 4 / 16),
    ],
)
def test_settings_of_the_optimizer_are_applied_and_logged(
    override: str, group: int, name: str, value: float, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    go_on(begun, tmp_path, override, "train.steps=2", "optim.lr_batch_size=16")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["training"]["optimizer"]["param_groups"][group][name] == pytest.approx(value)
    key, _, stated = override.partition("=")
    assert f"{key} from " in caplog.text
    assert f" to {stated}" in caplog.text


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.batch_size=2", "train.accumulate=2"),
        ("train.precision=bf16",),
        ("train.ema_decay=0.5",),
        ("seed=3",),
        ("model.min_size=48", "model.max_size=96"),
        ("augment=[]", "loader.sampling=class_balanced"),
        ("data.train.num_images=30", "data.train.seed=9"),
        ("model.box_loss=giou",),
    ],
)
def test_what_may_change_is_applied(
    overrides: tuple[str, ...], begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert go_on(begun, tmp_path, *overrides, "train.steps=2").steps == 2
    for override in overrides:
        assert f"changed since {begun / 'last.pt'}: {override.partition('=')[0]} from " in caplog.text


def test_an_average_begins_and_ends_with_its_key(begun: Path, tmp_path: Path) -> None:
    go_on(begun, tmp_path / "with", "train.ema_decay=0.5", "train.steps=2")
    assert torch.load(tmp_path / "with" / "last.pt", weights_only=True)["training"]["ema"]
    go_on(tmp_path / "with", tmp_path / "without", "train.steps=3")
    assert torch.load(tmp_path / "without" / "last.pt", weights_only=True)["training"]["ema"] == {}


@pytest.mark.parametrize("override", ["eval.best_metric=AP50", "data.val.num_images=5", "eval.tricks.flip=true"])
def test_a_best_that_was_measured_otherwise_is_sought_anew(override: str, begun: Path, tmp_path: Path) -> None:
    """Also in a run that has nothing left to train."""
    content = torch.load(begun / "last.pt", weights_only=True)
    content["training"]["best"] = 2.0  # no AP will ever reach it
    torch.save(content, tmp_path / "last.pt")
    assert run(tmp_path, "optim.name=sgd", "optim.lr=0.001", "resume=auto").best == 2.0
    result = run(tmp_path, "optim.name=sgd", "optim.lr=0.001", "resume=auto", override)
    assert result.best == result.metrics[override.partition("=")[2] if "best" in override else "AP"] < 2
    assert len(logged(tmp_path, "AP")) == 1


def test_nothing_changed_nothing_logged(begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    go_on(begun, tmp_path)
    assert "changed since" not in caplog.text
    assert "sought anew" not in caplog.text


def test_first_weights_that_were_moved_are_no_change(begun: Path, tmp_path: Path) -> None:
    path = changed(begun, tmp_path, lambda content: content["config"]["model"].update(weights="/old/r18.pth"))
    sgd = ("optim.name=sgd", "optim.lr=0.001", f"resume={path}")
    with pytest.raises(UserError, match=r'model.weights was "/old/r18.pth" and is "/old/r34.pth"'):
        run(tmp_path / "other", *sgd, "model.weights=/old/r34.pth")
    assert run(tmp_path / "moved", *sgd, "model.weights=/new/r18.pth", "train.steps=2").steps == 2


def test_a_checkpoint_from_elsewhere_does_not_replace_another_run(begun: Path, tmp_path: Path) -> None:
    for name in ("last.pt", "metrics.jsonl"):
        shutil.copy(begun / name, tmp_path)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError) as caught:
            go_on(begun, tmp_path, "train.steps=2")
        assert str(caught.value) == (
            f"{tmp_path}: already holds a run, and {begun / 'last.pt'} is not of it; resume=auto continues it, "
            "output_dir=... starts another"
        )
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).unlink()


def test_a_checkpoint_in_a_run_s_own_folder_continues_it(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    (tmp_path / "run" / "kept").mkdir()
    shutil.copy(begun / "last.pt", tmp_path / "run" / "kept" / "step_1.pt")
    for steps, path in enumerate(("link/last.pt", "run/kept/step_1.pt"), start=2):
        settings = ("optim.name=sgd", "optim.lr=0.001", f"resume={tmp_path / path}", f"train.steps={steps}")
        assert run(tmp_path / "run", *settings).steps == steps


def changed(begun: Path, folder: Path, change: Any) -> Path:
    content = torch.load(begun / "last.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "changed.pt")
    return folder / "changed.pt"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("config"), "carries no configuration: is it the last.pt of a run?"),
        (lambda c: c.update(config=[1]), "its configuration is not one of this command: "),
        (lambda c: c["config"].update(oven="hot"), "its configuration is not one of this command: "),
        (lambda c: c["training"]["optimizer"].update(param_groups=[]), "its training state does not fit this run: "),
        (lambda c: c["training"].update(log_sums=[]), "'log_sums' of its training state must be a mapping of single"),
        (lambda c: c["training"].update(more=1), "its training state is another version's: "),
        (lambda c: c.update(training=3), "its training state must be a mapping, got int"),
        (lambda c: c.pop("training"), "holds no training state to resume from"),
    ],
)
def test_a_checkpoint_that_is_no_run_s_is_one_line(change: Any, told: str, begun: Path, tmp_path: Path) -> None:
    path = changed(begun, tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        run(tmp_path / "run", "optim.name=sgd", "optim.lr=0.001", f"resume={path}")
    assert str(caught.value).startswith(f"{path}: {told}")


def test_images_with_more_objects_than_are_kept_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, of both splits, with the key that raises the number."""
    table = shapes_table(24, 64, 0)
    counts = table.objects_per_image()
    run(tmp_path / "few", "eval.max_detections=2", "eval.best_metric=AP")
    told = [record.getMessage() for record in caplog.records if "more objects" in record.getMessage()]
    assert told[0] == (
        f"data.train: {(counts > 2).sum()} of 24 images hold more objects, up to {counts.max()}, than the 2 detections "
        "that are kept of an image; the rest cannot be found: eval.max_detections raises the number"
    )
    assert told[1].startswith("data.val: ")
    caplog.clear()
    run(tmp_path / "enough")
    assert "more objects" not in caplog.text
