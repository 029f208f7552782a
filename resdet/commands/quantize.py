"""Quantise a trained detector to int8 for CPUs, calibrated on images from its training data.

    resdet quantize runs/frcnn_r101
    resdet eval runs/frcnn_r101/int8.pt
    resdet predict runs/frcnn_r101/int8.pt photo.jpg

A run's folder stands for its best.pt. The images are drawn from data.train of the checkpoint's own configuration,
without augmentation. Evaluate the result: the loss of accuracy differs from model to model.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show
from resdet.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet quantize``."""
    parser = command_parser("quantize", __doc__, arguments="[-h] [--images N] [--output FILE] RUN [key=value ...]")
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or a published detector's name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in data.train.root=/voc")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="images to calibrate on (default 32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: int8.pt in the folder of the checkpoint")
    options = parser.parse_intermixed_args(arguments)
    checkpoint = checkpoint_in(options.run)
    # Beside a file of the user's own, and not among downloads.
    output = options.output or (checkpoint.with_name("int8.pt") if Path(options.run).exists() else Path("int8.pt"))

    import torch
    from tqdm import tqdm

    from resdet.build import annotation_files, build_train_set, config_of_checkpoint
    from resdet.config_reading import config_to_plain
    from resdet.files import check_output
    from resdet.models.checkpoint import load_detector, save_int8_detector
    from resdet.models.int8_calibration import quantize_detector
    from resdet.weights.files import read_weights

    if options.images < 1:
        raise UserError(f"--images must be at least 1, got {options.images}")
    file = read_weights(checkpoint)
    config = config_of_checkpoint(file, options.overrides)
    check_output(output, [checkpoint, *annotation_files(config)])
    model = load_detector(file)
    dataset = build_train_set(config, augmented=False)
    # Seeded: the same images every time.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = order[: options.images].tolist()
    images = (dataset[index][0].float() / 255 for index in tqdm(chosen, unit="image"))
    quantized = quantize_detector(model, images)
    save_int8_detector(quantized, output, config_to_plain(config))
    show(f"calibrated on {len(chosen)} images of {config.data.train.format} data\nwritten: {output}")
