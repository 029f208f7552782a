"""Export a backbone or a whole detector to a file, and prove that the file computes what the model computes.

============  ==========================================  ==============================================
format        backbone                                    detector
============  ==========================================  ==============================================
safetensors   torchvision's names, rebuilt by             (its checkpoint is that)
              ``load_backbone``, bit for bit
torchscript   ``Dict[str, Tensor]``, any batch and size   one image, any size, post-processing inside
export        ``.pt2``, any batch and size                (torch.export stops at non-maximum suppression)
onnx          any batch and size                          one image, any size, post-processing inside
openvino      ``.xml`` and ``.bin``, any batch and size   one image, any size, post-processing inside
============  ==========================================  ==============================================

A backbone takes what it takes in Python: float32 ``[B, 3, H, W]``, normalised. A detector takes one image as it was
read, uint8 ``[3, H, W]``, and returns ``boxes [N, 4]``, ``labels [N]`` and ``scores [N]`` in that image's pixels:
scaling, normalisation and suppression are inside. Frozen norms are folded into the convolutions, so the file runs
nothing but convolutions with biases.

Every file is loaded again and compared with the model at two sizes before it is moved into place; a file that computes
something else is removed. The comparison is returned as an ``ExportReport`` and written as ``<file>.json``, together
with what a reader of the file needs: inputs, outputs, classes. ``README.md`` is its model card (``card.py``).

Files are float32. OpenVINO computes in bfloat16 on every processor that has it unless its ``INFERENCE_PRECISION_HINT``
is ``"f32"``, with which files are compared here. onnxruntime's CPU provider has no bfloat16 convolution, and its int8
(static, weights per channel, ranges from 12 images) moved the pyramid of a trained ResNet-101 by a fifth of its norm,
against a twentieth for bfloat16 in torch. To compute in bfloat16 elsewhere, run the model in torch under autocast.
"""
