"""Judge a classifier on images: the share of right answers, from one view of each image or from many.

    python tools/eval_classifier.py runs/imagenet_resnet50/best.pt eval.views=ten_crop
    python tools/eval_classifier.py runs/cifar10_resnet56/best.pt data.val.split=test
    python tools/eval_classifier.py resnet50.pth --arch resnet50 --images FOLDER eval.views=dense

The data are those of data.val in the checkpoint's own configuration unless overridden. --images takes any folder of
folders of images named by their class: WordNet ids or names, as the model has them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="a run's best.pt, or torchvision's weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in eval.views=dense")
    parser.add_argument("--arch", help="the network of weights that do not tell it, e.g. resnet50")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of class-named folders of images")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand after options

    from resdet.classification.build import build_images, eval_config
    from resdet.classification.evaluate import evaluate_classifier
    from resdet.classification.model import load_classifier
    from resdet.processes import choose_device

    config = eval_config(options.weights, arch=options.arch, images=options.images, overrides=options.overrides)
    classifier = load_classifier(options.weights, arch=options.arch)
    images = build_images(config.data.val)
    classifier.network.to(choose_device(config.train.device))
    metrics = evaluate_classifier(
        classifier,
        images,
        views=config.eval.views,
        resize=config.eval.resize,
        scales=config.eval.scales,
        batch_size=config.eval.batch_size,
        num_workers=config.loader.num_workers,
        precision=config.eval.precision or config.train.precision,
        progress=True,
    )
    print(f"top1 {metrics.top1:.4f}  top5 {metrics.top5:.4f}  loss {metrics.loss:.4f}")
    print(f"{metrics.num_images} images of {images.name}, {config.eval.views}")


if __name__ == "__main__":
    run_tool(main)
