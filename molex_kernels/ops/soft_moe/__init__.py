"""Soft mixtures of experts: every slot of an expert is an average over the tokens."""
