"""Evaluate a classifier: top-1 and top-5 accuracy and loss, on one view of each image or on several.

    resdet eval-classifier runs/imagenet_resnet50/best.pt eval.views=ten_crop
    resdet eval-classifier runs/cifar10_resnet56/best.pt data.val.split=test
    resdet eval-classifier resnet50.pth --arch resnet50 --images FOLDER eval.views=dense

The dataset is data.val of the checkpoint's own configuration unless overridden. --images takes any folder with one
subfolder of images per class, named by WordNet id or class name, as the model has them.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet eval-classifier``."""
    parser = command_parser("eval-classifier", __doc__)
    parser.add_argument(
        "weights", type=Path, metavar="WEIGHTS", help="a run's folder or best.pt, or torchvision's weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in eval.views=dense")
    parser.add_argument("--arch", help="the architecture, for weights without a configuration, e.g. resnet50")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a folder with one subfolder of images per class")
    options = parser.parse_intermixed_args(arguments)

    from resdet.build import inference_settings
    from resdet.classification.build import build_images, eval_config
    from resdet.classification.evaluate import evaluate_classifier
    from resdet.classification.model import load_classifier
    from resdet.processes import choose_device

    weights = checkpoint_in(options.weights)
    config = eval_config(weights, arch=options.arch, images=options.images, overrides=options.overrides)
    classifier = load_classifier(weights, arch=options.arch)
    images = build_images(config.data.val)
    metrics = evaluate_classifier(
        classifier,
        images,
        inference_settings(config, device=choose_device(config.train.device), progress=True),
        views=config.eval.views,
        resize=config.eval.resize,
        scales=config.eval.scales,
    )
    show(f"top1 {metrics.top1:.4f}  top5 {metrics.top5:.4f}  loss {metrics.loss:.4f}")
    show(f"{metrics.num_images} images of {images.name}, {config.eval.views}")
