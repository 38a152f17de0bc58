"""Training on the field's engines: corpora, continued pre-training, calibration."""
