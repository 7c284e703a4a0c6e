"""Quantized layers and quantizers."""
