"""Annotations of any source as one flat table; images, augmentation and batches on top of it."""
