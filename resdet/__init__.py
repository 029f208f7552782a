"""Faster R-CNN on a ResNet-101 with FPN for torchvision: build, fine-tune, evaluate, predict, export.

The public names are those of ``__init__.pyi``. Each is imported when it is first used: ``import resdet`` costs nothing.
"""

import lazy_loader

from resdet.version import VERSION

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = VERSION
