"""MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2) with half the channels and the strides of small images: 28 pixels
become 14, 7 and 4 instead of 14, 7, 4, 2 and 1."""

from torchvision.models import MobileNetV2

#          expansion, channels, blocks, stride of the first
STAGES = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 1], [6, 320, 1, 1]]


def make(num_classes):
    model = MobileNetV2(num_classes, 0.5, STAGES, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    return model
