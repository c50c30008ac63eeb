"""The image tokenizer's network: VQ-GAN (`model`), quantiser (`quantize`) and losses (`losses`)."""
