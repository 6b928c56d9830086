"""SAMed and SAMed_s: SAM's ViT with LoRA and a decoder for classes, laid over a base."""

from . import facts, keys, lora, reference

__all__ = ["facts", "keys", "lora", "reference"]
