"""Prompts from files, data sets and Python, and the order in which training visits them."""

from opd.data.prompts import Completion, read_prompts, read_prompts_from

__all__ = ["Completion", "read_prompts", "read_prompts_from"]
