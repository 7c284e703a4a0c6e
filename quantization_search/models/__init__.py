"""Networks and their graph. create_model stands in model.py."""

from .model import OWN_MODELS, create_model, list_architectures
from .weights import load_weights

__all__ = ["OWN_MODELS", "create_model", "list_architectures", "load_weights"]
