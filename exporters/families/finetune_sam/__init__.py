"""finetune-SAM: SAM's ViT with Med-SA's block throughout, adapters or LoRA wherever they are."""

from . import facts, keys, lora, reference

__all__ = ["facts", "keys", "lora", "reference"]
