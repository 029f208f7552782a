"""Add a name to torchvision's model registry, when this module is imported.

After ``import resdet.hub``::

    torchvision.models.get_model("resdet_fasterrcnn_resnet101_fpn", weights="best.pt")

calls ``resdet.fasterrcnn_resnet101_fpn``. The registry is the plain dictionary that torchvision's ``register_model``
fills; the prefix keeps torchvision's own names untouched. ``get_model_weights`` finds nothing for this name, because
``weights`` is a file or a URL here, not an enum.

Source: ``torchvision/models/_api.py``. Deviation: a name that exists is kept, where ``register_model`` raises.
"""

from __future__ import annotations

from torchvision.models._api import BUILTIN_MODELS

from resdet.models.fasterrcnn import fasterrcnn_resnet101_fpn

HUB_NAME = "resdet_fasterrcnn_resnet101_fpn"

BUILTIN_MODELS.setdefault(HUB_NAME, fasterrcnn_resnet101_fpn)
