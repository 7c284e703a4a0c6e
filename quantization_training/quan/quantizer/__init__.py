"""Quantizers: what turns a tensor into one that b bits can hold."""

from .lsq import LsqQuan, lsq
from .quantizer import IdentityQuan, Quantizer, integer_range

__all__ = ["IdentityQuan", "LsqQuan", "Quantizer", "integer_range", "lsq"]
