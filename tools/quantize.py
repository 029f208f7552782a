"""Turn a trained detector into one that computes in int8 on the CPU, calibrated on images it was trained on.

    python tools/quantize.py runs/frcnn_r101
    python tools/eval.py runs/frcnn_r101/int8.pt
    python tools/predict.py runs/frcnn_r101/int8.pt photo.jpg

A run's folder stands for its best.pt. The images are drawn from data.train of the checkpoint's own configuration,
without augmentation. Judge the result with tools/eval.py: what int8 costs differs from model to model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--images N] [--output FILE] RUN [key=value ...]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint (best.pt, last.pt)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted keys, as in data.train.root=/data/voc"
    )
    parser.add_argument(
        "--images", type=int, default=32, metavar="N", help="how many images to calibrate on (default 32)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: int8.pt beside the checkpoint")
    options = parser.parse_intermixed_args(arguments)
    checkpoint = options.run / "best.pt" if options.run.is_dir() else options.run

    import torch
    from tqdm import tqdm

    import resdet
    from resdet.build import build_dataset, config_of_checkpoint
    from resdet.config import config_to_plain

    if options.images < 1:
        raise resdet.UserError(f"--images must be at least 1, got {options.images}")
    config = config_of_checkpoint(checkpoint, options.overrides)
    model = resdet.load_detector(checkpoint)
    dataset = build_dataset(config.data.train, training=False)
    # The same images at every run.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = order[: options.images].tolist()
    images = (dataset[index][0].float() / 255 for index in tqdm(chosen, unit="image"))
    quantized = resdet.quantize_detector(model, images)
    output = options.output or checkpoint.with_name("int8.pt")
    resdet.save_int8_detector(quantized, output, config_to_plain(config))
    print(f"calibrated on {len(chosen)} images of {config.data.train.format} data")
    print(f"written: {output}")


if __name__ == "__main__":
    run_tool(main)
