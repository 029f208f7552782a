"""List the published detectors that can be had by name, or download some.

    resdet weights
    resdet weights detectron2_r101_fpn_3x
    resdet predict detectron2_r101_fpn_3x photo.jpg
    resdet train frcnn_r101 model.weights=detectron2_r101_fpn_3x

A name is taken where a checkpoint is taken; its file is downloaded when it is first needed. Given here, it is
downloaded and checked now, and its path is printed: for a machine without a network, do it on another one and copy the
file.
"""

from collections.abc import Sequence

from resdet.commands.run import command_parser, show
from resdet.errors import UserError
from resdet.weights.zoo import LICENCES, PUBLISHED


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet weights``."""
    parser = command_parser("weights", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="download these")
    names = parser.parse_intermixed_args(arguments).names
    if not names:
        show(f"{'name':30}  {'arch':16}  {'box AP':6}  licence")
        for one in PUBLISHED.values():
            show(f"{one.name:30}  {one.arch:16}  {one.box_ap:6}  {LICENCES[one.library]}")
        show("box AP on COCO val2017 is what their publishers report (reference); `resdet weights NAME` downloads one")
        return

    from resdet.weights.source import locate

    for name in names:
        path = locate(name)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        show(f"{name}: {path}")
