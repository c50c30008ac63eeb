"""Sampling from a trained model: cached decoding, draws on logits, and interleaved text and pictures."""
