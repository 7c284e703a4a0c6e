"""In which floating-point numbers, and in which memory layout, the passes of a training are computed."""

import torch


def autocast(device, precision):
    """The context of a pass: as it is for "fp32", autocast to bfloat16 for "bf16".

    The integers of every candidate up to 8 bits fit into bfloat16; step sizes and their gradients stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def logits_of(model, images, precision):
    """What a network answers, [batch, classes], in the type of its loss: float32 where it computes in less."""
    with autocast(images.device, precision):
        logits = model(images)
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def to_device(model, device):
    """Move a network, with images and convolution weights laid out as convolutions compute them fastest: channels last."""
    return model.to(device, memory_format=torch.channels_last)
