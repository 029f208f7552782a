"""Measure what the documentation claims, on this machine.

    resdet benchmark work=annotations
    resdet benchmark work=annotations num_images=5000 num_boxes=36000 output=annotations.json
    resdet benchmark work=inference images=val2017 weights=best.pt
    resdet benchmark work=training images=train2017 annotations=instances_train2017.json weights=resnet101.pth

work=annotations  loading a made-up annotation file of COCO train2017's size, against pycocotools, and the memory that
                  its table takes in data-loading workers; num_images=, num_boxes=, num_workers=, repeats=,
                  start_methods=fork,spawn,forkserver, seed=
work=evaluation   COCO's twelve numbers at val2017's size, by pycocotools, by faster-coco-eval where it is installed,
                  and by ours; num_images=, num_classes=, detections_per_image=, num_repeats=, seed=
work=loading      images per second of a data-loading worker with flips and multi-scale, against torchvision's reference
                  pipeline; num_images=, batch_size=, num_workers=, repeats=, images=, annotations=, seed=

work=inference    torchvision's Faster R-CNN and ours with the same weights, in float32 and under bfloat16 autocast; how
                  far their detections differ, and how near both come to what this machine's arithmetic allows;
                  min_size=800, max_size=1333, batch_size=1, num_images=8, repeats=8, int8=true for int8 too (a CPU with
                  VNNI), and images=, weights=, arch=,
                  warmup=, device=, seed= as below
work=training     the same for a step of training: forward, backward and optimizer; sizes=480/640,800/1333 (shorter
                  side, longest allowed), batch_size=2, num_images=8, repeats=4, annotations=
work=memory       the peak of memory of such a step, each in a process of its own; sizes=, batch_size=, annotations=
work=roi_align    RoIAlign over P2..P5, forward and backward, torchvision's and ours; num_boxes=1000, channels=256,
                  height=800, width=1216, repeats=10

work=gpu_model    what a GPU would launch and wait for in a training step and an inference, torchvision's and ours;
                  the time that follows from a card's figures is modelled, nothing is measured; batch_sizes=2,16,
                  min_size=800, max_size=1333, arch=, bandwidth_tb=3.0, bf16_tflops=798, tf32_tflops=399,
                  fp32_tflops=54, launch_us=4, wait_us=20, channels_last=false, seed=

work=gpu          on a CUDA device, within minutes=8: its tests, speed against torchvision's in both layouts, waits as
                  measured and as counted, a profile, a fine-tune on bccd=FOLDER; batch_sizes=8,16, min_size=800,
                  max_size=1333, repeats=8, warmup=2, steps=200, arch=, weights=, parts=speed,waits,profile,fine_tune,
                  tests, figures=FILE (written after each part), seed=

work=recipes      fine-tunes in the same minutes by torchvision's reference recipe, by frcnn_r101 with SGD and AdamW at
                  416 px, and by finetune; data=FOLDERS (each with images, train.json, val.json, test.json),
                  minutes=10, recipes=torchvision,sgd,adamw,finetune, runs=FOLDER (keeps ours), arch=, weights=, seed=;
                  recipes=finetune,without_anchors,... leaves single rules of finetune out

images=FOLDER     photographs; generated pictures without it
annotations=FILE  their boxes for training, a COCO json
weights=FILE      a detector's checkpoint, or ImageNet weights of its body (heads are random then); without it random
                  weights in a normalised network
arch=resnet101    the body, unless weights= holds a whole detector
device=auto       cpu, cuda, or a GPU where there is one
warmup=1, seed=0  runs of each that do not count; what random weights follow from

output=FILE writes the figures as json too.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser, run_tool, show


def main(arguments: Sequence[str]) -> None:
    """Run ``benchmark.py``."""
    parser = command_parser("benchmark", __doc__)
    parser.add_argument("settings", nargs="+", metavar="key=value", help="work=NAME, output=FILE, settings of the work")
    settings = parser.parse_intermixed_args(arguments).settings

    from benchmarks import run_benchmark

    from resdet.files import check_outputs

    outputs = [Path(setting.removeprefix("output=")) for setting in settings if setting.startswith("output=")]
    others = [setting for setting in settings if not setting.startswith("output=")]
    check_outputs(outputs, [Path(setting.partition("=")[2]) for setting in others])
    report = run_benchmark(others)
    for output in outputs:
        report.write(output)
    show("\n".join([str(report), *(f"written: {output}" for output in outputs)]))


if __name__ == "__main__":
    run_tool(main)
