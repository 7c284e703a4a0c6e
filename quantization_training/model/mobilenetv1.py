"""MobileNetV1 (Howard et al., arXiv 1704.04861, table 1)."""

from torch import nn

# output channels and stride of each depthwise separable unit
UNITS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# LIMPQ's code repeats the stride of a stage in each of its units; the parameters have the same shapes.
REPEATED_STRIDES = [(channels, 1 if channels == 64 else 2) for channels, _ in UNITS]


def _convolution(in_channels, out_channels, kernel, stride, groups=1):
    return [nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class MobileNetV1(nn.Module):
    """A strided 3x3 convolution, 13 depthwise separable units, global average pooling and a linear classifier."""

    def __init__(self, num_classes, units=UNITS):
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, 32, 3, 2))
        blocks, channels = [], 32
        for out_channels, stride in units:
            blocks.append(nn.Sequential(*_convolution(channels, channels, 3, stride, groups=channels),
                                        *_convolution(channels, out_channels, 1, 1)))
            channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.features(self.stem(x))
        return self.fc(self.pool(x).flatten(1))


def mobilenetv1(num_classes):
    return MobileNetV1(num_classes)


def mobilenetv1_limpq(num_classes):
    """MobileNetV1 with the strides of LIMPQ's code, for checkpoints that were trained with them."""
    return MobileNetV1(num_classes, REPEATED_STRIDES)
