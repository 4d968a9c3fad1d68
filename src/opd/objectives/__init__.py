"""The mathematics: pure functions of tensors, in nats, exactly 0 off the mask, in any floating dtype.

Source of all that stands here: the theory of on-policy distillation (Theorem 1 and section 1.3 of docs/concepts/objectives.md).
"""
