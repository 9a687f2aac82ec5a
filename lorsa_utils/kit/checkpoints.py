"""Former home of what `hub` holds."""

from lorsa_utils.kit.hub import check, find, model_card, pack, train_command, unpack

__all__ = ["check", "find", "model_card", "pack", "train_command", "unpack"]
