"""Training of decoders and bridges."""
