"""Classification training: where the weights come from that detectors are fine-tuned from."""
