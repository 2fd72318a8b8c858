"""Makes the files beside it: a small ResNet of transformers with random weights, as the hub stores it."""

import pathlib

import numpy as np
import torch
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification
from transformers.models.convnext import ConvNextImageProcessor

HERE = pathlib.Path(__file__).parent

torch.manual_seed(0)
config = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 16],
    depths=[1, 2],
    layer_type="basic",
    downsample_in_first_stage=True,
    num_labels=3,
)
model = ResNetForImageClassification(config).eval()
for value in model.buffers():
    if value.dtype.is_floating_point:
        value.add_(0.2 * torch.rand_like(value))
model.save_pretrained(HERE)
processor = ConvNextImageProcessor(
    size={"shortest_edge": 48}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25], resample=3
)
processor.save_pretrained(HERE)
assert AutoImageProcessor.from_pretrained(HERE)
images = torch.rand(2, 3, 48, 48)
features = model.resnet(images).pooler_output.flatten(1)
np.savez(HERE / "expected.npz", images=images.permute(0, 2, 3, 1).numpy(), features=features.detach().numpy())
