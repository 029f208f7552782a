"""Models: ResNet bodies, the feature pyramid, the detector, and where their weights come from."""
