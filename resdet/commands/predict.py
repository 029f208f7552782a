"""Detect objects in images: draw them, and write the detections in COCO's result format.

    resdet predict runs/quickstart/best.pt photo.jpg folder/ --output out
    resdet predict runs/quickstart/best.pt folder/ --tricks refine=1 voting=0.8 flip=true

The keys of --tricks are those of eval.tricks in a configuration.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet predict``."""
    parser = command_parser("predict", __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, folders, or glob patterns")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument(
        "--score",
        type=float,
        help="draw detections from this score on (default: that of the best F1 in the run's last evaluation, else 0.5)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images per forward pass (default 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument(
        "--max-detections", type=int, metavar="N", help="detections per image (default: the model's, usually 100)"
    )
    parser.add_argument("--tricks", nargs="+", default=[], metavar="key=value", help="more computation for each image")
    options = parser.parse_intermixed_args(arguments)

    from resdet.config import parse_tricks
    from resdet.data.image_files import find_images
    from resdet.drawing import shown_from
    from resdet.evaluation.inference import device_for
    from resdet.evaluation.settings import InferenceSettings
    from resdet.models.checkpoint import load_detector
    from resdet.prediction import predict_files

    tricks = parse_tricks(options.tricks)
    model = load_detector(options.checkpoint)
    score, source = (options.score, "--score") if options.score is not None else shown_from(model)
    files = find_images(options.images)
    settings = InferenceSettings(
        batch_size=options.batch_size,
        device=device_for(model, options.device),
        precision=options.precision,
        tricks=tricks,
        max_detections=options.max_detections,
        progress=True,
    )
    num_detections = predict_files(model, files, options.output, settings, score_threshold=score)
    print(f"{len(files)} images, {num_detections} detections; drawn those of score >= {score:.3g} ({source})")
    print(f"written: {options.output / 'detections.json'} and {options.output}/*.png")
