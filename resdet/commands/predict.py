"""Detect objects in images and videos: draw them, and write the detections in COCO's result format or as YOLO labels.

    resdet predict runs/quickstart/best.pt photo.jpg folder/ https://example.org/photo.jpg --output out
    resdet predict runs/quickstart/best.pt video.mp4 --every 5
    resdet predict runs/quickstart/best.pt "folder/*.jpg" --save coco yolo
    resdet predict runs/quickstart/best.pt folder/ --tricks refine=1 voting=0.8 flip=true
    resdet predict runs/aerial/best.pt photo_6000x4000.jpg --tiles 800 0.2

Photographs are turned as their EXIF orientation says and viewers show them; pictures and boxes are upright too. COCO's
annotations mean the stored pixels: --stored-pixels. Files that cannot be read are listed at the end, and the exit code
is then 2. The keys of --tricks are those of eval.tricks in a configuration.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show
from resdet.errors import DataError


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet predict``."""
    options = _parsed(arguments)
    from resdet.config import parse_tricks
    from resdet.data.sources import find_sources
    from resdet.drawing import shown_from
    from resdet.evaluation.inference import device_for
    from resdet.evaluation.settings import InferenceSettings
    from resdet.evaluation.tiles import checked_tiles
    from resdet.files import check_output, make_output_folder
    from resdet.models.checkpoint import load_detector
    from resdet.prediction_files import predict_files

    tricks, tiles = parse_tricks(options.tricks), checked_tiles(options.tiles)
    checkpoint = checkpoint_in(options.checkpoint)
    images = list({one.path: None for one in find_sources(options.images) if one.path is not None})
    make_output_folder(options.output)
    check_output(options.output / "detections.json", [checkpoint])
    model = load_detector(checkpoint)
    score, source = (options.score, "--score") if options.score is not None else shown_from(model)
    settings = InferenceSettings(
        batch_size=options.batch_size,
        device=device_for(model, options.device),
        precision=options.precision,
        tricks=tricks,
        tiles=tiles,
        max_detections=options.max_detections,
        progress=True,
    )
    report = predict_files(
        model,
        images,
        options.output,
        settings,
        save=options.save,
        every=options.every,
        score_threshold=score,
        stored_pixels=options.stored_pixels,
    )
    frames, failed = report.num_frames, list(report.unreadable.values())
    of_videos = f", {sum(frames.values())} frames of {len(frames)} videos" if frames else ""
    shown = f"; drawn those of score >= {score:.3g} ({source})" if "pictures" in options.save else ""
    show(f"{report.num_images} images{of_videos}, {report.num_detections} detections{shown}")
    names = {"coco": "detections.json", "pictures": "*.png" + ", *.mp4" * bool(frames), "yolo": "labels/*.txt"}
    show(f"written: {' and '.join(str(options.output / names[what]) for what in sorted(set(options.save)))}")
    if failed:
        reasons = "\n  ".join(map(str, failed))
        raise DataError(f"{len(failed)} of {len(images)} files could not be read and were left out:\n  {reasons}")


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("predict", __doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder, a checkpoint, or the name of a published detector",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="image and video files, folders, glob patterns, http(s) addresses of images",
    )
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument(
        "--save",
        nargs="+",
        choices=["pictures", "coco", "yolo"],
        default=["pictures", "coco"],
        help="what to write: pictures and videos with boxes, detections.json with all detections, labels/*.txt with "
        "those from --score on (default: pictures coco)",
    )
    parser.add_argument(
        "--score",
        type=float,
        help="draw, and label, detections from this score on (default: best F1 of the run's last evaluation, else 0.5)",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th frame of videos (default 1)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per forward pass (default 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument(
        "--max-detections", type=int, metavar="N", help="detections per image (default: the model's, usually 100)"
    )
    parser.add_argument("--tricks", nargs="+", default=[], metavar="key=value", help="more computation for each image")
    parser.add_argument(
        "--tiles",
        nargs=2,
        type=float,
        metavar=("SIDE", "OVERLAP"),
        help="detect in overlapping tiles of SIDE pixels, as in 800 0.2; --batch-size then counts tiles",
    )
    parser.add_argument("--stored-pixels", action="store_true", help="do not turn images by their EXIF orientation")
    options = parser.parse_intermixed_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.every < 1:
        parser.error(f"--every must be at least 1, got {options.every}")
    if options.score is not None and math.isnan(options.score):
        parser.error("--score must be a number, got nan")
    return options
