"""The fused op: one kernel call for a whole update. Imports TensorFlow only when it is used."""

from nlcg_tf.fused.nlcg_update import build_info, is_available, update, why_not

__all__ = ["build_info", "is_available", "update", "why_not"]
