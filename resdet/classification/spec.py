"""The settings of a classifier, without torch: reading a configuration imports them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from resdet.models.archs import find_arch

Positive = Annotated[float, Field(gt=0)]


class ClassifierSpec(BaseModel):
    """Everything that makes a classifier what it is, apart from its weights and its classes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str = Field(default="resnet50", description="The network, a key of resdet.models.archs.ARCHS.")
    norm: Literal["batch", "group"] = Field(
        default="batch", description="Normalisation: batch, or group (32 groups), which small batches do not harm."
    )
    norm_eps: float = Field(default=1e-5, ge=0, description="Added to the variance by every norm.")
    stride_in_1x1: bool = Field(
        default=False,
        description="Bottlenecks stride in their first 1x1 convolution, as He et al. 2016 do, and not in the 3x3.",
    )
    image_size: PositiveInt = Field(default=224, description="Side in pixels of the square images it is made for.")
    image_mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Subtracted from the red, green and blue of images in [0, 1]."
    )
    image_std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225),
        description="What red, green and blue are divided by after that; 1/255 leaves differences of 8-bit pixels.",
    )

    @field_validator("arch")
    @classmethod
    def _arch_is_known(cls, arch: str) -> str:
        find_arch(arch)
        return arch
