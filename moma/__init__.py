"""moma: open, reproducible pre-training of mixtures of modality-aware experts (MoMa, arXiv 2407.21770)."""

__version__ = "0.1.0"
