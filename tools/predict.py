"""Detect objects on images: drawn pictures, and detections in COCO's result format.

    python tools/predict.py runs/quickstart/best.pt photo.jpg folder/ --output out
    python tools/predict.py runs/quickstart/best.pt folder/ --tricks refine=1 voting=0.8 flip=true

Tricks are the keys of eval.tricks in a configuration.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, folders, or glob patterns")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument(
        "--score",
        type=float,
        help="detections below it are not drawn (default: that of the best F1 in the run's last evaluation, else 0.5)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images per forward pass (default 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--tricks", nargs="+", default=[], metavar="key=value", help="more computation for each image")
    options = parser.parse_args(arguments)

    import resdet
    from resdet.config import parse_tricks
    from resdet.prediction import find_images, predict_files, shown_from
    from resdet.processes import choose_device

    tricks = parse_tricks(options.tricks)
    model = resdet.load_detector(options.checkpoint).to(choose_device(options.device))
    score, source = (options.score, "--score") if options.score is not None else shown_from(model)
    files = find_images(options.images)
    settings = resdet.InferenceSettings(
        batch_size=options.batch_size, precision=options.precision, tricks=tricks, progress=True
    )
    num_detections = predict_files(model, files, options.output, settings, score_threshold=score)
    print(f"{len(files)} images, {num_detections} detections; drawn those of score >= {score:.3g} ({source})")
    print(f"written: {options.output / 'detections.json'} and {options.output}/*.png")


if __name__ == "__main__":
    run_tool(main)
