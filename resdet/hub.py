"""Add the detector to torchvision's model registry, when this module is imported.

After ``import resdet.hub``::

    torchvision.models.get_model("resdet_fasterrcnn_resnet101_fpn", weights="DEFAULT")
    torchvision.models.get_weight("FasterRCNN_ResNet101_FPN_Weights.DEFAULT")

call ``resdet.fasterrcnn_resnet101_fpn`` and return its enum's member. The registry is the plain dictionary that
torchvision's ``register_model`` fills; the prefix keeps torchvision's own names untouched. ``get_weight`` looks for an
enum by its name in torchvision's packages, so it is put into ``torchvision.models.detection``.

Source: ``torchvision/models/_api.py``. Deviation: a name that exists is kept, where ``register_model`` raises.
"""

from __future__ import annotations

from torchvision.models import detection
from torchvision.models._api import BUILTIN_MODELS

from resdet.models.fasterrcnn import FasterRCNN_ResNet101_FPN_Weights, fasterrcnn_resnet101_fpn

HUB_NAME = "resdet_fasterrcnn_resnet101_fpn"

BUILTIN_MODELS.setdefault(HUB_NAME, fasterrcnn_resnet101_fpn)
vars(detection).setdefault(FasterRCNN_ResNet101_FPN_Weights.__name__, FasterRCNN_ResNet101_FPN_Weights)
